"""`mlsys schedule`: a pipeline schedule's timeline and figures, the library's or your own."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlsys.commands import UsageError

if TYPE_CHECKING:
    from mlsys.parallel.schedules import Schedule, Simulation

EXAMPLES = """examples:
  mlsys schedule 1f1b                                 4 ranks, 8 microbatches
  mlsys schedule 1f1b zb-h1 zbv -p 8 -m 16            one below the other
  mlsys schedule interleaved -v 4 --costs 1,1.2,0.8   F, B and W take so long
  mlsys schedule gpipe 1f1b --plot timelines.svg
  mlsys schedule --file my.py:my_schedule -p 4 -m 8   yours: a function of p and m, or the table itself

`mlsys check parallel.schedules my.py:my_schedule` says whether yours is as good as 1F1B.
"""
SHOWN = ("sequential", "gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zbv")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = (
        "Who does what and when in a step of pipeline parallelism: the simulated timeline, its length, its bubble, and "
        "how many microbatches each rank holds."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SHOWN)}")
    parser.add_argument("-p", type=int, default=4, metavar="N", help="ranks (default 4)")
    parser.add_argument("-m", type=int, default=8, metavar="N", help="microbatches (default 8)")
    parser.add_argument("-v", type=int, default=2, metavar="N", help="chunks a rank, of interleaved (default 2)")
    parser.add_argument(
        "--costs", default="1,1,1", metavar="F,B,W", help="time of each for a microbatch on a rank (default 1,1,1)"
    )
    parser.add_argument("--comm", type=float, default=0.0, metavar="T", help="time of a message (default 0)")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="refuse a schedule of which a rank holds more microbatches"
    )
    parser.add_argument("--file", metavar="FILE.py:NAME", help="your own: a function of p and m, or a table")
    parser.add_argument("--width", type=int, default=120, metavar="N", help="columns (default 120)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them: FILE.svg, .png or .pdf")
    parser.add_argument("--json", action="store_true", help="print the figures and the spans as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the timelines, write the picture."""
    if not args.names and not args.file:
        raise UsageError(f"name a schedule, {', '.join(SHOWN)}, or give yours with --file FILE.py:NAME")
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib, which is not installed: pip install 'mlsys-reference[bench]'")
    f, b, w = _costs(args.costs)
    if args.plot is not None:
        from mlsys.parallel._schedule_plot import check_form

        check_form(args.plot, "--plot")

    from mlsys.parallel.schedules import plot, show, simulate, validate
    from mlsys.perf._checks import known

    for name in args.names:
        known("NAME", name, SHOWN)
    found: dict[str, Simulation] = {}
    for name in [*args.names, *([args.file] if args.file else [])]:
        schedule = _table(name, args)
        validate(schedule, limit=args.limit)
        found[name] = simulate(schedule, f, b, w, args.comm)
    if args.json:
        print(json.dumps({name: _plain(one) for name, one in found.items()}))
    else:
        print("\n\n".join(f"{name}\n{show(one, width=args.width)}" for name, one in found.items()))
    if args.plot is not None:
        plot(found, args.plot)
        print(f"wrote {args.plot}", file=sys.stderr)
    return 0


def _costs(text: str) -> list[float]:
    try:
        costs = [float(word) for word in text.split(",")]
    except ValueError:
        costs = []
    if len(costs) != 3:
        raise UsageError(f"--costs must be three numbers, F,B,W, as 1,1.2,0.8 is; got {text!r}")
    return costs


def _table(name: str, args: argparse.Namespace) -> Schedule:
    """The library's schedule of this name, or what is in someone's file."""
    from mlsys.loading import load_object, raised_at, split
    from mlsys.parallel.schedules import SCHEDULES, interleaved

    if name != args.file:
        return interleaved(args.p, args.m, args.v) if name == "interleaved" else SCHEDULES[name](args.p, args.m)
    table = load_object(name)
    if not callable(table):
        return _as_ops(table)
    try:
        inspect.signature(table).bind(args.p, args.m)
    except TypeError as error:
        raise UsageError(f"{name} cannot be called with p and m: {error}") from None
    try:
        return _as_ops(table(args.p, args.m))
    except Exception as error:
        where = raised_at(error, split(name)[0]) or name
        raise UsageError(f"{where}: {type(error).__name__}: {error}") from error


def _as_ops(table: Any) -> Any:
    """The table with plain tuples (kind, stage, microbatch) as operations; of what else is wrong `validate` tells."""
    from mlsys.parallel.schedules import Op

    if not isinstance(table, Mapping):
        return table
    return {
        rank: [Op(*op) if type(op) is tuple and len(op) == 3 else op for op in ops] if isinstance(ops, list) else ops
        for rank, ops in table.items()
    }


def _plain(one: Simulation) -> dict[str, object]:
    return {
        "makespan": one.makespan,
        "bubble": one.bubble,
        "span_bubble": one.span_bubble,
        "peak": list(one.peak.values()),
        "spans": [[[*op, start, end] for op, start, end in spans] for spans in one.spans.values()],
    }
