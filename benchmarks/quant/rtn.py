"""Round to nearest: how long does it take, and how much of the signal is left for how many bits?

Every format rounds the same normal weights. The peers do it where they have the format, and must leave as much noise:
gguf (llama.cpp's) its Q8_0 and MXFP4, bitsandbytes NF4 with and without double quantization, torchao the integers,
MXFP4 and NVFP4, in eager mode, since what is compiled is compiled for one shape; torch's cast FP8.

What to look at: the picture. No code of b bits can do better on normal numbers than 6.02·b decibels (the line).
Integers and formats of 4 bits are a bit or two below it, floats of 8 bits three or four. Around 4 bits, who shares a
scale decides more than the format: one scale a row of 4096 costs integers 4 dB. NF4 is made for such numbers and, at
equal bits, is hardly better than integers with a zero point. MXFP4 pays for scales that are powers of two, which
NVFP4's are not. And a fifth exponent bit is wasted on weights that have a scale: fp8_e5m2 is as good as e3m2, which has
six bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsys.bench import Benchmark, Impl, Record, Work
from mlsys.bench.plots import COLOURS, MARKERS, new_figure, to_svg
from mlsys.quant import QuantizedTensor, Scheme, rtn

Case = Mapping[str, Any]
TIMED = ("int8", "int4:g128", "nf4", "nf4:dq", "mxfp4", "nvfp4", "fp8_e4m3", "int8:g32:fp16")
DRAWN = (
    "int2:g64", "int3:g64", "int4:g32", "int4:g64", "int4:g32:fp16", "int4:g32:sym:fp16", "int4:g64:dq", "int4:g128",
    "int5:g128", "int6:g128", "int8:g128", "int3:sym", "int4:sym", "int6:sym", "int8", "int4:tensor:sym", "nf4",
    "nf4:dq", "e2m1:g64", "fp8_e4m3", "fp8_e5m2", "e2m3", "e3m2", "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3",
    "mxfp8_e5m2", "nvfp4", "dynamic8",
)  # fmt: skip
FAMILIES = {  # prefixes → name, in the order in which they are asked
    ("mx", "nv"): "blocks with scales of 8 bits",
    ("fp8", "e2m", "e3m"): "floats",
    ("nf4", "dynamic8"): "tables",
    ("int",): "integers",
}


def cases(rows: int, columns: int, schemes: Sequence[str]) -> list[Case]:
    return [{"scheme": scheme, "rows": rows, "columns": columns} for scheme in schemes]


def inputs(case: Case, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(case["rows"])
    return torch.randn(case["rows"], case["columns"], generator=generator, device=device)


def work(case: Case, w: Tensor) -> Work:
    """Read once, written once."""
    scheme = Scheme.parse(case["scheme"])
    return Work(flops=0, bytes=w.nbytes + w.numel() * scheme.bits / 8, items=w.numel(), unit="weights")


# --- the peers: a function (w, scheme) → an object with `dequantize()` ------------------------------------------------


def with_gguf(w: Tensor, scheme: str) -> Any:
    import gguf

    kind = gguf.GGMLQuantizationType.MXFP4 if scheme == "mxfp4" else gguf.GGMLQuantizationType.Q8_0
    blocks = gguf.quants.quantize(w.numpy(), kind)
    return SimpleNamespace(dequantize=lambda: torch.from_numpy(gguf.quants.dequantize(blocks, kind)))


def with_bitsandbytes(w: Tensor, scheme: str) -> Any:
    from bitsandbytes import functional

    found = functional.quantize_4bit(w, quant_type="nf4", blocksize=64, compress_statistics=scheme == "nf4:dq")
    return SimpleNamespace(dequantize=lambda: functional.dequantize_4bit(*found))


def with_torchao(w: Tensor, scheme: str) -> Any:
    parsed = Scheme.parse(scheme)
    if scheme in ("mxfp4", "nvfp4"):
        codes, stored = _torchao_blocks(w, scheme)
        return QuantizedTensor(codes, stored, None, tuple(w.shape), parsed)
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    block = (1, parsed.group_size(w.shape[1]))
    low, high = (0, 15) if parsed.affine else (-127, 127)
    kind = torch.uint8 if parsed.affine else torch.int8
    how = MappingType.ASYMMETRIC if parsed.affine else MappingType.SYMMETRIC
    scale, zero = choose_qparams_affine(w, how, block, kind, low, high, scale_dtype=torch.float32)
    codes = quantize_affine(w, block, scale, zero, kind, low, high).view(torch.uint8)
    if parsed.bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    groups = (len(w), -1)
    offset = zero.reshape(groups).to(torch.uint8) if parsed.affine else None
    return QuantizedTensor(codes, scale.reshape(groups), offset, tuple(w.shape), parsed)


def _torchao_blocks(w: Tensor, scheme: str) -> tuple[Tensor, Tensor | QuantizedTensor]:
    """Codes and scales of the block formats, which lie as ours do."""
    if scheme == "mxfp4":
        from torchao.prototype.mx_formats.mx_tensor import to_mx

        scale, codes = to_mx(w, torch.float4_e2m1fn_x2, 32)
        return codes.view(torch.uint8).reshape(len(w), -1), scale.view(torch.uint8).reshape(len(w), -1)
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    shared = per_tensor_amax_to_scale(w.abs().max())
    scale, codes = nvfp4_quantize(w, 16, shared)
    blocks = scale.view(torch.uint8).reshape(len(w), -1)
    kept = QuantizedTensor(blocks, shared.reshape(1, 1), None, tuple(blocks.shape), Scheme("fp8_e4m3", "tensor"))
    return codes.view(torch.uint8).reshape(len(w), -1), kept


def with_torch(w: Tensor, scheme: str) -> Any:
    scale = w.abs().amax(dim=1, keepdim=True) / 448
    codes = (w / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return SimpleNamespace(dequantize=lambda: codes.float() * scale)


def prepare(function: Callable[..., Any], case: Case, w: Tensor) -> Callable[[], Any]:
    return lambda: function(w, case["scheme"])


def noise(w: Tensor, quantized: Any) -> float:
    """As a share of the signal."""
    return float((quantized.dequantize().float() - w).double().square().sum() / w.double().square().sum())


def verify(case: Case, w: Tensor, got: Any, want: Any) -> tuple[float, float]:
    """The noise, relative to the reference's; peers that choose codes before they round scales leave a little more."""
    return abs(noise(w, got) / noise(w, want) - 1), 0.02


def figures(case: Case, w: Tensor, got: Any) -> dict[str, float]:
    """Signal to noise, and what it takes."""
    bits = {"bits per weight": got.bits_per_weight} if isinstance(got, QuantizedTensor) else {}
    return {"SQNR dB": -10 * math.log10(noise(w, got)), **bits}


def only(*schemes: str) -> Callable[[Case], bool]:
    return lambda case: case["scheme"] in schemes


# --- the picture ------------------------------------------------------------------------------------------------------


def quality(records: Sequence[Record]) -> str | None:
    """Signal to noise against bits per weight: all formats, and beside it those around 4 bits."""
    points = {
        str(r.case["scheme"]): (r.figures["bits per weight"], r.figures["SQNR dB"])
        for r in records
        if r.role == "reference" and {"bits per weight", "SQNR dB"} <= r.figures.keys()
    }
    if len(points) < 10:
        return None
    figure, axes = new_figure(2, width=6.2, height=5.4)
    windows = (((1.9, 10.1), (6, 48)), ((3.96, 4.9), (15.2, 22.4)))
    for ax, (across, up) in zip(axes, windows, strict=True):
        ax.plot(across, [6.02 * b for b in across], color="#999999", linewidth=1)
        inside = {n: p for n, p in points.items() if across[0] <= p[0] <= across[1] and up[0] <= p[1] <= up[1]}
        for number, (prefixes, family) in enumerate(FAMILIES.items()):
            mine = [p for n, p in inside.items() if n.startswith(prefixes)]
            if mine:
                look: dict[str, Any] = {"color": COLOURS[number], "marker": MARKERS[number], "linestyle": ""}
                ax.plot(*zip(*mine, strict=True), **look, label=family, markersize=6)
        around4 = ax is axes[1]
        crowd = windows[1] if not around4 else None
        named = {n: p for n, p in inside.items() if crowd is None or not _within(p, crowd)}
        _names(ax, named, across, up)
        ax.set(xlim=across, ylim=up, xlabel="bits per weight, scales counted", ylabel="signal to noise (dB)")
        ax.grid(True, alpha=0.3)
    ax = axes[0]
    (x0, x1), (y0, y1) = windows[1]
    ax.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color="#999999", linewidth=0.8, linestyle=":")
    ax.annotate("right", (x1, y0), xytext=(3, 2), textcoords="offset points", fontsize=8, color="#666666")
    ax.annotate("no code can be above", (6.4, 38.5), xytext=(-4, 6), textcoords="offset points", fontsize=8,
                color="#666666", rotation=0, ha="right")  # fmt: skip
    ax.legend(fontsize=8, frameon=False, loc="lower right")
    axes[0].set_title("all formats, on normal numbers", fontsize=10)
    axes[1].set_title("around 4 bits", fontsize=10)
    return to_svg(figure)


def _within(point: tuple[float, float], window: tuple[tuple[float, float], tuple[float, float]]) -> bool:
    return all(low <= value <= high for value, (low, high) in zip(point, window, strict=True))


def _names(ax: Any, points: dict[str, tuple[float, float]], across: Sequence[float], up: Sequence[float]) -> None:
    """A name beside each point: on the first of a few sides where no other name or point is."""
    width, height = (across[1] - across[0]) / 76, (up[1] - up[0]) / 34  # of a letter, and of a line
    taken = [(x - width, y - height / 2, x + width, y + height / 2) for x, y in points.values()]
    taken += [(b, 6.02 * b, b, 6.02 * b) for b in np.linspace(across[0], across[1], 80)]  # the line
    for name, (x, y) in sorted(points.items(), key=lambda item: -item[1][1]):
        wide = len(name) * width
        sides = [
            (x + 1.3 * width, y), (x - 1.3 * width - wide, y), (x - wide / 2, y + 1.1 * height),
            (x - wide / 2, y - 1.1 * height), (x + width, y + 1.1 * height), (x + width, y - 1.1 * height),
            (x - width - wide, y + height), (x - width - wide, y - height),
            (x + width, y + 2.1 * height), (x + width, y - 2.1 * height),
        ]  # fmt: skip
        for left, middle in sides:
            box = (left, middle - height / 2, left + wide, middle + height / 2)
            free = all(box[2] < t[0] or t[2] < box[0] or box[3] < t[1] or t[3] < box[1] for t in taken)
            if free and box[0] >= across[0] and box[2] <= across[1]:
                break
        else:
            left, middle = sides[0]
            box = (left, middle - height / 2, left + wide, middle + height / 2)
        taken.append(box)
        ax.text(left, middle, name, fontsize=7.5, va="center")


REST = tuple(scheme for scheme in DRAWN if scheme not in TIMED)
bench = Benchmark(
    __file__,
    cases={
        "quick": cases(64, 512, ("int8:g32:fp16", "fp8_e4m3")),  # to import the other peers takes seconds
        "default": cases(4096, 4096, TIMED) + cases(1024, 4096, REST),
        "full": cases(4096, 4096, (*TIMED, *REST)) + cases(1024, 11008, TIMED),
    },
    inputs=inputs,
    work=work,
    impls={
        "mlsys": Impl(lambda: rtn.quantize, "reference"),
        "torchao": Impl(
            lambda: with_torchao, "peer", needs="torchao", only=only("int8", "int4:g128", "mxfp4", "nvfp4")
        ),
        "bitsandbytes": Impl(lambda: with_bitsandbytes, "peer", needs="bitsandbytes", only=only("nf4", "nf4:dq")),
        "gguf": Impl(lambda: with_gguf, "peer", needs="gguf", only=only("int8:g32:fp16", "mxfp4")),
        "torch cast": Impl(lambda: with_torch, "peer", only=only("fp8_e4m3")),
    },
    subject="mlsys",
    prepare=prepare,
    verify=verify,
    figures=figures,
    fits=lambda case, device: device == "cpu",
    contract="quant.rtn",
    pictures={"quality": quality},
)

if __name__ == "__main__":
    bench.main()
