"""The contract of `quant.qlinear`: x times a matrix of 4- or 8-bit codes, which come as plain tensors.

The implementation is called as

    qlinear(x, codes, scale, zero, bias, *, bits, group, activations) -> (M, N)

    x      float32 or bfloat16 (M, K)
    codes  uint8 (N, K) of 8 bits, or (N, ⌈K / 2⌉) of 4: column 0 in the lower half of byte 0, column 1 in the upper
    scale  float32 (N, G); `group` columns share one, the last group may be shorter
    zero   uint8 (N, G), taken off the code before it is scaled; or None: then codes are in two's complement
    bias   float32 (N,) or None
    activations  None, or "int8": each row of x is rounded to t · (−127 … 127), t = max|x| / 127, before that;
                 a row of zeros stays one

and may dequantize the whole matrix first: this contract asks for the numbers, the benchmark for the time. Sums are of
float32 whatever x is, and tensors may be views: rows of codes, or columns of x, that do not lie next to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsys.contracts._kernels_common import UNIT, exact, result, rounding
from mlsys.contracts.core import Case, Contract, Inputs, Results, Wrong
from mlsys.quant import QuantizedTensor, Scheme
from mlsys.quant.qlinear import qlinear

SIGNATURE = "qlinear(x (M, K), codes (N, bytes), scale (N, G), zero (N, G) or None, bias (N,) or None, *, bits, group, activations) -> (M, N)"  # noqa: E501


def case(
    m: int,
    n: int,
    k: int,
    *,
    bits: int = 4,
    group: int = 32,
    zero: bool = True,
    bias: bool = False,
    activations: str | None = None,
    grid: bool = True,
    dtype: str = "float32",
    given: str = "",
) -> Case:
    """One case. `grid`: for "int8", numbers in x that need no rounding, so that nobody can round them otherwise.

    given: "a row of zeros" in x, "all positive" codes and x, "views" of x, codes and scales; "" is none of these.
    """
    settings = {
        "m": m, "n": n, "k": k, "bits": bits, "group": group, "zero": zero, "bias": bias,
        "activations": activations, "grid": grid, "dtype": dtype,
    }  # fmt: skip
    return settings | ({"given": given} if given else {})


CASES = [
    case(1, 3, 8, group=8, zero=False),
    case(1, 3, 8, bits=8, group=8, zero=False),
    case(1, 4, 8, group=8),
    case(2, 5, 12, bits=8, group=12),
    case(1, 6, 96, zero=False),
    case(3, 4, 128, bits=8, bias=True),
    case(2, 5, 7, group=4),
    case(3, 17, 300, group=128, bias=True),
    case(1, 33, 513, bits=8, group=513),
    case(5, 9, 260, group=16),
    case(20, 7, 192, group=64, bias=True),
    case(4, 16, 16, group=16),
    case(0, 4, 32),
    case(3, 10, 256, group=128, dtype="bfloat16", bias=True),
    case(2, 6, 64, bits=8, group=64, zero=False, activations="int8"),
    case(3, 7, 320, bits=8, group=320, zero=False, activations="int8", bias=True),
    case(4, 9, 300, bits=8, group=300, activations="int8"),
    case(3, 8, 260, group=128, activations="int8", bias=True),
    case(18, 5, 384, group=128, zero=False, activations="int8"),
    case(4, 12, 384, bits=8, group=384, zero=False, activations="int8", grid=False),
    case(3, 6, 64, bits=8, group=64, zero=False, activations="int8", bias=True, given="a row of zeros"),
    case(2, 6, 256, group=128, activations="int8", given="a row of zeros"),
    case(2, 4, 1024, bits=8, group=1024, zero=False, dtype="bfloat16", given="all positive"),
    case(3, 6, 64, bias=True, given="views"),
    case(3, 6, 64, bits=8, group=64, activations="int8", given="views"),
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Codes evenly over their range, scales that differ from group to group, rows of x that differ in size."""
    generator = torch.Generator().manual_seed(seed)
    m, n, k, bits, group = (int(case[name]) for name in ("m", "n", "k", "bits", "group"))
    groups = -(-k // group)
    codes = torch.randint(0, 256, (n, k if bits == 8 else -(-k // 2)), generator=generator, dtype=torch.uint8)
    if bits == 4 and k % 2:
        codes[:, -1] &= 15
    if not case["zero"]:  # the most negative number of two's complement has no twin, and is no code
        lowest = torch.full_like(codes, 0x80)
        codes = torch.where(codes == lowest, 0x81, codes) if bits == 8 else _without_lowest(codes)
    what = case.get("given")
    if what == "all positive":  # 64 … 127 as 8 bits
        codes = codes & 0x7F | 0x40
    scale = 2 ** (2 * torch.rand(n, groups, generator=generator) - 6)
    x = torch.randn(m, k, generator=generator)
    if what == "all positive":
        x = torch.rand(m, k, generator=generator) / 2 + 0.5
    if case["activations"]:
        sizes = 2.0 ** torch.randint(-4, 3, (m, 1), generator=generator)
        if case["grid"]:
            x = torch.randint(-127, 128, (m, k), generator=generator).float()
            x[:, 0] = 127
        x = x * sizes
    if what == "a row of zeros":
        x[1] = 0
    given: Inputs = {
        "x": x.to(getattr(torch, case["dtype"])),
        "codes": codes,
        "scale": scale,
        "zero": torch.randint(1, 1 << bits, (n, groups), generator=generator).to(torch.uint8) if case["zero"] else None,
        "bias": 4 * torch.randn(n, generator=generator) if case["bias"] else None,
    }
    on_device: Inputs = {name: value.to(device) if value is not None else None for name, value in given.items()}
    if what == "views":
        on_device |= {name: on_device[name].T.contiguous().T for name in ("x", "codes", "scale")}
    return {**on_device, "bits": bits, "group": group, "activations": case["activations"]}


def _without_lowest(codes: Tensor) -> Tensor:
    """Halves of bytes, 1000 replaced by 1001."""
    codes = torch.where(codes & 0x0F == 0x08, codes | 0x01, codes)
    return torch.where(codes & 0xF0 == 0x80, codes | 0x10, codes)


def call(impl: Callable[..., Any], inputs: Inputs) -> Results:
    """The result, in the dtype of x."""
    tensors = (inputs[name] for name in ("x", "codes", "scale", "zero", "bias"))
    options = {name: inputs[name] for name in ("bits", "group", "activations")}
    shape = (len(inputs["x"]), len(inputs["codes"]))
    return {"y": result(impl(*tensors, **options), shape, inputs["x"].dtype)}


def _weights(inputs: Inputs) -> np.ndarray:
    """Ŵ in float64, number by number."""
    codes = inputs["codes"].cpu().numpy().astype(np.int64)
    k, bits = inputs["x"].shape[1], inputs["bits"]
    if bits == 4:
        codes = np.stack((codes & 15, codes >> 4), axis=2).reshape(len(codes), -1)[:, :k]
    which = np.arange(k) // inputs["group"]
    if inputs["zero"] is None:
        codes = np.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes)
    else:
        codes = codes - inputs["zero"].cpu().numpy().astype(np.int64)[:, which]
    return codes * exact(inputs["scale"])[:, which]


def _rounded(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """What x is multiplied as, and the step of each row (0 if it is not rounded)."""
    x = exact(inputs["x"])
    if inputs["activations"] is None:
        return x, np.zeros((len(x), 1))
    step = np.abs(x).max(axis=1, keepdims=True, initial=0) / 127
    return np.round(x / np.where(step > 0, step, 1)) * step, step


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """The formula in float64."""
    x, _ = _rounded(inputs)
    bias = 0.0 if inputs["bias"] is None else exact(inputs["bias"])
    return {"y": x @ _weights(inputs).T + bias}


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """Roundings of sums in float32, with the zero point taken off before or after; where x is rounded, one step of it.

    Of bfloat16: those of each weight, which may be dequantized to it, and of the result.
    """
    x, step = _rounded(inputs)
    w, dtype = _weights(inputs), inputs["x"].dtype
    largest = (1 << inputs["bits"]) * exact(inputs["scale"]).max(initial=0)  # code and zero point, each by itself
    allowed = 16 * UNIT * largest * np.abs(x).sum(axis=1).max(initial=0) + 4 * rounding(dtype, want)
    if dtype != torch.float32:
        allowed += torch.finfo(dtype).eps / 2 * float((np.abs(x) @ np.abs(w).T).max(initial=0))
    on_grid = np.array_equal(x, exact(inputs["x"]))
    return float(allowed + (0 if on_grid else 1.5 * step.max(initial=0) * np.abs(w).max(initial=0)))


def reference(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group: int,
    activations: Any,
    multiply: Callable[..., Tensor] = qlinear,
) -> Tensor:
    """`mlsys.quant.qlinear.qlinear`, or another with its arguments, of the record that these tensors make."""
    scheme = Scheme(f"int{bits}", group, affine=zero is not None)
    weight = QuantizedTensor(codes, scale, zero, (len(codes), x.shape[1]), scheme)
    return multiply(x, weight, bias, activations=activations)


def by_triton(*args: Any, **options: Any) -> Tensor:
    """`mlsys.quant.qlinear_triton.qlinear`, imported when it is first called: Triton is not everywhere."""
    from mlsys.quant import qlinear_triton

    return qlinear_triton.qlinear(*args, **options)


# --- wrong variants ---------------------------------------------------------------------------------------------------


def _dequantized(
    codes: Tensor, scale: Tensor, zero: Tensor | None, k: int, bits: int, group: int,
    *, halves_swapped: bool = False, unsigned: bool = False, no_zero: bool = False, zero_after: bool = False,
    next_group: bool = False, whole_groups: bool = False, one_scale: bool = False, transposed: bool = False,
    boundary_off: bool = False,
) -> Tensor:  # fmt: skip
    """Ŵ (N, K), float32."""
    wide = codes.int()
    if bits == 4:
        parts = (wide >> 4, wide & 15) if halves_swapped else (wide & 15, wide >> 4)
        wide = torch.stack(parts, dim=2).reshape(len(wide), -1)[:, :k]
    which = torch.arange(k, device=codes.device) // group
    if next_group:
        which = (which + 1) % scale.shape[1]
    if boundary_off:
        which = torch.clamp((torch.arange(k, device=codes.device) + 1) // group, max=scale.shape[1] - 1)
    if one_scale:
        which = torch.zeros_like(which)
    if zero is None and not unsigned:
        wide = torch.where(wide >= 1 << (bits - 1), wide - (1 << bits), wide)
    w = wide.float()
    if zero is not None and not no_zero and not zero_after:
        w = w - zero[:, which].float()
    w = w * scale[:, which]
    if zero is not None and zero_after:
        w = w - zero[:, which].float()
    if whole_groups and k > group:
        w[:, k // group * group :] = 0
    return w.reshape(k, -1).T if transposed else w


def _plain(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group: int,
    activations: str | None,
    one_step: bool = False,
    not_rounded: bool = False,
    always_rounded: bool = False,
    sums: str = "float32",
    bias_scaled: bool = False,
    no_bias: bool = False,
    scaled_early: bool = False,
    tail_read: bool = False,
    unguarded: bool = False,
    strides_ignored: bool = False,
    **weight: bool,
) -> Tensor:
    """The product in plain torch, with one knob for each mistake."""
    k = x.shape[1]
    if strides_ignored:
        x, codes, scale = (t.as_strided(t.shape, (t.shape[1], 1)) for t in (x, codes, scale))
    wide, step = x.float(), torch.ones(len(x), 1, device=x.device)
    if (activations and not not_rounded) or always_rounded:
        step = wide.abs().amax(dim=1, keepdim=True).clamp(min=0 if unguarded else 1e-30) / 127 if len(x) else step
        if one_step and len(x):
            step = step.max().expand(len(x), 1)
        wide = (wide / step).round()
    w = _dequantized(codes, scale, zero, k, bits, group, **weight)
    if sums == "int16" and activations and scale.shape[1] == 1:
        y = torch.remainder(wide @ (w / scale).round().T + 32768, 65536) - 32768
        y = y * scale.T
    elif sums == "bfloat16":
        y = torch.zeros(len(x), len(w), device=x.device)
        for i in range(0, k, 8):  # eight products at a time, and the sum is rounded
            y = (y + wide[:, i : i + 8] @ w[:, i : i + 8].T).bfloat16().float()
    elif sums == "of x":
        y = torch.zeros(len(x), len(w), device=x.device, dtype=x.dtype)
        for i in range(k):
            y += wide[:, i, None].to(x.dtype) * w[:, i].to(x.dtype)
        y = y.float()
    elif scaled_early and activations and bool((scale != 0).all()):
        which = torch.arange(k, device=x.device) // group
        integers = w / scale[:, which]
        y = torch.zeros(len(x), len(w), device=x.device)
        for i in range(0, k, 32):  # what is in the sum already is scaled again
            y = (y + wide[:, i : i + 32] @ integers[:, i : i + 32].T) * scale[:, i // group]
    elif tail_read and k % 16 and x.numel():
        tail = -k % 16  # of a row; in memory the next one lies there
        y = torch.cat((wide, wide.roll(-1, 0)[:, :tail]), 1) @ torch.cat((w, w.roll(-1, 0)[:, :tail]), 1).T
    else:
        y = wide @ w.T
    if bias is not None and bias_scaled:
        y = (y + bias / 2) * step if activations else y + bias * scale[:, 0]
    else:
        y = y * step
        y = y if bias is None or no_bias else y + bias
    return y.to(x.dtype)


def _wrong(hint: str, **knobs: Any) -> Wrong:
    return Wrong(partial(_plain, **knobs), hint)


WRONG = {
    "halves_swapped": _wrong("column 0 is the lower half of byte 0: code & 15, then code >> 4", halves_swapped=True),
    "unsigned": _wrong("without zero points codes are in two's complement: 1111 is −1", unsigned=True),
    "no_zero": _wrong("take the zero point off each code: (c − z) · s", no_zero=True),
    "zero_after": _wrong("the zero point counts in codes: take it off before scaling, (c − z) · s", zero_after=True),
    "next_group": _wrong("column k has the scale and zero point k // group of its row", next_group=True),
    "boundary_off": _wrong("column k is in group k // group: the first of a group is in it already", boundary_off=True),
    "tail_read": _wrong("mask the columns from K on: in memory the next row lies there", tail_read=True),
    "scaled_early": _wrong(
        "scale a group's sum of integers once, when it is complete: each time before, all of it is scaled again",
        scaled_early=True,
    ),
    "one_scale": _wrong("each group has a scale of its own, not that of the row's first", one_scale=True),
    "short_group_dropped": _wrong(
        "the last group may be shorter: ⌈K / group⌉ groups, not K // group", whole_groups=True
    ),
    "transposed": _wrong("codes are (N, K) as in nn.Linear; square matrices hide a mistake here", transposed=True),
    "bfloat16_sums": _wrong("sum in float32: in bfloat16, small products are lost beside a large sum", sums="bfloat16"),
    "sums_of_x": _wrong(
        "sum in float32 also where x is bfloat16: with its 8 bits a sum stands still at 256 times a product",
        sums="of x",
    ),
    "int16_sums": _wrong("127 · 127 · K does not fit into 16 bits: sum in int32", sums="int16"),
    "step_of_all_rows": _wrong("each row of x has a step of its own, max|x_m| / 127", one_step=True),
    "zero_row_nan": _wrong("a row of zeros has the step 0: do not divide by it, its integers are 0", unguarded=True),
    "strides_ignored": _wrong(
        "x, codes and scales may be views: go by their strides, or make them contiguous first", strides_ignored=True
    ),
    "not_rounded": _wrong('activations="int8" rounds x to integers first', not_rounded=True),
    "always_rounded": _wrong("without activations x stays as it is", always_rounded=True),
    "bias_scaled": _wrong("the bias is added at the end, and not scaled", bias_scaled=True),
    "no_bias": _wrong("add the bias", no_bias=True),
}


def contract(name: str, multiply: Callable[..., Tensor] = qlinear) -> Contract:
    """The contract under this name, which `mlsys.contracts.quant` gives it, of `multiply`."""
    return Contract(
        name, SIGNATURE, partial(reference, multiply=multiply), CASES, inputs, call, oracle, tolerance, WRONG
    )
