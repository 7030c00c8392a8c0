"""What a machine can do at most: a few figures that decide how fast any program can run on it.

An accelerator is described, to first order, by six numbers:

    peak         FLOP/s of its matrix units, another for each number format
    bandwidth    bytes a second between its memory and the chip
    memory       bytes that fit
    sram, cache  bytes on the chip: what need not go to memory at all
    link         bytes a second to its neighbours

and their ratios say what to expect before anything is run. `peak / bandwidth`, the
ridge point, is how many FLOPs a byte must be good for: 139 on a V100, 295 on an
H100 (16-bit). Few programs reuse a byte that often, which is why so much of this
library is about moving fewer of them. `bandwidth / memory` is how often a second the
whole memory can be read: a model that fills an H100 gives at most 42 tokens a
second to one user.

The records are read off data sheets and papers, and each figure names its source.
Three things to know when reading a data sheet:

    *with sparsity*   half of the weights are zero in a fixed pattern. The figures here are dense, half of that.
    *bidirectional*   both directions added. Links here are one direction, half of that.
    GB                10⁹ bytes here, as printed; where a source prints GiB or the unit is a cache's, 2³⁰ and 2¹⁰.

A published peak is what the clocks allow if nothing ever waits. `this_machine`
measures instead: the best large matmul and the best large copy.

Cost:
    None: records only. `this_machine` takes about a second per dtype, the first time.

Memory:
    None. `this_machine` copies 128 MiB (1 GiB on a GPU) to find the bandwidth.

Papers:
    Jouppi et al. 2017, "In-Datacenter Performance Analysis of a Tensor Processing Unit", Table 2 (TPU v1).
    Jouppi et al. 2023, arXiv:2304.01433, Table 4 (TPU v4).
    NVIDIA 2017, 2020, 2022, "Tesla V100", "A100" and "H100 Tensor Core GPU Architecture" (white papers).

See also:
    `mlsys.perf.roofline` (what these figures mean for some work), `mlsys.bench.machine` (the fingerprint of a record).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mlsys.perf import _measure
from mlsys.perf._checks import amount

# Number formats a peak may be given for. "int8" counts operations, the others FLOPs; a multiply-add is two of them.
DTYPES = ("float64", "float32", "tf32", "bfloat16", "float16", "float8", "int8")

KIB, MIB, GIB = 2**10, 2**20, 2**30
GB, TB = 1e9, 1e12
TERA = 1e12


@dataclass(frozen=True)
class Link:
    """How a device reaches others.

    bandwidth: bytes/s out of one device, one direction, all its ports together.
    latency:   seconds that a message takes beside its bytes, software included; None where nobody publishes it.
    source:    where the bandwidth is printed, and what was halved or divided to get it.
    """

    name: str
    bandwidth: float
    latency: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        amount("bandwidth", self.bandwidth, positive=True)
        if self.latency is not None:
            amount("latency", self.latency, positive=True)


@dataclass(frozen=True)
class Hardware:
    """One device. A figure is None where no source prints it.

    peak:       dtype → FLOP/s, dense, with the matrix units where that format has them (op/s for int8).
    bandwidth:  bytes/s of the memory, reads and writes together.
    memory:     bytes.
    processors: streaming multiprocessors, TensorCores of a TPU, or cores.
    sram:       bytes that the programmer manages on one processor: shared memory, VMEM, unified buffer.
    cache:      bytes on the chip that all processors share: the L2 of a GPU, the CMEM of a TPU v4.
    link:       to the neighbours in the same box or pod.
    network:    to other boxes, this device's share of it.
    sources:    field → where its figure is printed; links carry their own.
    """

    name: str
    peak: Mapping[str, float]
    bandwidth: float
    memory: float
    processors: int | None = None
    sram: int | None = None
    cache: int | None = None
    link: Link | None = None
    network: Link | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.peak:
            raise ValueError(f"peak of {self.name!r} is empty: give FLOP/s for at least one of {', '.join(DTYPES)}")
        for dtype, flops in self.peak.items():
            if dtype not in DTYPES:
                raise ValueError(f"peak has dtype {dtype!r}; known are {', '.join(DTYPES)}")
            amount(f"peak[{dtype!r}]", flops, positive=True)
        for name in ("bandwidth", "memory", "processors", "sram", "cache"):
            value = getattr(self, name)
            if value is not None:
                amount(name, value, positive=True)
        unknown = set(self.sources) - {f.name for f in dataclasses.fields(self)}
        if unknown:
            raise ValueError(f"sources has {sorted(unknown)[0]!r}, which is no field of Hardware")


# --- published machines -----------------------------------------------------------------------------------------------

V100_PAPER = "NVIDIA 2017, Tesla V100 GPU Architecture white paper, Table 1"
V100_SHEET = "NVIDIA 2020, V100 Tensor Core GPU data sheet, V100 SXM2"
A100_PAPER = "NVIDIA 2020, A100 Tensor Core GPU Architecture white paper, Tables 1 and 4"
A100_SHEET = "NVIDIA 2021, A100 80GB data sheet, A100 80GB SXM"
H100_PAPER = "NVIDIA 2022, H100 Tensor Core GPU Architecture white paper, H100 SXM5"
H200_SHEET = "NVIDIA 2024, H200 Tensor Core GPU data sheet, H200 SXM; formats printed with sparsity are halved"
B200_SHEET = "NVIDIA 2025, Blackwell data sheet, one GPU of HGX B200; formats printed with sparsity are halved"
CUDA_GUIDE = "NVIDIA 2025, CUDA C++ Programming Guide, Technical Specifications per Compute Capability"
B200_TESTED = "Chips and Cheese 2025, Nvidia's B200: Keeping the CUDA Juggernaut Rolling (read from the device)"
TPU1_PAPER = "Jouppi et al. 2017, In-Datacenter Performance Analysis of a Tensor Processing Unit, Table 2"
TPU4_PAPER = "Jouppi et al. 2023, arXiv:2304.01433, Table 4"
TPU5E_DOCS = "Google 2024, Cloud TPU documentation, TPU v5e"
PALLAS_DOCS = "JAX documentation 2026, Pallas: TPU Hardware Reference"


def _from(source: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, source)


# No data sheet prints a latency. NCCL's tuner has to assume one for each kind of link: of a step of a ring, with the
# protocol for large messages (for small ones 0.6 and 2.7 µs, at a fraction of the bandwidth).
NCCL_TUNER = "NVIDIA 2024, NCCL 2.20.3, src/graph/tuning.cc, hwLat, ring, Simple"
NVLINK_LATENCY, NETWORK_LATENCY = 3.4e-6, 14e-6


def _nvlink(generation: int, both_directions: float, source: str) -> Link:
    return Link(
        f"NVLink {generation}",
        both_directions / 2,
        latency=NVLINK_LATENCY,
        source=f"{source}: half of the bidirectional figure; latency: {NCCL_TUNER}",
    )


def _adapters(each_bits: float, adapters: int, devices: int, source: str) -> Link:
    """A device's share of the network adapters of its box, which are rated in bits a second and per direction."""
    return Link(
        f"{adapters} × {each_bits / 1e9:.0f} Gb/s for {devices} devices",
        each_bits / 8 * adapters / devices,
        latency=NETWORK_LATENCY,
        source=f"{source}; latency: {NCCL_TUNER}",
    )


_HOPPER_NETWORK = _adapters(400e9, 8, 8, "NVIDIA 2023, DGX H100 data sheet; DGX H200 has the same adapters")
_AMPERE_NETWORK = _adapters(200e9, 8, 8, "NVIDIA 2020, DGX A100 data sheet")
_A100_40 = Hardware(
    name="A100 SXM 40 GB",
    peak={
        "float64": 19.5 * TERA,
        "float32": 19.5 * TERA,
        "tf32": 156 * TERA,
        "bfloat16": 312 * TERA,
        "float16": 312 * TERA,
        "int8": 624 * TERA,
    },
    bandwidth=1555 * GB,
    memory=40 * GB,
    processors=108,
    sram=164 * KIB,
    cache=40 * MIB,
    link=_nvlink(3, 600 * GB, A100_PAPER),
    network=_AMPERE_NETWORK,
    sources=_from(A100_PAPER, "peak", "bandwidth", "memory", "processors", "sram", "cache"),
)

# By the names that `find` and the command line take.
HARDWARE = {
    "v100": Hardware(
        name="V100 SXM2 32 GB",
        peak={"float64": 7.8 * TERA, "float32": 15.7 * TERA, "float16": 125 * TERA},
        bandwidth=900 * GB,
        memory=32 * GB,
        processors=80,
        sram=96 * KIB,
        cache=6 * MIB,
        link=_nvlink(2, 300 * GB, V100_SHEET),
        network=_adapters(100e9, 4, 8, "NVIDIA 2017, DGX-1 with Tesla V100 data sheet"),
        sources=_from(V100_PAPER, "peak", "processors", "sram", "cache") | _from(V100_SHEET, "bandwidth", "memory"),
    ),
    "a100-40": _A100_40,
    "a100-80": dataclasses.replace(
        _A100_40,
        name="A100 SXM 80 GB",
        bandwidth=2039 * GB,
        memory=80 * GB,
        sources={**_A100_40.sources, **_from(A100_SHEET, "bandwidth", "memory")},
    ),
    "h100": Hardware(
        name="H100 SXM",
        peak={
            "float64": 66.9 * TERA,
            "float32": 66.9 * TERA,
            "tf32": 494.7 * TERA,
            "bfloat16": 989.4 * TERA,
            "float16": 989.4 * TERA,
            "float8": 1978.9 * TERA,
            "int8": 1978.9 * TERA,
        },
        bandwidth=3350 * GB,
        memory=80 * GB,
        processors=132,
        sram=228 * KIB,
        cache=50 * MIB,
        link=_nvlink(4, 900 * GB, H100_PAPER),
        network=_HOPPER_NETWORK,
        sources=_from(H100_PAPER, "peak", "memory", "processors", "sram", "cache")
        | _from("NVIDIA 2023, H100 Tensor Core GPU data sheet, H100 SXM", "bandwidth"),
    ),
    "h200": Hardware(
        name="H200 SXM",
        peak={
            "float64": 67 * TERA,
            "float32": 67 * TERA,
            "tf32": 494.5 * TERA,
            "bfloat16": 989.5 * TERA,
            "float16": 989.5 * TERA,
            "float8": 1979 * TERA,
            "int8": 1979 * TERA,
        },
        bandwidth=4800 * GB,
        memory=141 * GB,
        sram=228 * KIB,
        link=_nvlink(4, 900 * GB, H200_SHEET),
        network=_HOPPER_NETWORK,
        sources=_from(H200_SHEET, "peak", "bandwidth", "memory") | _from(f"{CUDA_GUIDE}, 9.0", "sram"),
    ),
    "b200": Hardware(
        name="B200 (HGX)",
        peak={
            "float64": 37 * TERA,
            "float32": 75 * TERA,
            "tf32": 1100 * TERA,
            "bfloat16": 2250 * TERA,
            "float16": 2250 * TERA,
            "float8": 4500 * TERA,
            "int8": 4500 * TERA,
        },
        bandwidth=7700 * GB,
        memory=180 * GB,
        processors=148,
        sram=228 * KIB,
        cache=126 * MIB,
        link=_nvlink(5, 1800 * GB, B200_SHEET),
        network=_adapters(400e9, 8, 8, "NVIDIA 2024, DGX B200 data sheet"),
        sources=_from(B200_SHEET, "peak", "bandwidth", "memory")
        | _from(B200_TESTED, "processors", "cache")
        | _from(f"{CUDA_GUIDE}, 10.0", "sram"),
    ),
    "tpu-v1": Hardware(
        name="TPU v1",
        peak={"int8": 92 * TERA},
        bandwidth=34 * GB,
        memory=8 * GIB,
        processors=1,
        sram=28 * MIB,  # 24 MiB unified buffer and 4 MiB of accumulators
        sources=_from(TPU1_PAPER, "peak", "bandwidth", "memory", "processors", "sram"),
    ),
    "tpu-v4": Hardware(
        name="TPU v4",
        peak={"bfloat16": 275 * TERA, "int8": 275 * TERA},
        bandwidth=1200 * GB,
        memory=32 * GIB,
        processors=2,
        sram=16 * MIB,
        cache=128 * MIB,
        link=Link("ICI, 3-D torus", 6 * 50 * GB, source=f"{TPU4_PAPER}: 6 links of 50 GB/s"),
        sources=_from(TPU4_PAPER, "peak", "bandwidth", "memory", "processors", "sram", "cache"),
    ),
    "tpu-v5e": Hardware(
        name="TPU v5e",
        peak={"bfloat16": 197 * TERA, "int8": 393 * TERA},
        bandwidth=819 * GB,
        memory=16 * GB,
        processors=1,
        sram=128 * MIB,
        link=Link("ICI, 2-D torus", 200 * GB, source=f"{TPU5E_DOCS}: half of the bidirectional 400 GB/s"),
        network=_adapters(100e9, 2, 8, f"{TPU5E_DOCS}: two 100 Gb/s adapters a host of 8 chips"),
        sources=_from(TPU5E_DOCS, "peak", "bandwidth", "memory", "processors") | _from(PALLAS_DOCS, "sram"),
    ),
}


def find(name: str) -> Hardware:
    """The published record of this name, in any case; LookupError with the nearest names if there is none."""
    known = HARDWARE.get(name.lower())
    if known is not None:
        return known
    near = difflib.get_close_matches(name.lower(), HARDWARE, n=3, cutoff=0.5)
    remedy = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(HARDWARE)}"
    raise LookupError(f"no machine {name!r}; {remedy}")


def peak_flops(hardware: Hardware, dtype: str) -> float:
    """FLOP/s (op/s for int8) of this machine in this dtype; LookupError naming the dtypes that it has figures for."""
    if dtype not in hardware.peak:
        raise LookupError(f"{hardware.name} has no peak for dtype {dtype!r}; it has {', '.join(hardware.peak)}")
    return hardware.peak[dtype]


# --- this machine -----------------------------------------------------------------------------------------------------


def this_machine(dtypes: Sequence[str] = ("float32", "bfloat16"), n_threads: int = 1, device: str = "cpu") -> Hardware:
    """This machine as a record: peak and bandwidth measured with `n_threads`, the rest as the system gives it.

    device is "cpu" or "cuda" (the first GPU). Measured once per dtype and thread count, then
    kept in the user's cache folder. float16 on a CPU is emulated and takes a minute to measure.
    """
    _check_request(dtypes, device)
    limits = {dtype: _measure.limits(dtype, n_threads, device) for dtype in dtypes}
    rows = _measure.MATMUL[device]
    measured = f"measured: the best of many {rows} × {rows} matmuls"
    copied = f"measured: the best of many copies of {4 * _measure.COPY[device] // MIB} MiB, read and write counted"
    name, memory, processors, cache = _as_the_system_says(device, n_threads)
    return Hardware(
        name=name,
        peak={dtype: limit.flops for dtype, limit in limits.items()},
        bandwidth=max(limit.bandwidth for limit in limits.values()),
        memory=memory,
        processors=processors,
        cache=cache,
        sources={"peak": measured, "bandwidth": copied, **_from("the system", "memory", "processors")}
        | (_from("the system", "cache") if cache else {}),
    )


def _check_request(dtypes: Iterable[str], device: str) -> None:
    if device not in _measure.MATMUL:
        raise ValueError(f"device={device!r}: there are {' and '.join(_measure.MATMUL)}")
    if isinstance(dtypes, str) or not dtypes:
        raise ValueError(f"dtypes={dtypes!r}: give a sequence of names, such as ('float32', 'bfloat16')")
    unknown = [dtype for dtype in dtypes if dtype not in _measure.DTYPES]
    if unknown:
        raise ValueError(f"dtypes has {unknown[0]!r}, which cannot be measured; there are {', '.join(_measure.DTYPES)}")
    if device == "cuda" and _measure.gpu_name() is None:
        raise ValueError("device='cuda': torch finds no CUDA device here; leave it out to measure the CPU")


def _as_the_system_says(device: str, n_threads: int) -> tuple[str, int, int, int | None]:
    """Name, bytes of memory, processors and bytes of shared cache."""
    if device == "cuda":
        import torch

        gpu = torch.cuda.get_device_properties(0)
        return gpu.name, gpu.total_memory, gpu.multi_processor_count, getattr(gpu, "L2_cache_size", None)
    import psutil

    plural = "" if n_threads == 1 else "s"
    return f"{_measure.cpu_name()}, {n_threads} thread{plural}", psutil.virtual_memory().total, n_threads, None
