"""Published numbers about rooflines: the ridges of three machines, and what ran under the roof of the first TPU."""

from __future__ import annotations

from mlsys.claims.core import Claim, Status
from mlsys.perf import hardware, roofline

TPU = "Jouppi et al. 2017, arXiv:1704.04760"

# One socket and one die of the machines that the TPU paper compares with, by its Table 2
HASWELL = hardware.Hardware("18-core Haswell", peak={"float32": 1.3e12}, bandwidth=51e9, memory=256 * 2**30)
K80 = hardware.Hardware("K80, one die", peak={"float32": 2.8e12}, bandwidth=160e9, memory=12 * 2**30)

# name, multiply-accumulates a byte (Table 1), measured TOP/s (Table 3), and what ours has to be
TPU_WORKLOADS: tuple[tuple[str, float, float, Status, str], ...] = (
    ("mlp0", 200, 12.3, "approximate", "a bound, nearly reached: it only streams weights"),
    ("mlp1", 168, 9.7, "approximate", "a bound, nearly reached: it only streams weights"),
    (
        "lstm1",
        96,
        2.8,
        "disagrees",
        "a bound: small matrices and dependent steps leave the matrix unit waiting",
    ),
    ("cnn0", 2888, 86.0, "approximate", "a bound, nearly reached: compute binds"),
    (
        "cnn1",
        1750,
        14.1,
        "disagrees",
        "a bound: shallow layers and fully connected ones leave most of the matrix unit idle",
    ),
)


def tpu_v1_tops(weights_per_op: float) -> float:
    """TPU v1, TOP/s that the roofline allows at so many multiply-accumulates a byte of weights."""
    tpu = hardware.find("tpu-v1")
    return roofline.attainable(2 * weights_per_op, tpu, "int8") / 1e12


def ridge_macs(machine: hardware.Hardware) -> float:
    """The ridge in multiply-accumulates a byte, as the TPU paper counts operations; an operation is half of one."""
    (dtype,) = machine.peak
    return roofline.ridge(machine, dtype) / 2


ROOFLINES = [
    Claim(
        name="tpu-v1-ridge",
        area="perf.roofline",
        source=f"{TPU}, Figure 5",
        what="ridge of TPU v1, multiply-accumulates a byte of weights",
        unit="MAC/B",
        published=1350,
        digits=-1,
        compute=lambda: ridge_macs(hardware.find("tpu-v1")),
    ),
    Claim(
        name="haswell-ridge",
        area="perf.roofline",
        source=f"{TPU}, Figure 6",
        what="ridge of an 18-core Haswell, 1.3 TFLOP/s and 51 GB/s",
        unit="MAC/B",
        published=13,
        digits=0,
        compute=lambda: ridge_macs(HASWELL),
    ),
    Claim(
        name="k80-ridge",
        area="perf.roofline",
        source=f"{TPU}, Figure 7",
        what="ridge of one die of a K80, 2.8 TFLOP/s and 160 GB/s",
        unit="MAC/B",
        published=9,
        digits=0,
        compute=lambda: ridge_macs(K80),
    ),
    *(
        Claim(
            name=f"tpu-v1-{name}",
            area="perf.roofline",
            source=f"{TPU}, Tables 1 and 3",
            what=f"TOP/s of {name.upper()} on TPU v1 ({intensity} MAC/B): ours the roofline's bound, theirs measured",
            unit="TOP/s",
            published=published,
            digits=1,
            compute=lambda intensity=intensity: tpu_v1_tops(intensity),  # type: ignore[misc]
            tolerance=0.20,
            expected=expected,
            reason=reason,
        )
        for name, intensity, published, expected, reason in TPU_WORKLOADS
    ),
]
