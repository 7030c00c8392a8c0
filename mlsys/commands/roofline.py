"""`mlsys roofline`: saved measurements under the roof of the machine they were taken on."""

from __future__ import annotations

import argparse
import importlib.util
import io
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mlsys.commands import UsageError
from mlsys.perf._checks import amount

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mlsys.bench.plots import Roof
    from mlsys.bench.records import Record

PREFERRED = ("bfloat16", "float16", "int8", "float32")  # the dtype of a machine that is named without one
HERE = "this"  # the name that stands for the machine that runs this

EXAMPLES = """examples:
  mlsys roofline                                        what is saved in results/, as a table
  mlsys roofline --out roofline.svg                     ... and as a picture
  mlsys roofline mine.jsonl --machine h100 --out a.png  beside the roof of an H100
  mlsys roofline --machine this:float32                 measure this machine

`mlsys bench NAME --json > mine.jsonl` writes such records.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = (
        "The roofline: each measurement by its arithmetic intensity (FLOP per byte that must move) and its FLOP/s, "
        "under what its machine can reach at that intensity. Prints the roofs and how near each implementation comes."
    )
    parser.epilog = EXAMPLES
    parser.add_argument(
        "records", nargs="*", type=Path, metavar="RECORDS", help="files of records, or folders (default: results/)"
    )
    parser.add_argument(
        "--machine",
        action="append",
        default=[],
        metavar="NAME[:DTYPE]",
        help=f"add a published machine's roof, such as h100 or a100-80:tf32; {HERE!r} measures this one (repeatable)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="draw the picture: FILE.svg or FILE.png")


def run(args: argparse.Namespace) -> int:
    """Print the tables, write the picture."""
    if args.out is not None and args.out.suffix not in (".svg", ".png"):
        raise UsageError(f"--out {args.out}: the name must end in .svg or .png")
    if args.out is not None and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--out needs matplotlib, which is not installed: pip install 'mlsys-reference[bench]'")
    others = [_roof(text) for text in args.machine]
    records = _read(args.records, needed=not others)

    from mlsys.bench import plots
    from mlsys.files import write_atomic

    measured = plots.roofs(records)
    if not measured and not others:
        raise UsageError("the records hold no timed measurement; `mlsys bench NAME --save` makes some")
    print(_tables(measured, others))
    if args.out is not None:
        figure = plots.roofline_figure(records, others)
        assert figure is not None
        write_atomic(args.out, plots.to_svg(figure) if args.out.suffix == ".svg" else _png(figure))
        print(f"wrote {args.out}", file=sys.stderr)
    return 0


def _roof(text: str) -> Roof:
    """The roof that `--machine NAME[:DTYPE]` asks for."""
    from mlsys.bench.plots import published_roof
    from mlsys.perf.hardware import find, this_machine

    name, _, dtype = text.partition(":")
    try:
        if name == HERE:
            dtype = dtype or "float32"
            return published_roof(this_machine((dtype,)), dtype)
        machine = find(name)
        return published_roof(machine, dtype or next(d for d in PREFERRED if d in machine.peak))
    except (LookupError, ValueError) as error:
        raise UsageError(f"--machine {text}: {error}") from None


def _read(paths: list[Path], *, needed: bool) -> list[Record]:
    """The records of these files and folders; without any, of the checkout's results/."""
    from mlsys.bench import records

    if not paths:
        checkout = Path(__file__).resolve().parents[2]
        paths = [next((p for p in (Path("results"), checkout / "results") if p.is_dir()), Path("results"))]
        if not paths[0].is_dir():
            if not needed:
                return []
            raise UsageError("no folder results/ here: name files of records, or save some with `mlsys bench --save`")
    found: list[Record] = []
    for path in paths:
        files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise UsageError(f"{path} holds no .jsonl file of records")
        for file in files:
            for number, record in enumerate(records.read(file), 1):
                _check(record, f"{file}:{number}")
                found.append(record)
    return found


def _check(record: Record, where: str) -> None:
    """Refuse figures that no measurement has: a share computed from them would be no number, or a wrong one."""
    for name in ("seconds", "limit_flops", "limit_bandwidth", "flops", "bytes"):
        value, counted = getattr(record, name), name in ("flops", "bytes")  # 0: not counted. None: not measured
        if value is None and not counted:
            continue
        try:
            amount(name, value, positive=not counted)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{where}: {error}; mend or remove the record of {record.impl!r}") from None


def _tables(measured: list[tuple[Roof, list[Record]]], others: list[Roof]) -> str:
    """The roofs, and how near each implementation comes to its own."""
    from tabulate import tabulate

    from mlsys.bench import tables

    everything = [roof for roof, _ in measured] + others
    lines = [
        (r.label, tables.amount(r.peak, "FLOP/s"), tables.amount(r.bandwidth, "B/s"), _ridge(r.ridge))
        for r in everything
    ]
    text = str(tabulate(lines, headers=("roof", "peak", "bandwidth", "ridge (FLOP/B)"), disable_numparse=True))
    rows = []
    for roof, group in measured:
        for benchmark, impl in dict.fromkeys((r.benchmark, r.impl) for r in group):
            mine = [r for r in group if (r.benchmark, r.impl) == (benchmark, impl)]
            shares = [_share(r, roof) for r in mine]
            left = sum(r.flops / r.bytes < roof.ridge for r in mine)
            rows.append(
                (
                    roof.label,
                    benchmark,
                    impl,
                    str(len(mine)),
                    f"{left} : {len(mine) - left}",
                    tables.percent(statistics.median(shares)),
                    tables.percent(max(shares)),
                )
            )
    if rows:
        titles = ("roof", "benchmark", "implementation", "cases", "memory : compute", "median share", "best")
        text += f"\n\n{tabulate(rows, headers=titles, disable_numparse=True)}"
    return text


def _ridge(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _share(record: Record, roof: Roof) -> float:
    """The achieved FLOP/s over what the roof allows at this intensity."""
    assert record.seconds
    return record.flops / record.seconds / min(roof.peak, record.flops / record.bytes * roof.bandwidth)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
