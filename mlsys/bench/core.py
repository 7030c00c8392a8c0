"""A benchmark is a value: one question, its cases, the work they are, and who does it.

    bench = Benchmark(__file__, cases=…, inputs=…, work=…, impls={"naive": …, "torch sdpa": …}, …)

The file that holds it is the entry: `mlsys bench` finds it, and it runs by
itself with the same options. Every implementation is **checked** against the
reference on the very inputs it will be timed on, **then timed**, in turn with
all others (`mlsys.bench.timing`). Each row then says how it stands to the
reference, to the fastest production peer on the same work, and to the limit of
this machine (`mlsys.bench.machine`).
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlsys.bench import machine as machines
from mlsys.bench.memory import peak_bytes
from mlsys.bench.records import Record
from mlsys.bench.timing import Sample, interleave, ratio

Case = Mapping[str, Any]
Size = Literal["quick", "default", "full"]
SIZES: tuple[Size, ...] = ("quick", "default", "full")


@dataclass(frozen=True)
class Work:
    """What any implementation must spend on a case: FLOPs and bytes moved; `items` of a `unit` for a throughput."""

    flops: float
    bytes: float
    items: float = 0.0
    unit: str = ""


@dataclass(frozen=True)
class Impl:
    """One implementation: how to get the function (imported only when it runs), and what it is.

    role:  "reference" (the readable one that others are checked against), "ours", "peer", or "yours".
    needs: the module that must be importable, for peers that come with an extra.
    only:  the cases it takes part in.
    """

    load: Callable[[], Callable[..., Any]]
    role: Literal["reference", "ours", "peer", "yours"]
    needs: str | None = None
    only: Callable[[Case], bool] = lambda case: True

    @property
    def missing(self) -> str | None:
        """Why it cannot run here and what to do about it, or None."""
        if self.needs is None or importlib.util.find_spec(self.needs) is not None:
            return None
        return f"{self.needs} is not installed: pip install 'mlsys-reference[bench]'"


@dataclass(frozen=True)
class Plot:
    """What the picture shows: `y` over `x`, one panel for each value of `panel`; a time is divided by case[`per`]."""

    x: str
    xlabel: str
    panel: tuple[str, ...] = ()
    y: Literal["time", "memory", "throughput"] = "time"
    per: str | None = None
    only: Callable[[Case], bool] = lambda case: True


@dataclass(frozen=True)
class Benchmark:
    """One question about one technique.

    file:     `__file__`: its folder and stem are the benchmark's name.
    cases:    size → cases; the first quick case must run in a second or so (`--smoke` runs only that).
    inputs:   (case, device) → inputs, from an explicit seed; random data, never zeros.
    work:     (case, inputs) → Work.
    impls:    name → Impl, exactly one of them the reference.
    subject:  the implementation that the summary is about.
    prepare:  (function, case, inputs) → a call without arguments: what is timed.
    verify:   (case, inputs, got, want) → (error, largest error allowed).
    figures:  (case, inputs, prepared call's result) → further figures, such as recall.
    contract: the contract that a `--impl` must pass before it is timed.
    """

    file: str
    cases: Mapping[Size, Sequence[Case]]
    inputs: Callable[[Case, str], Any]
    work: Callable[[Case, Any], Work]
    impls: Mapping[str, Impl]
    subject: str
    prepare: Callable[[Callable[..., Any], Case, Any], Callable[[], Any]]
    verify: Callable[[Case, Any, Any, Any], tuple[float, float]]
    figures: Callable[[Case, Any, Any], dict[str, float]] = lambda case, inputs, got: {}
    contract: str | None = None
    memory: bool = False
    plots: Sequence[Plot] = field(default_factory=tuple)

    @property
    def name(self) -> str:
        """`attention.flash`, from where the file lies."""
        path = Path(self.file)
        return f"{path.parent.name}.{path.stem}"

    @property
    def reference(self) -> str:
        """The implementation that the others are checked against."""
        return next(name for name, impl in self.impls.items() if impl.role == "reference")

    def main(self) -> None:
        """Run this benchmark alone, with the options of `mlsys bench`."""
        import sys

        from mlsys.cli import main

        sys.exit(main(["bench", self.name, *sys.argv[1:]]))

    def with_impl(self, name: str, function: Callable[..., Any]) -> Benchmark:
        """The same benchmark with one more implementation, the user's."""
        return dataclasses.replace(self, impls={**self.impls, name: Impl(lambda: function, "yours")})

    def with_peers(self, wanted: Sequence[str]) -> Benchmark:
        """The same benchmark with only these peers; `["none"]` leaves none. ValueError for a peer it has not."""
        peers = [name for name, impl in self.impls.items() if impl.role == "peer"]
        unknown = [name for name in wanted if name not in [*peers, "none"]]
        if unknown:
            raise ValueError(f"--peer {unknown[0]}: {self.name} has the peers {', '.join(peers)} (or none)")
        kept = {n: i for n, i in self.impls.items() if i.role != "peer" or n in wanted}
        return dataclasses.replace(self, impls=kept)

    def select(self, size: Size, dtypes: Sequence[str] | None = None) -> list[Case]:
        """The cases of a size, of these dtypes only where dtypes are given."""
        cases = list(self.cases[size])
        if dtypes:
            cases = [case for case in cases if case.get("dtype", dtypes[0]) in dtypes]
            if not cases:
                known = sorted({c["dtype"] for c in self.cases[size] if "dtype" in c})
                raise ValueError(f"--dtype {dtypes[0]}: {self.name} has cases in {', '.join(known)}")
        return cases


def run(
    bench: Benchmark,
    cases: Iterable[Case],
    *,
    size: Size = "default",
    n_threads: int = 1,
    device: str = "cpu",
    budget_s: float = 3.0,
    smoke: bool = False,
    announce: Callable[[str], None] = lambda text: None,
) -> list[Record]:
    """Check and time every implementation on every case; `announce` is told before each."""
    records: list[Record] = []
    with machines.threads(n_threads):
        for case in cases:
            announce(f"{bench.name}  {describe(case)}")
            records += _run_case(bench, case, size, n_threads, device, budget_s, smoke, announce)
    return records


def describe(case: Case) -> str:
    """A case on one line: `n=2048 bfloat16 causal`. Text stands for itself; what is off is left out."""
    words = [k if v is True else v if isinstance(v, str) else f"{k}={v}" for k, v in case.items()]
    return " ".join(w for w, v in zip(words, case.values(), strict=True) if v is not False and v is not None)


def _run_case(
    bench: Benchmark,
    case: Case,
    size: Size,
    n_threads: int,
    device: str,
    budget_s: float,
    smoke: bool,
    announce: Callable[[str], None],
) -> list[Record]:
    inputs = bench.inputs(case, device)
    work = bench.work(case, inputs)
    limits = None if smoke else machines.limits(case.get("dtype", "float32"), n_threads, device)
    machine = machines.this_machine()
    base = Record(
        benchmark=bench.name,
        case=dict(case),
        impl="",
        role="",
        status="smoke" if smoke else "ok",
        flops=work.flops,
        bytes=work.bytes,
        items=work.items,
        unit=work.unit,
        device=device,
        threads=n_threads,
        size=size,
        machine={**dataclasses.asdict(machine), "slug": machine.slug},
        commit=machines.commit(),
        load=machines.load(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
    records: dict[str, Record] = {}
    calls: dict[str, Callable[[], Any]] = {}
    want: Any = None
    order = sorted(
        bench.impls, key=lambda name: name != bench.reference
    )  # the reference first: others are checked by it
    for name in order:
        impl = bench.impls[name]
        if not impl.only(case):
            continue
        records[name] = dataclasses.replace(base, impl=name, role=impl.role)
        if impl.missing:
            records[name] = dataclasses.replace(records[name], status="missing", note=impl.missing)
            continue
        call = bench.prepare(impl.load(), case, inputs)
        try:
            got = call()
            want = got if name == bench.reference else want
            error, allowed = bench.verify(case, inputs, got, want)
            note = "" if error <= allowed else f"error {error:.3g} is above the {allowed:.2g} allowed"
        except Exception as failure:
            if impl.role != "yours":
                raise
            error, note = None, f"{type(failure).__name__}: {failure}"
        if note:
            records[name] = dataclasses.replace(records[name], status="wrong", note=note, error=error)
            announce(f"{bench.name}  {name} is wrong, so it is not timed: {note}")
            continue
        records[name] = dataclasses.replace(records[name], error=error, figures=bench.figures(case, inputs, got))
        calls[name] = call
    if smoke:
        return list(records.values())

    assert limits is not None
    samples = interleave(calls, budget_s=budget_s, device=device)
    peers = [name for name in samples if bench.impls[name].role == "peer"]
    peer = min(peers, key=lambda name: samples[name].median, default=None)
    for name, sample in samples.items():
        peak = peak_bytes(calls[name], device) if bench.memory else None
        records[name] = dataclasses.replace(
            records[name],
            status="noisy" if sample.noisy else "ok",
            seconds=sample.median,
            quartiles=sample.quartiles,
            runs=len(sample.seconds),
            ratio_to_reference=_ratio(samples, name, bench.reference),
            ratio_to_peer=_ratio(samples, name, peer),
            peer=peer,
            share=limits.seconds(work.flops, work.bytes) / sample.median,
            bound="compute" if work.flops / limits.flops >= work.bytes / limits.bandwidth else "memory",
            limit_flops=limits.flops,
            limit_bandwidth=limits.bandwidth,
            peak_bytes=peak,
        )
    return list(records.values())


def _ratio(samples: Mapping[str, Sample], name: str, other: str | None) -> float | None:
    return None if other is None or other not in samples else ratio(samples[name], samples[other])
