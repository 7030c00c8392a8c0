"""Search corpora in BEIR's form: documents, queries, and judgements which document answers which query.

BEIR is the usual collection of test corpora for text search, in one form:

    folder/corpus.jsonl        {"_id": "4983", "title": "…", "text": "…"}       one document a line; the title may be ""
    folder/queries.jsonl       {"_id": "1", "text": "…"}                        queries of all splits
    folder/qrels/test.tsv      query-id ⇥ corpus-id ⇥ score                     a header, then one judgement a line

Nothing is downloaded: unpack a corpus yourself, or write one of your own in this form. A document's text is its
title, a space and its text, as in the published runs. Two more of their habits: only queries with judgements are
asked, and a document whose id is the query's own is never an answer (`Corpus.without_query`; ArguAna's queries are
documents of the corpus).

`from_docs` makes a corpus of this form out of what every machine has, Python's own documentation.

    >>> corpus = from_docs()
    >>> index = BM25().fit(corpus.texts)
    >>> scores, ids = index.search(corpus.asked, k=100)
    >>> metrics.ndcg(ids, corpus.relevant, 10)

Cost:
    Reading JSON lines: some 50 MB a second.

Memory:
    The text.

Papers:
    Thakur et al. 2021, arXiv:2104.08663 (BEIR).
    Kamalloo et al. 2023, arXiv:2306.07471 (reproducible baselines for it: the published figures).

See also:
    `mlsys.retrieval.metrics`, `mlsys search --data FOLDER --eval` (which prints the figures).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlsys.data import docs
from mlsys.files import write_atomic

SOURCE = "Anserini's regressions beir-v1.0.0-*-flat: Lucene, k1 = 0.9, b = 0.4, its English analyzer, title and text"

# Name of the folder → nDCG@10 and recall@100 of BM25, from SOURCE.
PUBLISHED: Mapping[str, tuple[float, float]] = {
    "arguana": (0.3970, 0.9324),
    "dbpedia-entity": (0.3180, 0.4682),
    "fiqa": (0.2361, 0.5395),
    "nfcorpus": (0.3218, 0.2457),
    "nq": (0.3055, 0.7513),
    "quora": (0.7886, 0.9733),
    "scidocs": (0.1490, 0.3477),
    "scifact": (0.6789, 0.9253),
    "trec-covid": (0.5947, 0.1091),
    "webis-touche2020": (0.4422, 0.5822),
}


@dataclass(frozen=True)
class Corpus:
    """Documents, queries and judgements.

    name:       of its folder: "scifact".
    ids:        the documents' ids, in the order of the file.
    titles:     their titles, "" for none.
    bodies:     their texts, without the titles.
    queries:    id → text, of every query in the file.
    judgements: query id → document id → grade, whole numbers; 1 and above is relevant.
    """

    name: str
    ids: list[str]
    titles: list[str]
    bodies: list[str]
    queries: dict[str, str]
    judgements: dict[str, dict[str, int]]

    @cached_property
    def texts(self) -> list[str]:
        """Of each document its title, a space, and its text: what is indexed."""
        return [f"{title} {body}".strip() for title, body in zip(self.titles, self.bodies, strict=True)]

    @cached_property
    def asked(self) -> list[str]:
        """The queries that have judgements, in the order of the judgements."""
        return [self.queries[query] for query in self.judgements]

    @cached_property
    def relevant(self) -> list[dict[int, int]]:
        """For each query asked, row of a document → grade; what `mlsys.retrieval.metrics` takes.

        A judged document that the corpus lacks counts as one that nothing finds: it gets a row beyond the last.
        """
        row = {document: i for i, document in enumerate(self.ids)}
        return [
            {row.get(document, len(row) + i): grade for i, (document, grade) in enumerate(judged.items())}
            for judged in self.judgements.values()
        ]

    def without_query(self, ids: np.ndarray) -> np.ndarray:
        """Rows found for the queries asked, (n_queries, k), less the document that is the query itself: (…, k − 1)."""
        row = {document: i for i, document in enumerate(self.ids)}
        own = np.array([row.get(query, -2) for query in self.judgements], np.int64)
        last = np.argsort(ids == own[:, None], axis=1, kind="stable")  # what is kept, in order, and then the query
        return np.take_along_axis(ids, last, axis=1)[:, :-1]


def load(folder: str | os.PathLike[str], split: str = "test") -> Corpus:
    """The corpus in `folder`, with the judgements of qrels/`split`.tsv.

    ValueError for a missing file, a line that is none of its form, an id that comes twice, and a judgement of a query
    that is not there: the message names file and line. Judgements of documents that are not there are kept.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; a BEIR corpus is one with corpus.jsonl, queries.jsonl and qrels/")
    ids, titles, bodies = _documents(path / "corpus.jsonl")
    queries = {entry["_id"]: entry["text"] for entry in _entries(path / "queries.jsonl")}
    judgements = _judgements(path / "qrels" / f"{split}.tsv", queries)
    return Corpus(path.resolve().name, ids, titles, bodies, queries, judgements)


def documents(folder: str | os.PathLike[str]) -> Corpus:
    """The documents in `folder` alone, without queries and judgements: corpus.jsonl is enough. Errors as for `load`."""
    path = Path(folder)
    ids, titles, bodies = _documents(path / "corpus.jsonl")
    return Corpus(path.resolve().name, ids, titles, bodies, {}, {})


def save(corpus: Corpus, folder: str | os.PathLike[str], split: str = "test") -> None:
    """Write a corpus in BEIR's form; `load` gives it back."""
    path = Path(folder)
    (path / "qrels").mkdir(parents=True, exist_ok=True)
    rows = zip(corpus.ids, corpus.titles, corpus.bodies, strict=True)
    _write(path / "corpus.jsonl", ({"_id": i, "title": title, "text": body} for i, title, body in rows))
    _write(path / "queries.jsonl", ({"_id": i, "text": text} for i, text in corpus.queries.items()))
    lines = [f"{q}\t{d}\t{grade}\n" for q, judged in corpus.judgements.items() for d, grade in judged.items()]
    write_atomic(path / "qrels" / f"{split}.tsv", "query-id\tcorpus-id\tscore\n" + "".join(lines))


def from_docs(packages: Iterable[str] = (), n_queries: int = 2000, seed: int = 0) -> Corpus:
    """Known items in Python's own documentation: each query is a docstring's summary line, its answer that docstring.

    Documents are the bodies alone, without titles: they hold neither the name nor the summary. See `mlsys.data.docs`.
    """
    found = docs.load(packages)
    queries, relevant = docs.known_items(found, n_queries, seed=seed)
    ids = [f"d{i}" for i in range(len(found))]
    return Corpus(
        name="python-docs",
        ids=ids,
        titles=[""] * len(found),
        bodies=[document.body for document in found],
        queries={f"q{i}": query for i, query in enumerate(queries)},
        judgements={f"q{i}": {ids[row]: 1} for i, row in enumerate(relevant)},
    )


def _documents(file: Path) -> tuple[list[str], list[str], list[str]]:
    """Ids, titles and texts."""
    ids, titles, bodies = [], [], []
    for entry in _entries(file):
        ids.append(entry["_id"])
        titles.append(entry.get("title") or "")
        bodies.append(entry["text"])
    if not ids:
        raise ValueError(f"{file} holds no documents")
    return ids, titles, bodies


def _entries(file: Path) -> Iterator[dict[str, Any]]:
    """Each line of a file of JSON objects with a distinct "_id" and a "text"; empty lines are skipped."""
    seen: set[str] = set()
    for number, line in _lines(file):
        at = f"{file}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{at} is not JSON: {error}") from None
        if not isinstance(entry, dict):
            raise ValueError(f'{at} is no object such as {{"_id": "1", "text": "…"}}: {line[:60]!r}')
        if isinstance(entry.get("_id"), int) and not isinstance(entry["_id"], bool):
            entry["_id"] = str(entry["_id"])
        for name in ("_id", "text"):
            if not isinstance(entry.get(name), str):
                raise ValueError(
                    f"{at} has no {name!r} that is a string; it has {', '.join(map(repr, entry)) or 'nothing'}"
                )
        if not isinstance(entry.get("title") or "", str):
            raise ValueError(f"{at} has a 'title' that is no string: {entry['title']!r:.60}")
        if entry["_id"] in seen:
            raise ValueError(f"{at} has the _id {entry['_id']!r}, which an earlier line has; ids must be distinct")
        seen.add(entry["_id"])
        yield entry


def _judgements(file: Path, queries: Mapping[str, str]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for number, line in _lines(file):
        at = f"{file}, line {number}"
        fields = line.split("\t")
        if number == 1 and fields[-1].strip() == "score":
            continue
        if len(fields) != 3:
            raise ValueError(f"{at} must be query-id, corpus-id and score with tabs between them, got {line[:60]!r}")
        query, document, score = fields
        try:
            grade = float(score)
            if not math.isfinite(grade) or grade != int(grade):
                raise ValueError
        except ValueError:
            raise ValueError(f"{at}: the score must be a whole number, got {score.strip()!r}") from None
        if query not in queries:
            raise ValueError(f"{at} judges the query {query!r}, which queries.jsonl does not have")
        judged = found.setdefault(query, {})
        if document in judged:
            raise ValueError(f"{at} judges query {query!r} and document {document!r} a second time")
        judged[document] = int(grade)
    if not found:
        raise ValueError(f"{file} holds no judgements")
    return found


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not empty, and their numbers from 1."""
    try:
        with file.open("rb") as opened:
            for number, line in enumerate(opened, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{file}, line {number} is not UTF-8: {error.reason}") from None
                if text.strip():
                    yield number, text
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(
            f"{file} is missing; a BEIR corpus has corpus.jsonl, queries.jsonl and qrels/test.tsv"
        ) from None


def _write(file: Path, entries: Iterable[Mapping[str, str]]) -> None:
    write_atomic(file, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
