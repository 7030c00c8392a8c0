"""`mlsys bench`: check and time techniques beside their peers; print tables, write the report, save the records."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mlsys.commands import UsageError

if TYPE_CHECKING:
    from mlsys.bench.core import Benchmark, Case, Size
    from mlsys.bench.records import Record

BUDGET_S = {
    "quick": 1.2,
    "default": 3.0,
    "full": 6.0,
}  # timing per case; a slow case takes longer: five rounds at least


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mlsys bench`."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="techniques (attention.flash); all if none is named")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small sizes, a laptop minute each")
    size.add_argument("--full", action="store_true", help="all sizes")
    size.add_argument("--smoke", action="store_true", help="the first quick case once, checked but not timed")
    parser.add_argument("--impl", metavar="FILE.py:FUNCTION", help="your implementation, in the same table (one NAME)")
    parser.add_argument(
        "--peer", action="append", metavar="PEER", help="only this peer (repeatable); none for no peers"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", action="append", metavar="DTYPE", help="only cases of this dtype, such as bfloat16")
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="pin torch, BLAS and numba to N (default 1)"
    )
    parser.add_argument("--save", action="store_true", help="merge the records into results/<machine>/")
    parser.add_argument(
        "--results", type=Path, default=Path("results"), metavar="FOLDER", help="where --save puts them"
    )
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="write FOLDER/index.html, one self-contained page"
    )
    parser.add_argument("--json", action="store_true", help="print the records as JSON lines instead of tables")


def run(args: argparse.Namespace) -> int:
    """Run the benchmarks that were asked for. Exit status 1 if an implementation was wrong."""
    from mlsys.bench import find

    benches = _select(args, find.names())
    size: Size = "quick" if args.quick or args.smoke else "full" if args.full else "default"
    if args.report:
        _need("matplotlib", "jinja2", what="--report")
    _check_device(args.device)
    plan: list[tuple[Benchmark, Case]] = []
    for bench in benches:
        try:
            chosen = bench.with_peers(args.peer) if args.peer and len(benches) == 1 else bench
            cases = chosen.select(size, args.dtype)
        except ValueError as error:
            raise UsageError(str(error)) from None
        plan += [(chosen, case) for case in (cases[:1] if args.smoke else cases)]
    records: list[Record] = []
    try:
        _measure(plan, args, size, records)
    finally:  # also when a case fails or the user stops: what was measured is printed and saved
        _print(records, as_json=args.json)
        if args.save and not args.smoke:
            from mlsys.bench.records import save

            for path in save(records, args.results):
                print(f"saved {path}", file=sys.stderr)
    if args.report:
        from mlsys.bench import report

        page = report.write(records, args.report)
        print(f"report: {page.resolve()}")
    return 1 if any(r.status == "wrong" for r in records) else 0


def _select(args: argparse.Namespace, known: list[str]) -> list[Benchmark]:
    from mlsys.bench import find
    from mlsys.catalog import resolve

    names = [resolve(name, known, kind="benchmark") for name in args.names] or known
    if args.impl and len(names) != 1:
        raise UsageError("--impl needs the one technique it implements: mlsys bench NAME --impl FILE.py:FUNCTION")
    if args.peer and len(names) != 1:
        raise UsageError("--peer needs one technique: mlsys bench NAME --peer PEER")
    benches = [find.load(name) for name in names]
    if args.impl:
        benches = [_with_user_impl(benches[0], args.impl)]
    return benches


def _with_user_impl(bench: Benchmark, target: str) -> Benchmark:
    """Check the user's function against the contract, in a process that can be killed, before it is timed."""
    from mlsys.contracts.isolate import check_isolated
    from mlsys.loading import load_function

    if bench.contract:
        verdict = check_isolated(bench.contract, target)
        if not verdict.passed:
            raise UsageError(f"{target} is not timed, for it is not right yet.\n{verdict}")
    return bench.with_impl("yours", load_function(target))


def _need(*modules: str, what: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"{what} needs {module}, which is not installed: pip install 'mlsys-reference[bench]'")


def _check_device(device: str) -> None:
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UsageError("--device cuda: torch finds no CUDA device here; leave --device out to run on the CPU")


def _measure(plan: list[tuple[Benchmark, Case]], args: argparse.Namespace, size: Size, records: list[Record]) -> None:
    """Run the plan, adding to `records` as it goes."""
    from mlsys.bench.core import run as run_benchmark

    with _progress(len(plan)) as (announce, advance):
        for bench, case in plan:
            records += run_benchmark(
                bench,
                [case],
                size=size,
                n_threads=args.threads,
                device=args.device,
                budget_s=BUDGET_S[size],
                smoke=args.smoke,
                announce=announce,
            )
            advance()


@contextlib.contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """(announce, advance): a bar on a terminal, a line per case elsewhere, both on stderr."""
    if sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("starting", total=total)
            yield (lambda text: bar.update(task, description=text)), (lambda: bar.advance(task))
        return
    done = 0

    def announce(text: str) -> None:
        print(f"[{done + 1}/{total}] {text}", file=sys.stderr, flush=True)

    def advance() -> None:
        nonlocal done
        done += 1

    yield announce, advance


def _print(records: list[Record], *, as_json: bool) -> None:
    import dataclasses
    import json

    from mlsys.bench import report, tables

    if as_json:
        for record in records:
            print(json.dumps(dataclasses.asdict(record), sort_keys=True))
        return
    for name in dict.fromkeys(r.benchmark for r in records):
        mine = [r for r in records if r.benchmark == name]
        print(f"\n{name}: {report.question(name)}\n\n{tables.detail(mine)}\n\n{tables.where_and_when(mine)}")
