"""`mlsys list`: every technique, its idea, its paper, and what can run it on this machine."""

from __future__ import annotations

import argparse
import json
import shutil
from typing import Any

from mlsys import catalog
from mlsys.commands import UsageError

EXAMPLES = """examples:
  mlsys list                 every technique
  mlsys list attention       those of one package
  mlsys list --json          with all that is known of each, for a program
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = "Every technique: one line, paper, backends, and what of them can run on this machine."
    parser.epilog = EXAMPLES
    parser.add_argument("area", nargs="?", metavar="AREA", help="only this package, e.g. attention")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    found = catalog.techniques()
    if args.area is not None:
        areas = list(dict.fromkeys(technique.package for technique in found))
        if args.area not in areas:
            near = catalog.nearest(args.area, areas)
            remedy = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(areas)}"
            raise UsageError(f"no area {args.area!r}; {remedy}")
        found = [technique for technique in found if technique.package == args.area]
    if args.json:
        print(json.dumps([as_json(technique) for technique in found], indent=2, ensure_ascii=False))
    else:
        print(table(found, width=max(80, min(shutil.get_terminal_size((100, 24)).columns, 140))))
    return 0


def as_json(technique: catalog.Technique) -> dict[str, Any]:
    """All that is known of a technique without importing it, as plain values."""
    paths = ("source", "test", "benchmark", "contract", "docs")
    return {
        "name": technique.name,
        "idea": technique.idea,
        "papers": list(technique.papers),
        "backends": [
            {
                "name": backend.name,
                "source": str(backend.source),
                "usable": backend.unusable is None,
                "devices": {device: {"usable": why is None, "why": why} for device, why in backend.devices.items()},
            }
            for backend in technique.backends
        ],
        **{path: str(found) if (found := getattr(technique, path)) else None for path in paths},
    }


def table(found: list[catalog.Technique], width: int = 100) -> str:
    """The techniques in a table of at most `width` columns, and under it what the backends can run on."""
    from tabulate import tabulate

    rows = [
        [technique.name, technique.idea, technique.paper, ", ".join(map(mark, technique.backends))]
        for technique in found
    ]
    headers = ["technique", "idea", "paper", "backends"]
    longest = [max(len(row[column]) for row in [headers, *rows]) for column in range(4)]
    paper, backends = min(longest[2], 24), min(longest[3], 22)
    room = max(24, width - longest[0] - paper - backends - 3 * 2)  # two blanks between columns
    wrap = [None, min(room, longest[1]), paper, backends]
    text = tabulate(rows, headers, tablefmt="simple", maxcolwidths=wrap, disable_numparse=True)
    lines = [line.rstrip() for line in text.splitlines()]
    backends_by_name = {backend.name: backend for technique in found for backend in technique.backends}
    lines += ["", "backends on this machine (* = not usable here):"]
    lines += [f"  {backend}" for backend in backends_by_name.values()]
    return "\n".join(lines)


def mark(backend: catalog.Backend) -> str:
    """A backend's name, starred if it cannot run here."""
    return backend.name + ("*" if backend.unusable else "")
