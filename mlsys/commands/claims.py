"""`mlsys claims`: recompute the published numbers and print ours beside them."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from mlsys.commands import UsageError

if TYPE_CHECKING:
    from mlsys.claims import Reproduced

PAGE = """# Published numbers, reproduced

Written by `make claims`. *Exact*: equal to the digits that the paper printed. *Approximate*: within the claim's stated
tolerance. *Disagrees*: outside it, with the reason. *(formula)*: the source prints a formula; its value at the numbers
given stands for the published one. Ours is computed by this library's code, never from the published value.

"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mlsys claims`."""
    parser.add_argument("area", nargs="?", help="only claims of this technique or package, such as attention")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a line")
    form.add_argument("--write", type=Path, metavar="FILE", help="write the table to a Markdown page")


def run(args: argparse.Namespace) -> int:
    """Exit status 1 if a claim's status is not the one that the library stands by."""
    from tabulate import tabulate

    from mlsys.claims import all_claims, reproduce, rows
    from mlsys.files import write_atomic

    known = all_claims()
    areas = sorted({c.area for c in known} | {c.area.partition(".")[0] for c in known})
    if args.area and args.area not in areas:
        raise UsageError(f"no claims about {args.area!r}; there are claims about {', '.join(areas)}")
    chosen = [c for c in known if not args.area or c.area == args.area or c.area.startswith(f"{args.area}.")]
    done = [reproduce(c) for c in chosen]
    table = rows(done)
    if args.json:
        for row in table:
            print(json.dumps(row, ensure_ascii=False))
    elif args.write:
        write_atomic(args.write, page(done))
        print(f"wrote {args.write}: {summary(done)}")
    else:
        short = [{k: row[k] for k in ("claim", "technique", "published", "ours", "status", "what")} for row in table]
        widths = [None, None, None, None, None, 50]
        print(tabulate(short, headers="keys", tablefmt="simple", maxcolwidths=widths, disable_numparse=True))
        print(f"\n{summary(done)}; sources and reasons: --json, or docs/claims.md")
    return 1 if any(r.status != r.claim.expected for r in done) else 0


def summary(done: Sequence[Reproduced]) -> str:
    """How many of each status: "91 claims: 70 exact, 18 approximate, 3 disagree"."""
    counts = Counter[str](r.status for r in done)
    words = {"exact": "exact", "approximate": "approximate", "disagrees": "disagree"}
    formulas = sum(r.claim.formula for r in done)
    tail = f" ({formulas} are a printed formula at given numbers)" if formulas else ""
    return f"{len(done)} claims: " + ", ".join(f"{counts[status]} {word}" for status, word in words.items()) + tail


def page(done: Sequence[Reproduced]) -> str:
    """The Markdown page: a table for each technique."""
    from tabulate import tabulate

    from mlsys.claims import rows

    parts = [PAGE, summary(done) + ".\n"]
    for area, group in groupby(sorted(done, key=lambda r: r.claim.area), key=lambda r: r.claim.area):
        table = [{k: v for k, v in row.items() if k != "technique"} for row in rows(list(group))]
        parts.append(f"\n## {area}\n\n{tabulate(table, headers='keys', tablefmt='pipe', disable_numparse=True)}\n")
    return "".join(parts)
