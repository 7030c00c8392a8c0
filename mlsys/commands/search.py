"""`mlsys search`: find the function for a job in the documentation of this Python and of installed packages."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mlsys.commands import UsageError

if TYPE_CHECKING:
    from mlsys.retrieval.tokenize import Tokenizer

EXAMPLES = """examples:
  mlsys search "parse a date string"
  mlsys search "remove a directory tree" -k 3
  mlsys search "elementwise maximum of two arrays" --packages numpy torch
"""

VARIANTS = ("lucene", "robertson", "atire", "okapi", "bm25+", "bm25l", "paper-bm25+", "paper-bm25l")
WEIGHT = 2  # how often the name and the summary count, against once for the body


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = "Search the docstrings of the standard library, and of installed packages, by BM25."
    parser.epilog = EXAMPLES
    parser.add_argument("query", nargs="+", metavar="WORD", help="what to look for")
    parser.add_argument(
        "--packages", nargs="+", default=[], metavar="NAME", help="installed packages to search as well"
    )
    parser.add_argument("-k", type=int, default=5, metavar="N", help="how many to show (default 5)")
    parser.add_argument("--variant", choices=VARIANTS, default="lucene", help="which BM25 (default lucene)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the hits, best first; exit status 1 if there are none."""
    from mlsys.data import docs

    if args.k < 1:
        raise UsageError(f"-k must be at least 1, got {args.k}")
    query = " ".join(args.query)
    try:
        with _said_on_stderr(docs.log):
            documents = docs.load(args.packages)
    except ValueError as error:
        raise UsageError(str(error)) from None
    hits = find(query, documents, args.k, args.variant)
    if args.json:
        print(json.dumps(hits, indent=2, ensure_ascii=False))
    elif hits:
        print("\n\n".join(shown(hit) for hit in hits))
    else:
        print(f"nothing found: {_why(query, len(documents))}", file=sys.stderr)
    return 0 if hits else 1


def _why(query: str, n_documents: int) -> str:
    """Why nothing was found: no document has the words, or there is no word to look for."""
    tokenizer = _tokenizer()
    asked = " ".join(word for word in query.split() if tokenizer(word))
    if asked:
        return f"none of the {n_documents} documents has a word of {asked!r}"
    return (
        f"{query!r} holds only stop words (a, of, the, …) or punctuation, which are left out; "
        "add a word that says what you look for"
    )


def _tokenizer() -> Tokenizer:
    """How documents and queries become words."""
    from mlsys.retrieval.tokenize import Tokenizer

    return Tokenizer(split_identifiers=True, stopwords="english", stem=True)


def find(query: str, documents: Sequence[Any], k: int, variant: str) -> list[dict[str, Any]]:
    """The best `k` documents (`mlsys.data.docs.Document`) for a query, each with its rank, score and matched words."""
    from mlsys.retrieval.bm25 import BM25

    tokenizer = _tokenizer()
    summaries = [tokenizer(document.summary) for document in documents]
    spread = Counter(word for summary in summaries for word in set(summary))
    words = {word for word, count in spread.items() if count >= 10 and len(word) >= 3}
    texts = []
    for document, summary in zip(documents, summaries, strict=True):
        name = tokenizer(document.name)
        compounds = [part for word in dict.fromkeys(name) for part in split_compound(word, words)]
        texts.append(WEIGHT * (name + compounds + summary) + tokenizer(document.body))
    index = BM25(variant=variant, tokenizer=tokenizer).fit(texts)
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
    """The two words that a name is written together from: "parsedat(e)" → ["pars", "dat"], if both are in `words`.

    Words are stems, and so the first half is looked up with its final e cut off.
    """
    for cut in range(3, len(word) - 2):
        first = word[:cut].removesuffix("e") if cut > 3 else word[:cut]
        if first in words and word[cut:] in words:
            return [first, word[cut:]]
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
