"""How the kernels of `mlsys.kernels.matmul_triton` are launched: grids, descriptors, and the tiles that may be tried.

See also:
    `mlsys.kernels.matmul_triton` (the kernels, explained).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mlsys.kernels import _matmul_triton_kernels as kernels
from mlsys.kernels._triton import Config, Specimen, at, config, next_power_of_2
from mlsys.kernels._triton_tune import size, tuned

KERNELS = {"tiled": kernels.tiled, "persistent": kernels.persistent, "descriptor": kernels.descriptor}
INTERPRETED_PROGRAMS = 3  # in place of multiprocessors: more than one, and no divisor of most numbers of tiles
SLOPE = config(BLOCK_M=32, BLOCK_N=128, warps=4, stages=1)


@dataclass(frozen=True)
class Call:
    """How a product is to be computed, checked. activation: as the kernels name it, "" for none."""

    variant: str
    activation: str = ""
    precision: str = "ieee"
    config: Config | None = None

    def plain(self) -> Call:
        """The same without an activation: for the products of the backward pass."""
        return replace(self, activation="")


def product(a: Tensor, b: Tensor, call: Call, bias: Tensor | None = None, *, keep: bool = False) -> list[Tensor]:
    """The (m, n) result for a (m, k) and b (k, n); and what the activation was taken of, if that is to be kept.

    By descriptors, its rows begin at multiples of 16 bytes, and are not contiguous if they have to be padded for that.
    """
    (m, k), n = a.shape, b.shape[1]
    in_16_bytes = 16 // a.element_size()
    pitch = -(-n // in_16_bytes) * in_16_bytes if call.variant == "descriptor" else n
    c = torch.empty(m, pitch, dtype=a.dtype, device=a.device)[:, :n]
    z = torch.empty(m, pitch, dtype=a.dtype, device=a.device)[:, :n] if keep else None
    if m and n:
        # with k = 0 there is nothing to describe: every variant is the epilogue of an empty sum
        _launch(a, b, bias, c, z, call if k else replace(call, variant="tiled", config=None))
    return [c] if z is None else [c, z]


def _launch(a: Tensor, b: Tensor, bias: Tensor | None, c: Tensor, z: Tensor | None, call: Call) -> None:
    (m, k), n = a.shape, b.shape[1]
    device, bias_n = a.device, 0 if bias is None else bias.stride(0)
    constants = {"ACTIVATION": call.activation, "PRECISION": call.precision}

    def run(one: Config) -> None:
        tiles = triton.cdiv(m, one["BLOCK_M"]) * triton.cdiv(n, one["BLOCK_N"])
        grid = tiles if call.variant == "tiled" else min(tiles, multiprocessors(device))
        if call.variant == "descriptor":
            left, right = (described(x, *blocks) for x, blocks in ((a, (one["BLOCK_M"], one["BLOCK_K"])),
                                                                   (b, (one["BLOCK_K"], one["BLOCK_N"]))))  # fmt: skip
            block = [one["BLOCK_M"], one["BLOCK_N"]]
            results = [None if x is None else TensorDescriptor(x, [m, n], [c.stride(0), 1], block) for x in (c, z)]
            kernels.descriptor[(grid,)](
                left, right, bias, *results, m, n, k, bias_n, A_SWAPPED=swapped(a), B_SWAPPED=swapped(b),
                **constants, **one.options(),
            )  # fmt: skip
            return
        KERNELS[call.variant][(grid,)](
            a, b, bias, c, z, m, n, k, *a.stride(), *b.stride(), bias_n, c.stride(0),
            WHOLE=k % one["BLOCK_K"] == 0, **constants, **one.options(),
        )  # fmt: skip

    dtype = str(a.dtype).removeprefix("torch.")
    layout = "".join("n" if x.stride(1) == 1 else "t" for x in (a, b))
    key = f"M{size(m)} N{size(n)} K{size(k)} {dtype} {call.precision} {layout} {call.activation}".rstrip()
    tried = configs(call.variant, a.dtype, call.precision, m, call.activation)
    with at(device):
        run(tuned(f"matmul.{call.variant}", key, tried, run, device, call.config))


def before_activation(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    """The gradient dz = dy · activation'(z), laid out as z, whose rows are contiguous."""
    dz = torch.empty_strided(z.shape, z.stride(), dtype=z.dtype, device=z.device)
    m, n = z.shape
    if dz.numel():
        grid = (triton.cdiv(m, SLOPE["BLOCK_M"]) * triton.cdiv(n, SLOPE["BLOCK_N"]),)
        with at(z.device):
            kernels.before_activation[grid](
                dy, z, dz, m, n, *dy.stride(), z.stride(0), ACTIVATION=activation, **SLOPE.options()
            )  # fmt: skip
    return dz


def multiprocessors(device: torch.device) -> int:
    """How many programs the kernels that walk have, at most."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def swapped(x: Tensor) -> bool | None:
    """Whether a descriptor would be of x transposed; None if there can be none of either.

    A row has to be contiguous, and to begin at a multiple of 16 bytes.
    """
    for transposed, view in ((False, x), (True, x.mT)):
        pitch = view.stride(0) * x.element_size()
        if x.numel() and view.stride(1) == 1 and pitch > 0 and pitch % 16 == 0 and x.data_ptr() % 16 == 0:
            return transposed
    return None


def described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The descriptor for tiles of x of this size, or for their transposes."""
    if swapped(x):
        x, rows, columns = x.mT, columns, rows
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


# --- tiles ------------------------------------------------------------------------------------------------------------

EPILOGUE = "behind the loop, once a tile: the sums fill half of the registers, and an activation wants as many again"


def _tiles(*of: tuple[int, int, int, int, int], why_spills: str = "") -> tuple[Config, ...]:
    return tuple(
        config(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP=8, warps=warps, stages=stages, why_spills=why_spills)
        for m, n, k, warps, stages in of
    )


SMALL = _tiles((16, 128, 64, 4, 4))  # for fewer rows than a tile of tensor cores' has
IN_16_BITS = {
    "tiled": _tiles((128, 256, 64, 8, 3), (128, 128, 64, 4, 4), (128, 128, 32, 4, 4), (64, 128, 64, 4, 4)) + SMALL,
    "persistent": _tiles((128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4)),
    "descriptor": _tiles((128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4)) + SMALL,
}
IN_TF32 = dict.fromkeys(KERNELS, _tiles((128, 128, 32, 8, 3), (64, 64, 32, 4, 4)))
IN_FLOAT32 = {
    "tiled": _tiles((128, 128, 16, 8, 2), (64, 64, 16, 8, 2)),
    "persistent": _tiles((128, 128, 16, 8, 2), (64, 64, 16, 8, 2)),
    "descriptor": _tiles((128, 64, 16, 8, 2), (64, 64, 16, 8, 2)),
}


def configs(variant: str, dtype: torch.dtype, precision: str, m: int, activation: str = "") -> tuple[Config, ...]:
    """What may be tried for a product of so many rows: tiles that have not many more; few only where there are few."""
    known = (IN_FLOAT32 if precision == "ieee" else IN_TF32) if dtype == torch.float32 else IN_16_BITS
    rows = max(16, next_power_of_2(m))
    able = known[variant]
    if activation and variant == "persistent":  # with more than 64 sums a thread, numbers of the loop are spilled, too
        able = tuple(one for one in able if one["BLOCK_M"] * one["BLOCK_N"] <= 64 * 32 * one.warps)
    fitting = tuple(one for one in able if min(64, rows) <= one["BLOCK_M"] <= rows)
    return fitting or able[-1:]


# --- what the compiler is shown ---------------------------------------------------------------------------------------


def specimens() -> list[Specimen]:
    """The kernels with every config, for each dtype; and once each other layouts, an edge along k, and an epilogue."""
    found = []
    for variant in KERNELS:
        for short in ("bf16", "fp16"):
            found += [_specimen(variant, short, one) for one in IN_16_BITS[variant]]
        found += [_specimen(variant, "fp32", one) for one in IN_FLOAT32[variant]]
        found += [_specimen(variant, "fp32", one, precision="tf32") for one in IN_TF32[variant]]
        first = IN_16_BITS[variant][0]
        found += [_specimen(variant, "bf16", first, layout=layout) for layout in ("nt", "tn")]
        if variant != "descriptor":
            found.append(_specimen(variant, "bf16", first, whole=False))
        behind = configs(variant, torch.bfloat16, "ieee", 4096, "gelu")[0]
        found.append(_specimen(variant, "bf16", behind, activation="gelu"))  # the one that wants the most registers
    return [*found, *(_slope(activation) for activation in ("relu", "silu", "gelu", "gelu tanh"))]


def _slope(activation: str) -> Specimen:
    """The kernel behind which the products of the backward pass come."""
    kernel = kernels.before_activation
    types = dict.fromkeys(("dy", "z", "dz"), "*bf16")
    return Specimen(
        name=f"matmul.before_activation bf16 {activation}",
        kernel=kernel,
        signature={x: types.get(x, "i32") for x in kernel.arg_names},
        config=SLOPE,
        constants={"ACTIVATION": activation, "dy_n": 1},
        aligned=("dy", "z", "dz", "n", "dy_m", "z_m"),
        shows=dict.fromkeys((80, 90), ("128-bit loads",)),
    )


def _specimen(
    variant: str,
    short: str,
    one: Config,
    *,
    precision: str = "ieee",
    layout: str = "nn",
    activation: str = "",
    whole: bool = True,
) -> Specimen:
    """layout: of a and b, "n" if their rows are contiguous, "t" if their columns are. An activation has its bias."""
    kernel = KERNELS[variant]
    types = dict.fromkeys(("a", "b", "bias", "c", "z"), f"*{short}")
    constants: dict[str, Any] = {"ACTIVATION": activation, "PRECISION": precision, "WHOLE": whole}
    constants |= {"a_m" if layout[0] == "t" else "a_k": 1, "b_k" if layout[1] == "t" else "b_n": 1, "bias_n": 1}
    constants |= {} if activation else {"bias": None, "z": None}
    m, n, k = (one[f"BLOCK_{size}"] for size in "MNK")
    by_tma = variant == "descriptor"
    if by_tma:
        constants |= {"A_SWAPPED": layout[0] == "t", "B_SWAPPED": layout[1] == "t"}
        blocks = {"a": [m, k][:: -1 if layout[0] == "t" else 1], "b": [k, n][:: -1 if layout[1] == "t" else 1]}
        blocks |= {"c": [m, n], "z": [m, n]}
        types |= {name: f"tensordesc<{short}[{rows},{columns}]>" for name, (rows, columns) in blocks.items()}
    tensor_cores = short != "fp32" or precision == "tf32"
    on_hopper = ("TMA" if by_tma else "cp.async", "wgmma" if m >= 64 else "mma.sync")
    aligned = [x for x in kernel.arg_names if x not in constants and x.islower() and not types.get(x, "").endswith(">")]
    kinds = ["tf32" * (precision == "tf32"), layout * (layout != "nn"), activation, "edge" * (not whole)]
    return Specimen(
        name=" ".join([f"matmul.{variant} {short}", *filter(None, kinds)]),
        kernel=kernel,
        signature={x: types.get(x, "i32") for x in kernel.arg_names},
        config=replace(one, why_spills=EPILOGUE) if activation else one,
        constants={x: value for x, value in constants.items() if x in kernel.arg_names},
        aligned=tuple(aligned),
        shows={80: ("mma.sync", "cp.async"), 90: on_hopper} if tensor_cores else {},
        targets=(90,) if by_tma else (),
    )
