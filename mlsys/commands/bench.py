"""`mlsys bench`: check and time techniques beside their peers; print tables, write the report, save the records."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlsys.commands import UsageError
from mlsys.commands.check import seconds

if TYPE_CHECKING:
    from mlsys.bench.core import Benchmark, Case, Settings, Size
    from mlsys.bench.records import Record
    from mlsys.contracts.core import Verdict

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
        "--limit",
        type=seconds,
        default=60.0,
        metavar="S",
        help="seconds that the check of --impl may take, and then each sample of it (60)",
    )
    parser.add_argument(
        "--peer", action="append", metavar="PEER", help="only this peer (repeatable); none for no peers"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", action="append", metavar="DTYPE", help="only cases of this dtype, such as bfloat16")
    parser.add_argument(
        "--data", metavar="FILE", help="on your own vectors: HDF5 as of ann-benchmarks, fvecs, ivecs, bvecs or npy"
    )
    parser.add_argument("--metric", choices=("l2", "ip", "cosine"), help="of --data, where its file does not say (l2)")
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
    """Run the benchmarks that were asked for. Exit status 1 if an implementation was wrong, or yours failed."""
    from mlsys.bench import find

    benches = _select(args, find.names())
    size: Size = "quick" if args.quick or args.smoke else "full" if args.full else "default"
    if args.report:
        _need("matplotlib", "jinja2", what="--report")
        _check_folder(args.report, "--report")
    if args.save and not args.smoke:
        _check_folder(args.results, "--results")
        _check_records(benches, args.results)
    _check_device(args.device)
    plan: list[tuple[Benchmark, Sequence[Case]]] = []
    for bench in benches:
        try:
            chosen = bench.with_peers(args.peer) if args.peer and len(benches) == 1 else bench
            chosen = _on_data(chosen, args, size) if args.data else chosen
            cases = chosen.select(size, args.dtype, args.device)
        except ValueError as error:
            raise UsageError(str(error)) from None
        plan.append((chosen, cases[:1] if args.smoke else cases))
    if args.impl and (verdict := _verdict(benches[0], args)) and not verdict.passed:
        _print_verdict(verdict, args)
        return 1

    records: list[Record] = []
    try:
        _measure(plan, args, size, records)
    finally:  # also when a case fails or the user stops: what was measured is printed and saved
        if _is_first():
            _print(records, as_json=args.json)
            if args.save and not args.smoke:
                from mlsys.bench.records import save

                for path in save(records, args.results):
                    print(f"saved {path}", file=sys.stderr)
    if args.report and _is_first():
        from mlsys.bench import report

        page = report.write(records, args.report)
        print(f"report: {page.resolve()}")
    return 1 if any(r.status in ("wrong", "failed") for r in records) else 0


def _is_first() -> bool:
    """Whether this process is the one to tell: torchrun runs the same command in each of its processes."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0"


def _select(args: argparse.Namespace, known: list[str]) -> list[Benchmark]:
    from mlsys.bench import find

    names = list(dict.fromkeys(_benchmark(name, known) for name in args.names)) or known
    if args.impl and len(names) != 1:
        raise UsageError("--impl needs the one technique it implements: mlsys bench NAME --impl FILE.py:FUNCTION")
    if args.peer and len(names) != 1:
        raise UsageError("--peer needs one technique: mlsys bench NAME --peer PEER")
    if args.metric and not args.data:
        raise UsageError("--metric is of --data: mlsys bench NAME --data FILE --metric METRIC")
    benches = [find.load(name) for name in names]
    if args.data:
        able = [bench for bench in benches if bench.data]
        if args.names and len(able) < len(benches):
            odd = next(bench.name for bench in benches if not bench.data)
            raise UsageError(f"--data: {odd} takes no vectors of yours; leave NAME out to run all that do")
        return able
    return benches


def _on_data(bench: Benchmark, args: argparse.Namespace, size: Size) -> Benchmark:
    """The same benchmark with the cases on the user's file. UsageError if that cannot be read."""
    import dataclasses

    assert bench.data is not None
    try:
        cases = bench.data(args.data, args.metric, size)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"--data {error}") from None
    return dataclasses.replace(bench, cases={**bench.cases, size: cases})


def _benchmark(name: str, known: list[str]) -> str:
    """The benchmark of this name, or of the technique that it is a backend of."""
    from mlsys import catalog

    try:
        return catalog.resolve(name, known, kind="benchmark")
    except LookupError:
        with contextlib.suppress(LookupError):
            technique = catalog.find(name).name
            if technique in known:
                return technique
            raise UsageError(f"{technique} has no benchmark of its own; these have: {', '.join(known)}") from None
        raise


def _verdict(bench: Benchmark, args: argparse.Namespace) -> Verdict | None:
    """What the contract says of the user's function; None if there is no contract."""
    from mlsys.contracts.isolate import check_isolated

    if not bench.contract:
        return None
    try:
        return check_isolated(bench.contract, args.impl, limit_s=args.limit, device=args.device)
    except RuntimeError as broken:  # the check could not be made: neither a pass nor a fail
        raise UsageError(str(broken)) from broken


def _print_verdict(verdict: Verdict, args: argparse.Namespace) -> None:
    """As `mlsys check` prints it."""
    from dataclasses import asdict

    if args.json:
        print(json.dumps({"target": args.impl, "passed": verdict.passed, **asdict(verdict)}, indent=2))
    else:
        print(f"{args.impl} against {verdict}")
    print("not timed: it has to be right first", file=sys.stderr)


def _check_folder(folder: Path, option: str) -> None:
    """That this is a folder or can become one, before anything is measured for it."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UsageError(f"{option} {folder}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {folder}: nothing can be written in {there}")


def _check_records(benches: Sequence[Benchmark], folder: Path) -> None:
    """That the files which new records are merged into can be read."""
    from mlsys.bench import records

    for bench in benches:
        for path in folder.glob(f"*/{bench.name}.jsonl"):
            try:
                records.read(path)
            except ValueError as error:
                raise UsageError(f"--save: {error}") from error


def _need(*modules: str, what: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"{what} needs {module}, which is not installed: pip install 'mlsys-reference[bench]'")


def _check_device(device: str) -> None:
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UsageError("--device cuda: torch finds no CUDA device here; leave --device out to run on the CPU")


def _measure(
    plan: Sequence[tuple[Benchmark, Sequence[Case]]], args: argparse.Namespace, size: Size, records: list[Record]
) -> None:
    """Run the plan, adding to `records` as it goes."""
    from mlsys.bench.core import Settings
    from mlsys.bench.isolate import Stopped

    settings = Settings(size, args.threads, args.device, BUDGET_S[size], args.smoke)
    with _progress(sum(len(cases) for _, cases in plan)) as (announce, advance):
        for bench, cases in plan:
            try:
                for found in _cases(bench, cases, args, settings, announce):
                    records += found
                    advance()
            except Stopped as stop:
                records.append(stop.record)
                print(f"mlsys: {args.impl} is stopped: {stop}", file=sys.stderr)


def _cases(
    bench: Benchmark,
    cases: Sequence[Case],
    args: argparse.Namespace,
    settings: Settings,
    announce: Callable[[str], None],
) -> Iterator[list[Record]]:
    """The records of each case; with the user's function among the implementations, from a process of its own."""
    from mlsys.bench import core, isolate

    if args.impl:
        yield from isolate.run_isolated(bench, cases, args.impl, settings, limit_s=args.limit, announce=announce)
    else:
        for case in cases:
            yield core.run_case(bench, case, settings, announce=announce)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """(announce, advance): a bar on a terminal, a line per case elsewhere, both on stderr."""
    if not _is_first():
        yield (lambda text: None), (lambda: None)
        return
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

    from mlsys.bench import report, tables

    if as_json:
        for record in records:
            print(json.dumps(dataclasses.asdict(record), sort_keys=True))
        return
    for name in dict.fromkeys(r.benchmark for r in records):
        mine = [r for r in records if r.benchmark == name]
        print(f"\n{name}: {report.question(name)}\n\n{tables.detail(mine)}\n\n{tables.where_and_when(mine)}")
