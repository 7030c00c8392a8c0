"""`mlsys claims`: recompute the published numbers and print ours beside them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mlsys.commands import UsageError

PAGE = """# Published numbers, reproduced

Written by `make claims`. *Exact*: equal to the digits that the paper printed. *Approximate*: within the claim's stated
tolerance. *Disagrees*: outside it, with the reason. Ours is computed by this library, never from the published value.

"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mlsys claims`."""
    parser.add_argument("area", nargs="?", help="only claims of this technique or package, such as attention")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table to a Markdown page")


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
        write_atomic(args.write, PAGE + tabulate(table, headers="keys", tablefmt="pipe", disable_numparse=True) + "\n")
        print(f"wrote {args.write}")
    else:
        short = [{k: row[k] for k in ("claim", "technique", "published", "ours", "status", "what")} for row in table]
        widths = [None, None, None, None, None, 50]
        print(tabulate(short, headers="keys", tablefmt="simple", maxcolwidths=widths, disable_numparse=True))
    return 1 if any(r.status != r.claim.expected for r in done) else 0
