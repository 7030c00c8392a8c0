"""`mlsys search`: find the function for a job in the documentation of this Python, or search a corpus of your own.

A corpus is a folder in BEIR's form (`mlsys.data.beir`). With `--eval`, its own queries are asked and its own
judgements say how good the answers are: the figures by which text search is compared.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlsys.commands import UsageError

if TYPE_CHECKING:
    from mlsys.retrieval.bm25 import BM25
    from mlsys.retrieval.tokenize import Tokenizer

EXAMPLES = """examples:
  mlsys search "parse a date string"
  mlsys search "remove a directory tree" -k 3
  mlsys search "elementwise maximum of two arrays" --packages numpy torch
  mlsys search --data ~/beir/scifact "do vitamins help against the flu"
  mlsys search --data ~/beir/scifact --eval
  mlsys search --eval --stemmer none         how well BM25 finds docstrings by their summary lines
"""

VARIANTS = ("lucene", "robertson", "atire", "okapi", "bm25+", "bm25l", "paper-bm25+", "paper-bm25l")
DEPTH = 1000  # documents found for each query of an evaluation, as in the published runs
WORDS = "as mlsys.retrieval.tokenize.LUCENE finds them: nearly Lucene's EnglishAnalyzer, lower case, without a final 's"
WEIGHT = 2  # how often the name and the summary count, against once for the body


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = (
        "Search the docstrings of the standard library, and of installed packages, by BM25; or a corpus of your own "
        "in BEIR's form; or say how well that works."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("query", nargs="*", metavar="WORD", help="what to look for")
    parser.add_argument(
        "--packages", nargs="+", default=[], metavar="NAME", help="installed packages to search as well"
    )
    parser.add_argument("--data", metavar="FOLDER", help="search this BEIR corpus (corpus.jsonl) instead")
    parser.add_argument(
        "--eval", action="store_true", help="ask the corpus' own queries and print nDCG, recall, MAP and MRR"
    )
    parser.add_argument("-k", type=int, default=5, metavar="N", help="how many to show (default 5)")
    parser.add_argument("--variant", choices=VARIANTS, default="lucene", help="which BM25 (default lucene)")
    parser.add_argument("--k1", type=float, metavar="X", help="saturation (default 1.5; with --data or --eval 0.9)")
    parser.add_argument(
        "--b", type=float, metavar="X", help="weight of length (default 0.75; with --data or --eval 0.4)"
    )
    parser.add_argument(
        "--stemmer", metavar="NAME", help="english, porter, german, … or none (default english; with --data porter)"
    )
    parser.add_argument("--stopwords", metavar="NAME", help="english, german, … or none (default english)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the hits, best first, or the figures of an evaluation; exit status 1 if there are no hits."""
    if args.k < 1:
        raise UsageError(f"-k must be at least 1, got {args.k}")
    if args.eval and args.query:
        raise UsageError(f"--eval asks the corpus' own queries; leave out {' '.join(args.query)!r}")
    if not args.eval and not args.query:
        raise UsageError('nothing to look for: add words, as in `mlsys search "parse a date string"`, or --eval')
    if args.data and args.packages:
        raise UsageError("--packages adds to Python's documentation; with --data there is only the folder")
    try:
        if args.eval:
            return _evaluate(args)
        return _search_folder(args) if args.data else _search_docs(args)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _search_docs(args: argparse.Namespace) -> int:
    from mlsys.data import docs
    from mlsys.retrieval.tokenize import Tokenizer

    query = " ".join(args.query)
    with _said_on_stderr(docs.log):
        documents = docs.load(args.packages)
    tokenizer = _chosen(args, Tokenizer(split_identifiers=True, stopwords="english", stemmer="english"))
    hits = find(query, documents, args.k, _index(args, tokenizer, 1.5, 0.75))
    return _show(args, hits, shown, _why(query, tokenizer, len(documents)))


def _search_folder(args: argparse.Namespace) -> int:
    from mlsys.data import beir
    from mlsys.retrieval.tokenize import LUCENE

    query = " ".join(args.query)
    corpus = beir.documents(args.data)
    tokenizer = _chosen(args, LUCENE)
    index = _index(args, tokenizer, 0.9, 0.4).fit(corpus.texts)
    scores, ids = index.search([query], min(args.k, len(corpus.ids)))
    hits = [
        {
            "rank": rank,
            "id": corpus.ids[i],
            "title": corpus.titles[i],
            "text": corpus.bodies[i],
            "score": round(score, 3),
        }
        for rank, (score, i) in enumerate(zip(scores[0].tolist(), ids[0].tolist(), strict=True), 1)
        if i >= 0
    ]
    return _show(args, hits, _shown_text, _why(query, tokenizer, len(corpus.ids)))


def _evaluate(args: argparse.Namespace) -> int:
    """Ask all judged queries, and print how good the answers are, beside what is published for this corpus."""
    import numpy as np

    from mlsys.data import beir, docs
    from mlsys.retrieval import metrics
    from mlsys.retrieval.tokenize import LUCENE

    if args.data:
        corpus = beir.load(args.data)
    else:
        with _said_on_stderr(docs.log):
            corpus = beir.from_docs(args.packages)
    tokenizer = _chosen(args, LUCENE)
    index = _index(args, tokenizer, 0.9, 0.4).fit(corpus.texts)
    n = len(corpus.ids)
    _, ids = index.search(corpus.asked, min(DEPTH + 1, n))
    ids = corpus.without_query(ids) if not set(corpus.judgements).isdisjoint(corpus.ids) else ids[:, :DEPTH]
    width = max(DEPTH, ids.shape[1])
    full = np.full((len(ids), width), -1, np.int64)  # a corpus of few documents gives short rows
    full[:, : ids.shape[1]] = ids
    figures = {
        "nDCG@10": metrics.ndcg(full, corpus.relevant, 10),
        "recall@100": metrics.recall(full, corpus.relevant, 100),
        "MAP": metrics.mean_average_precision(full, corpus.relevant, DEPTH),
        "MRR@10": metrics.mrr(full, corpus.relevant, 10),
    }
    published = dict(zip(("nDCG@10", "recall@100"), beir.PUBLISHED.get(corpus.name, ()), strict=False))
    settings = {
        "variant": args.variant, "k1": index.k1, "b": index.b,
        "stemmer": tokenizer.stemmer, "stopwords": tokenizer.stopwords,
    }  # fmt: skip
    if args.json:
        said = {"corpus": corpus.name, "documents": n, "queries": len(corpus.asked), **settings, "words": WORDS}
        print(json.dumps({**said, "figures": figures, "published": published}, indent=2))
        return 0
    print(f"{corpus.name}: {n} documents, {len(corpus.asked)} queries with judgements")
    print("BM25 " + ", ".join(f"{name} {value if value is not None else 'none'}" for name, value in settings.items()))
    print(f"words {WORDS}")
    for name, value in figures.items():
        beside = (
            f"   published {published[name]:.4f}   ours {value - published[name]:+.4f}" if name in published else ""
        )
        print(f"  {name:<11} {value:.4f}{beside}")
    if published:
        print(f"published: {beir.SOURCE}")
        theirs = {"variant": "lucene", "k1": 0.9, "b": 0.4, "stemmer": LUCENE.stemmer, "stopwords": LUCENE.stopwords}
        other = [f"{name} {value}" for name, value in theirs.items() if settings[name] != value]
        if other:
            print(f"not comparable: the published runs have {', '.join(other)}")
    return 0


def _show(args: argparse.Namespace, hits: list[dict[str, Any]], one: Callable[[dict[str, Any]], str], why: str) -> int:
    if args.json:
        print(json.dumps(hits, indent=2, ensure_ascii=False))
    elif hits:
        print("\n\n".join(one(hit) for hit in hits))
    else:
        print(f"nothing found: {why}", file=sys.stderr)
    return 0 if hits else 1


def _chosen(args: argparse.Namespace, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the stemmer and the stop words that were asked for."""
    if args.stemmer is not None:
        tokenizer = replace(tokenizer, stemmer=None if args.stemmer == "none" else args.stemmer)
    if args.stopwords is not None:
        tokenizer = replace(tokenizer, stopwords=None if args.stopwords == "none" else args.stopwords)
    return tokenizer


def _index(args: argparse.Namespace, tokenizer: Tokenizer, k1: float, b: float) -> BM25:
    """An empty index, with what was asked for."""
    from mlsys.retrieval.bm25 import BM25

    return BM25(
        variant=args.variant,
        k1=k1 if args.k1 is None else args.k1,
        b=b if args.b is None else args.b,
        tokenizer=tokenizer,
    )


def _why(query: str, tokenizer: Tokenizer, n_documents: int) -> str:
    """Why nothing was found: no document has the words, or there is no word to look for."""
    asked = " ".join(word for word in query.split() if tokenizer(word))
    if asked:
        return f"none of the {n_documents} documents has a word of {asked!r}"
    return (
        f"{query!r} holds only stop words (a, of, the, …) or punctuation, which are left out; "
        "add a word that says what you look for"
    )


def find(query: str, documents: Sequence[Any], k: int, index: BM25) -> list[dict[str, Any]]:
    """The best `k` documents (`mlsys.data.docs.Document`) for a query, each with its rank, score and matched words.

    `index` is an empty one with a `Tokenizer`; it is fitted here.
    """
    from mlsys.retrieval.tokenize import Tokenizer

    tokenizer = index.tokenizer
    assert isinstance(tokenizer, Tokenizer)
    whole = replace(tokenizer, stemmer=None)
    spread = Counter(word for document in documents for word in set(whole(document.summary)))
    words = {word for word, count in spread.items() if count >= 10 and len(word) >= 3}
    texts = []
    for document in documents:
        parts = [part for word in dict.fromkeys(whole(document.name)) for part in split_compound(word, words)]
        title = tokenizer(document.name) + tokenizer(" ".join(parts)) + tokenizer(document.summary)
        texts.append(WEIGHT * title + tokenizer(document.body))
    index.fit(texts)
    scores, ids = index.search([query], min(k, len(documents)))

    asked = {word: set(forms) for word in dict.fromkeys(query.split()) if (forms := tokenizer(word))}
    hits = []
    for rank, (score, i) in enumerate(zip(scores[0].tolist(), ids[0].tolist(), strict=True), 1):
        if i >= 0:
            own = set(texts[i])
            document = documents[i]
            hits.append(
                {
                    "rank": rank,
                    "name": document.name,
                    "kind": document.kind,
                    "signature": document.signature,
                    "summary": document.summary,
                    "score": round(score, 3),
                    "file": document.path,
                    "line": document.line,
                    "package": document.package,
                    "matched": [word for word, forms in asked.items() if forms & own],
                    "missing": [word for word, forms in asked.items() if not forms & own],
                }
            )
    return hits


def split_compound(word: str, words: set[str]) -> list[str]:
    """The two words that a name is written together from: "parsedate" → ["parse", "date"], if both are in `words`."""
    for cut in range(3, len(word) - 2):
        if word[:cut] in words and word[cut:] in words:
            return [word[:cut], word[cut:]]
    return []


def shown(hit: dict[str, Any], width: int = 100) -> str:
    """One hit on three or four lines."""
    title = f"{hit['rank']}. {hit['name']}{hit['signature'].partition(' -> ')[0]}"
    if hit["kind"] in ("module", "class"):
        title = f"{hit['rank']}. {hit['kind']} {title.partition(' ')[2]}"
    words = f"{' '.join(hit['matched'])}{'; not ' if hit['missing'] else ''}{' '.join(hit['missing'])}"
    return "\n".join(
        [
            textwrap.shorten(title, width, placeholder=" …)"),
            f"   {textwrap.shorten(hit['summary'], width - 3, placeholder=' …')}",
            f"   {hit['file']}:{hit['line']}   score {hit['score']:.2f}   matches {words}",
        ]
    )


def _shown_text(hit: dict[str, Any], width: int = 100) -> str:
    """A document of a folder on two or three lines."""
    lines = [f"{hit['rank']}. {hit['title'] or hit['id']}", f"   {hit['text']}"]
    return "\n".join(
        [
            *(textwrap.shorten(line, width, placeholder=" …") for line in lines[:1]),
            "   " + textwrap.shorten(lines[1], width - 3, placeholder=" …"),
            f"   {hit['id']}   score {hit['score']:.2f}",
        ]
    )


@contextmanager
def _said_on_stderr(logger: logging.Logger) -> Iterator[None]:
    """Show what is logged (reading takes seconds, the first time) while this runs."""
    handler = logging.StreamHandler(sys.stderr)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
