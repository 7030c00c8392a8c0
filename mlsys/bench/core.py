"""A benchmark is a value: one question, its cases, the work they are, and who does it.

    bench = Benchmark(__file__, cases=…, inputs=…, work=…, impls={"naive": …, "torch sdpa": …}, …)

The file that holds it is the entry: `mlsys bench` finds it, and it runs by
itself with the same options. Every implementation is **checked** against the
reference on the very inputs it will be timed on, **then timed**, in turn with
all others (`mlsys.bench.timing`), and the user's own is looked at once more
afterwards (`mlsys.bench.trial`). Each row then says how it stands to the
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
from mlsys.bench.records import Record
from mlsys.bench.timing import Everyone, Sample, alone, ratio
from mlsys.bench.trial import Refused, Trial

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

    role:  "reference" (the readable one that others are checked against), "ours", "variant" (ours too, but a step on
           the way: it has a time in the summary, and no columns of its own), "peer", or "yours".
    needs: the module that must be importable, for peers that come with an extra; install: what pip installs it by.
    only:  the cases it takes part in.
    source: "FILE.py:FUNCTION" of the user's, from which other processes can load it too.
    """

    load: Callable[[], Callable[..., Any]]
    role: Literal["reference", "ours", "variant", "peer", "yours"]
    needs: str | None = None
    only: Callable[[Case], bool] = lambda case: True
    source: str | None = None
    install: str = "'mlsys-reference[bench]'"

    @property
    def missing(self) -> str | None:
        """Why it cannot run here and what to do about it, or None."""
        if self.needs is None or importlib.util.find_spec(self.needs) is not None:
            return None
        return f"{self.needs} is not installed: pip install {self.install}"


@dataclass(frozen=True)
class Plot:
    """What the picture shows: `y` over `x`, one panel for each value of `panel`; a time is divided by case[`per`].

    Without an `x` each implementation is a bar, so a panel holds one case. "speedup" is the
    fastest peer's time over this one's, as far as neither is noise; "roofline" puts every case under the roof of its
    machine instead.
    """

    x: str = ""
    xlabel: str = ""
    panel: tuple[str, ...] = ()
    y: Literal["time", "speedup", "memory", "throughput", "roofline"] = "time"
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
    prepare:  (function, case, inputs) → a call without arguments: what is timed. One that works in place has a method
              `reset`, which is called before each sample and each further check, and is in no time.
    compared: the cases in which the reference does the same work as the others; elsewhere it only checks them, and no
              "÷ reference" is said.
    yours:    the cases that a user's function takes part in: it need not do all that ours do.
    verify:   (case, inputs, got, want) → (error, largest error allowed).
    figures:  (case, inputs, prepared call's result) → further figures, such as recall.
    series:   the same → what is no single number, such as a loss curve: lists that JSON can hold.
    ranks:    case → on how many processes it runs together (None: in this one); see `mlsys.bench.ranks`.
    contract: the contract that a `--impl` must pass before it is timed.
    memory:   whether to measure the peak memory of a call.
    counted:  (implementation, device) → whether its time would say nothing, as that of a GPU's kernel on a processor
              does not: it is checked and has its figures, but no time.
    fits:     (case, device) → whether a case is for this device; some sizes are for a GPU only.
    plots:    what the pictures show; `pictures` are further ones: name → (records → SVG, or None with nothing to draw).
    budget_s: seconds for the rounds of a case, where a call takes so long that the usual ones hold too few; not with
              --quick.
    data:     (path, metric or None, size) → the cases on a file of the user's, for `--data`; None: it takes none.
    stateful: whether a call goes on from the last, as training steps do; else each gives the same result. Then the
              n-th call of one is verified against the n-th of the reference, and no call is repeated in a sample.
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
    series: Callable[[Case, Any, Any], dict[str, list[Any]]] = lambda case, inputs, got: {}
    compared: Callable[[Case], bool] = lambda case: True
    yours: Callable[[Case], bool] = lambda case: True
    ranks: Callable[[Case], int] | None = None
    contract: str | None = None
    budget_s: float = 0.0
    data: Callable[[str, str | None, Size], Sequence[Case]] | None = None
    stateful: bool = False
    memory: bool = False
    counted: Callable[[str, str], bool] = lambda impl, device: False
    fits: Callable[[Case, str], bool] = lambda case, device: True
    plots: Sequence[Plot] = field(default_factory=tuple)
    pictures: Mapping[str, Callable[[Sequence[Record]], str | None]] = field(default_factory=dict)

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

    def with_impl(self, name: str, function: Callable[..., Any], source: str | None = None) -> Benchmark:
        """The same benchmark with one more implementation, the user's; on ranks they load it from its `source`."""
        mine = Impl(lambda: function, "yours", only=self.yours, source=source)
        return dataclasses.replace(self, impls={**self.impls, name: mine})

    def with_peers(self, wanted: Sequence[str]) -> Benchmark:
        """The same benchmark with only these peers; `["none"]` leaves none. ValueError for a peer it has not."""
        peers = [name for name, impl in self.impls.items() if impl.role == "peer"]
        unknown = [name for name in wanted if name not in [*peers, "none"]]
        if unknown:
            raise ValueError(f"--peer {unknown[0]}: {self.name} has the peers {', '.join(peers)} (or none)")
        kept = {n: i for n, i in self.impls.items() if i.role != "peer" or n in wanted}
        return dataclasses.replace(self, impls=kept)

    def select(self, size: Size, dtypes: Sequence[str] | None = None, device: str = "cpu") -> list[Case]:
        """The cases of a size for a device, of these dtypes only where dtypes are given."""
        cases = [case for case in self.cases[size] if self.fits(case, device)]
        if dtypes:
            cases = [case for case in cases if case.get("dtype", dtypes[0]) in dtypes]
            if not cases:
                known = sorted({c["dtype"] for c in self.cases[size] if "dtype" in c})
                raise ValueError(f"--dtype {dtypes[0]}: {self.name} has cases in {', '.join(known)}")
        return cases


@dataclass(frozen=True)
class Settings:
    """How cases are measured: on which device and how many threads, how long each is timed, or (`smoke`) not at all."""

    size: Size = "default"
    n_threads: int = 1
    device: str = "cpu"
    budget_s: float = 3.0
    smoke: bool = False


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
    settings = Settings(size, n_threads, device, budget_s, smoke)
    return [record for case in cases for record in run_case(bench, case, settings, announce=announce)]


def run_case(
    bench: Benchmark,
    case: Case,
    settings: Settings,
    *,
    announce: Callable[[str], None] = lambda text: None,
    watch: Callable[[str], None] = lambda name: None,
) -> list[Record]:
    """Check and time every implementation on one case.

    `watch` is told whose code runs next, before each sample and outside the time that is taken.
    """
    announce(f"{bench.name}  {describe(case)}")
    if bench.ranks is not None:
        from mlsys.bench import ranks

        return ranks.run_case(bench, case, settings, announce=announce, watch=watch)
    with machines.threads(settings.n_threads):
        limits = limits_for(case, settings)
        return measure(bench, case, settings, blank(bench, case, settings), limits, announce, watch)


def describe(case: Case) -> str:
    """A case on one line: `n=2048 bfloat16 causal`. Text stands for itself; what is off is left out."""
    words = [k if v is True else v if isinstance(v, str) else f"{k}={v}" for k, v in case.items()]
    return " ".join(w for w, v in zip(words, case.values(), strict=True) if v is not False and v is not None)


def blank(bench: Benchmark, case: Case, settings: Settings) -> Record:
    """A record of this case with all that is known before anything has run: machine, versions, commit, date."""
    machine = machines.this_machine()
    return Record(
        benchmark=bench.name,
        case=dict(case),
        impl="",
        role="",
        status="smoke" if settings.smoke else "ok",
        device=settings.device,
        threads=settings.n_threads,
        size=settings.size,
        machine={**dataclasses.asdict(machine), "slug": machine.slug},
        commit=machines.commit(),
        load=machines.load(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def limits_for(case: Case, settings: Settings, n_threads: int | None = None) -> machines.Limits | None:
    """What this machine can do with a case's dtype and so many threads; None where nothing is timed."""
    if settings.smoke:
        return None
    return machines.limits(case.get("dtype", "float32"), n_threads or settings.n_threads, settings.device)


def measure(
    bench: Benchmark,
    case: Case,
    settings: Settings,
    base: Record,
    limits: machines.Limits | None,
    announce: Callable[[str], None],
    watch: Callable[[str], None],
    everyone: Everyone = alone,
) -> list[Record]:
    """The case in this process, and perhaps in others with it, which `everyone` reaches: `base` and what is found."""
    inputs = bench.inputs(case, settings.device)
    work = bench.work(case, inputs)
    base = dataclasses.replace(base, flops=work.flops, bytes=work.bytes, items=work.items, unit=work.unit)
    records: dict[str, Record] = {}
    trial = Trial(bench, case, settings.device, watch, inputs, everyone)

    def refuse(why: Refused) -> None:
        trial.refuse(why.name)
        records[why.name] = dataclasses.replace(
            records[why.name], status=why.status, note=why.note, error=why.error, figures={}, series={}
        )
        how = "is wrong" if why.status == "wrong" else "failed"
        announce(f"{bench.name}  {why.name} {how}, so there is no time for it: {why.note}")

    # the reference first, for the others are checked by it; last those that may disturb the others
    for name in sorted(bench.impls, key=lambda name: (name != bench.reference, bench.impls[name].role == "yours")):
        impl = bench.impls[name]
        if not impl.only(case):
            continue
        records[name] = dataclasses.replace(base, impl=name, role=impl.role)
        if impl.missing:
            records[name] = dataclasses.replace(records[name], status="missing", note=impl.missing)
            continue
        try:
            error, figures, series = trial.start(name)
            records[name] = dataclasses.replace(records[name], error=error, figures=figures, series=series)
            if bench.counted(name, settings.device) and not settings.smoke:
                del trial.calls[name]
                records[name] = dataclasses.replace(records[name], status="counted")
        except Refused as why:
            refuse(why)
    if settings.smoke:
        return list(records.values())

    assert limits is not None
    while True:
        try:
            samples, peaks = trial.time(max(settings.budget_s, 0.0 if settings.size == "quick" else bench.budget_s))
            break
        except Refused as why:  # what it did may have touched the others' times: once more, without it
            refuse(why)
    peers = [name for name in samples if bench.impls[name].role == "peer"]
    peer = min(peers, key=lambda name: samples[name].median, default=None)
    for name, sample in samples.items():
        records[name] = dataclasses.replace(
            records[name],
            status="noisy" if sample.noisy else "ok",
            seconds=sample.median,
            quartiles=sample.quartiles,
            runs=len(sample.seconds),
            ratio_to_reference=_ratio(samples, name, bench.reference if bench.compared(case) else None),
            ratio_to_peer=_ratio(samples, name, peer),
            peer=peer,
            share=limits.seconds(work.flops, work.bytes) / sample.median if work.flops or work.bytes else None,
            bound="compute" if work.flops / limits.flops >= work.bytes / limits.bandwidth else "memory",
            limit_flops=limits.flops,
            limit_bandwidth=limits.bandwidth,
            peak_bytes=peaks.get(name),
        )
    return list(records.values())


def _ratio(samples: Mapping[str, Sample], name: str, other: str | None) -> float | None:
    return None if other is None or other not in samples else ratio(samples[name], samples[other])
