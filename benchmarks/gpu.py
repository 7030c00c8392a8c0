"""All Triton kernels on one GPU within eight minutes: tested, timed beside their peers, and drawn.

    make gpu                                    or, with options:
    python benchmarks/gpu.py [NAME …] [--within SECONDS] [--results FOLDER] [--report FOLDER]

1. The tests that need a GPU, and those of the Triton kernels, which are compiled where there is one.
2. The benchmarks in which a Triton kernel takes part, in their quick size, each in a process of its own: every
   implementation is checked against the reference, then timed. A case's records are saved when it is done.
3. A page with their tables and plots.

The time is kept by this process, not hoped for: tests and each benchmark have a share of what is left, what one does
not use is the next one's, and a process that is not done by then is ended. What there was no time for is named.

A peer that cannot do a case is left out of it, and named. Exit status: 0 if all was done, and was right; 1 if not; 2
where there is no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from mlsys import catalog
from mlsys.bench import find, report, tables
from mlsys.bench.core import Benchmark, Case, Settings, blank, describe, run_case
from mlsys.bench.records import Record, from_json, save
from mlsys.commands.bench import BUDGET_S
from mlsys.commands.tune import modules
from mlsys.loading import one_line

ROOT = Path(__file__).resolve().parents[1]
WITHIN_S = 480.0
TESTS = 0.3  # of the time, at most
REPORT_S = 20.0
# torch.compile's caches on disk cannot name functions of a benchmark's file, and would warn of each
NO_CACHES = {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
ON_GPU = Settings("quick", 1, "cuda", BUDGET_S["quick"])


def main(words: Sequence[str] | None = None) -> int:
    """Test, measure and report."""
    parser = argparse.ArgumentParser(prog="gpu.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these benchmarks, such as attention.flash")
    parser.add_argument("--within", type=float, default=WITHIN_S, metavar="S", help="seconds for all (%(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="FOLDER", help="where records go")
    parser.add_argument("--report", type=Path, default=Path("report"), metavar="FOLDER", help="where the page goes")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument("--case-by-case", action="store_true", help=argparse.SUPPRESS)  # what it starts itself with
    args = parser.parse_args(words)
    end = time.monotonic() + args.within
    why = catalog.devices("torch")["cuda"]
    if why is not None:
        print(
            f"gpu.py: this needs an NVIDIA GPU: {why}. Without one, `make test` runs the Triton kernels under the "
            "interpreter and compiles them, and `make bench` times what runs on the CPU",
            file=sys.stderr,
        )
        return 2
    results, page = args.results.absolute(), args.report.absolute()
    if args.case_by_case:
        return 1 if measure(find.load(args.names[0]), end, results) else 0
    for module in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(module) is None:
            parser.error(f"the report needs {module}, which is not installed: pip install 'mlsys-reference[bench]'")
    unknown = sorted(set(args.names) - set(known := with_triton()))
    if unknown:
        parser.error(f"{unknown[0]} is no benchmark with a Triton kernel; these are: {', '.join(known)}")
    amiss = [] if args.no_tests else tests((end - time.monotonic() - REPORT_S) * TESTS)
    records, more = benchmarks({name: known[name] for name in args.names or known}, end - REPORT_S, results)
    amiss += more
    if records:
        for name in dict.fromkeys(r.benchmark for r in records):
            mine = [r for r in records if r.benchmark == name]
            print(f"\n{name}: {report.question(name)}\n\n{tables.detail(mine)}\n\n{tables.where_and_when(mine)}")
        print(f"\nreport: {report.write(records, page)}")
    for text in amiss:
        print(f"gpu.py: {text}", file=sys.stderr)
    return 1 if amiss else 0


def candidates() -> list[str]:
    """The benchmarks of techniques with Triton kernels."""
    return sorted({"kernels.triton", *modules()} & set(find.names()))


def with_triton() -> dict[str, Benchmark]:
    """Those of them in which a Triton kernel takes part on a GPU."""
    found = {}
    for name in candidates():
        bench = find.load(name)
        impls = [impl for implementation, impl in bench.impls.items() if "triton" in implementation]
        if any(impl.only(case) for impl in impls for case in cases(bench)):
            found[name] = bench
    return found


def cases(bench: Benchmark) -> list[Case]:
    """Its cases for a GPU, of the quick size."""
    return bench.select("quick", device="cuda")


def tests(limit_s: float) -> list[str]:
    """Run the tests; what is amiss."""
    files = [
        file
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        if not file.stem.startswith("test_compiled")
        and (file.stem.endswith("_triton") or "mark.gpu" in file.read_text(encoding="utf-8"))
    ]
    if not files:
        return [f"there are no tests beside {ROOT}: run this in a checkout"]
    words = [sys.executable, "-m", "pytest", "-k", "triton or gpu", *map(str, files)]
    if importlib.util.find_spec("xdist"):
        words += ["-n", "logical", "--maxprocesses", "8", "--dist", "load"]
    status = ended(words, limit_s)
    if status is None:
        return [f"the tests were not done after {limit_s:.0f} s"]
    return [f"tests failed: pytest ended with {status}"] if status else []


def benchmarks(chosen: dict[str, Benchmark], end: float, results: Path) -> tuple[list[Record], list[str]]:
    """Measure these, one after the other; their records, and what is amiss."""
    records, amiss = [], []
    shares = {name: 1.0 + len(cases(bench)) for name, bench in chosen.items()}  # starting takes as long as a case
    for name, share in list(shares.items()):
        left = max(end - time.monotonic(), 0.0)
        limit_s = left * share / sum(shares.values())
        del shares[name]
        words = [sys.executable, __file__, name, "--case-by-case", "--within", str(limit_s), "--results", str(results)]
        with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
            status = ended(words, limit_s, out)
            out.seek(0)
            lines = [line for line in out if line.startswith("{") and line.endswith("}\n")]
        mine = [from_json(json.loads(line)) for line in lines]
        done = [r.case for r in mine]
        missing = [describe(case) for case in cases(chosen[name]) if case not in done]
        amiss += [f"{name}: not measured in {limit_s:.0f} s: {text}" for text in missing]
        amiss += [f"{name}: {r.impl} is {r.status}, {describe(r.case)}: {r.note}" for r in mine if bad(r)]
        if status and not missing and not any(map(bad, mine)):
            amiss.append(f"{name}: ended with {status}")
        records += mine
    return records, amiss


def bad(record: Record) -> bool:
    """Whether an implementation of ours was wrong, or failed; a peer may, and is only named in the table."""
    return record.role != "peer" and record.status in ("wrong", "failed")


def ended(words: Sequence[str], limit_s: float, out: IO[str] | None = None) -> int | None:
    """Run a command; its exit status, or None if it was not done in time and was ended, with all that it started."""
    process = subprocess.Popen(words, stdout=out, cwd=ROOT, env=os.environ | NO_CACHES, start_new_session=True)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def measure(bench: Benchmark, end: float, results: Path, settings: Settings = ON_GPU) -> bool:
    """Print and save the records of each case for a GPU, until the time is up; whether anything is amiss."""
    amiss = False
    for case in cases(bench):
        if time.monotonic() >= end:
            return True
        records = attempt(bench, case, settings)
        amiss = amiss or any(map(bad, records))
        for record in records:
            print(json.dumps(dataclasses.asdict(record), sort_keys=True), flush=True)
        save(records, results)
        gc.collect()  # what one case held is memory for the next
    return amiss


def attempt(bench: Benchmark, case: Case, settings: Settings) -> list[Record]:
    """The records of a case. An implementation that raises is left out, and the case begun again without it."""
    failed: list[Record] = []
    while True:
        turn = [bench.reference]
        try:
            found = run_case(bench, case, settings, announce=announce, watch=turn.append)
        except Exception as error:
            name = turn[-1]
            note = f"raised {one_line(error)}"
            announce(f"{bench.name}  {name} {note}")
            base = blank(bench, case, settings)
            role = bench.impls[name].role
            failed.append(dataclasses.replace(base, impl=name, role=role, status="failed", note=note))
            if name == bench.reference:
                return failed
            others = {other: impl for other, impl in bench.impls.items() if other != name}
            bench = dataclasses.replace(bench, impls=others)
        else:
            return found + failed
        gc.collect()


def announce(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
