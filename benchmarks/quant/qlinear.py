"""Running quantized: how much faster is a product with weights of 8 and 4 bits, and on which path?

M rows of x are multiplied with a matrix of N = K = 4096 and with one that is not square; one case a format, since
each is a product of its own. The weights of several layers are gone through in turn, as a model does: what a cache
still holds of the last product is of no use, and at M = 1 the bytes of the weights decide.

"dequantize" writes blocks of Ŵ out and multiplies; "x in int8" rounds x, too. The peers are a product in
bfloat16, torch's kernels for int8 and int4 (with x in bfloat16, what they are made for), and torchao as its users
have it: int8 weights, int4 weights (its layer, with our codes in it), and int8 weights and activations, eager, and
weights alone at M = 1 also compiled (of large matrices only: compiling takes longer than a quick run).
All are checked against Ŵ in float64: those in bfloat16, or with x rounded, to what their roundings allow.

On a GPU the cases are others, with x in bfloat16: "qlinear" is Triton's kernels there, and "triton, tiles only" those
without the one for few rows of x. The peers are a product in bfloat16, and torchao: int8 weights, int4 weights in
groups of 128, int8 weights and activations, each compiled. Triton's kernels are not timed on a processor.

What to look at: at M = 1 the time follows the bytes, so that int4 could be 32 / 4.3 times as fast as float32; decoding
takes its share. From M = 16 on the multiply-adds, the same in all formats, take the time, and the advantage is small,
but for integer activations: their products are a fourth of the work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlsys.bench import Benchmark, Impl, Plot, Record, Work
from mlsys.quant import PreparedWeight, QuantizedTensor, Scheme, prepare, quantize
from mlsys.quant.qlinear import qlinear

Case = Mapping[str, Any]
CACHED = 96 << 20  # bytes of codes that no cache holds
FORMATS = ("int8", "int4:g128", "nf4", "mxfp4", "nvfp4")
ROUNDED = 3e-2  # an error relative to the largest result


def case(m: int, scheme: str, n: int = 4096, k: int = 4096) -> Case:
    return {"m": m, "n": n, "k": k, "scheme": scheme}


def gpu_case(m: int, scheme: str, n: int = 4096, k: int = 4096) -> Case:
    """Its x is bfloat16."""
    return {**case(m, scheme, n, k), "dtype": "bfloat16"}


def on_gpu(case: Case) -> bool:
    return "dtype" in case


def on_cpu(case: Case) -> bool:
    return not on_gpu(case)


@dataclass(frozen=True)
class Inputs:
    """Rows of x, and the same weight for several layers, each in memory of its own."""

    case: Case
    x: Tensor
    w: Tensor
    qw: list[QuantizedTensor]

    @property
    def layers(self) -> int:
        """How many products a call makes."""
        return len(self.qw)


def inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(case["n"])
    n, k = case["n"], case["k"]
    w = torch.randn(n, k, generator=generator, device=device) * k**-0.5
    x = torch.randn(case["m"], k, generator=generator, device=device)
    qw = quantize(w, case["scheme"])
    # With many rows of x a product takes so long that what a cache holds of the weights does not matter
    layers = max(1, min(12, CACHED // qw.nbytes)) if case["m"] <= 16 and n * k > 1 << 20 else 1
    return Inputs(case, x, w, [dataclasses.replace(qw, codes=qw.codes.clone()) for _ in range(layers)])


def work(case: Case, given: Inputs) -> Work:
    """The operations of one row with each weight, and the bytes that stand for the weights; of all layers."""
    flops = 2 * case["m"] * case["n"] * case["k"] * given.layers
    moved = given.qw[0].nbytes + dtype_of(case).itemsize * case["m"] * (case["n"] + case["k"])
    return Work(flops, moved * given.layers, items=case["m"] * given.layers, unit="rows")


# --- who does it: a function of the inputs that returns a function of x for each layer --------------------------------


@dataclass(frozen=True)
class Maker:
    """One of ours or a peer: makes the products of all layers."""

    layers: Callable[[Inputs], Sequence[Callable[[], Tensor]]]

    def __call__(self, given: Inputs) -> Sequence[Callable[[], Tensor]]:
        return self.layers(given)


def dtype_of(case: Case) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, case.get("dtype", "float32"))
    return dtype


def ours(path: Any = "auto", activations: Any = None, dtype: torch.dtype | None = None) -> Maker:
    def made(given: Inputs) -> Sequence[Callable[[], Tensor]]:
        x = given.x.to(dtype or dtype_of(given.case))

        def layer(w: PreparedWeight) -> Callable[[], Tensor]:
            return lambda: qlinear(x, w, path=path, activations=activations)

        return [layer(prepare(qw, path)) for qw in given.qw]

    return Maker(made)


def tiles_only() -> Maker:
    """The Triton kernel for many rows, at few: with the first of its settings, which are not tuned."""

    def made(given: Inputs) -> Sequence[Callable[[], Tensor]]:
        from mlsys.quant import qlinear_triton

        x = given.x.to(dtype_of(given.case))
        found = qlinear_triton.configs(len(x), given.qw[0], x.dtype)
        tiles = next(one for one in found if "BLOCK_M" in dict(one.constants))

        def layer(w: PreparedWeight) -> Callable[[], Tensor]:
            return lambda: qlinear_triton.qlinear(x, w, config=tiles)

        return [layer(prepare(qw, "triton")) for qw in given.qw]

    return Maker(made)


def matmul(dtype: torch.dtype) -> Maker:
    def made(given: Inputs) -> Sequence[Callable[[], Tensor]]:
        x, w = given.x.to(dtype), given.qw[0].dequantize(dtype)

        def layer(w: Tensor) -> Callable[[], Tensor]:
            return lambda: torch.nn.functional.linear(x, w)

        return [layer(w.clone()) for _ in range(min(4, given.layers))]

    return Maker(made)


def torchao(activations: bool, compiled: bool = False, bits: int = 8) -> Maker:
    def made(given: Inputs) -> Sequence[Callable[[], Tensor]]:
        if bits == 4 and on_cpu(given.case):
            return torchao_int4(compiled)(given)
        from torchao import quantization

        config: Any = (
            quantization.Int8DynamicActivationInt8WeightConfig() if activations else quantization.Int8WeightOnlyConfig()
        )
        if bits == 4:  # in the order of its kernel for a GPU
            config = quantization.Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
        dtype = torch.float32 if activations and on_cpu(given.case) else torch.bfloat16
        x, layers = given.x.to(dtype), []
        for _ in range(min(3, given.layers)):
            linear = torch.nn.Linear(given.case["k"], given.case["n"], bias=False, dtype=dtype, device=given.x.device)
            linear.weight = torch.nn.Parameter(given.w.to(dtype))
            quantization.quantize_(linear, config)
            layers.append(torch.compile(linear) if compiled else linear)

        return [_called(linear, x) for linear in layers]

    return Maker(made)


def torchao_int4(compiled: bool) -> Maker:
    """torchao's layer for a processor, with our codes in it: those that it would find itself are of another grid."""

    def made(given: Inputs) -> Sequence[Callable[[], Tensor]]:
        from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

        x, layers = given.x.to(torch.bfloat16), []
        for qw in given.qw:
            packed = prepare(qw, "int4pack").packed
            assert packed is not None
            codes, grid = packed
            linear = torch.nn.Linear(qw.columns, qw.rows, bias=False, dtype=torch.bfloat16, device="meta")
            weight = Int4OpaqueTensor(codes, grid, [1, int(qw.scheme.group)], torch.Size((qw.rows, qw.columns)))
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            layers.append(torch.compile(linear) if compiled else linear)

        return [_called(linear, x) for linear in layers]

    return Maker(made)


def _called(linear: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return linear(x)

    return call


def prepare_call(function: Any, case: Case, given: Inputs) -> Callable[[], Any]:
    """A call makes the products of all layers; whoever holds fewer goes through them again. The last is the result."""
    if isinstance(function, Maker):
        layers = list(function(given))
    else:
        scheme = given.qw[0].scheme
        group = scheme.group_size(case["k"])

        def layer(qw: QuantizedTensor) -> Callable[[], Tensor]:
            scale = qw.scales()
            return lambda: function(
                given.x, qw.codes, scale, qw.zero, None, bits=scheme.bits, group=group, activations=None
            )

        layers = [layer(qw) for qw in given.qw]

    def call() -> Tensor:
        for i in range(given.layers):
            y = layers[i % len(layers)]()
        return y

    return call


def verify(case: Case, given: Inputs, got: Tensor, want: Tensor) -> tuple[float, float]:
    """Largest error of a result, relative to the largest number of the reference's.

    Results in bfloat16 and those of rounded x err by their roundings; `figures` says how much.
    """
    error = float((got.float() - want.float()).abs().max() / want.abs().max())
    return error, ROUNDED


def figures(case: Case, given: Inputs, got: Tensor) -> dict[str, float]:
    """How far the last product is from x Ŵᵀ in float64, relative to its size."""
    want = given.x.double() @ given.qw[0].dequantize().double().T
    return {"relative error": float((got.double() - want).norm() / want.norm())}


def is_int8(case: Case) -> bool:
    return case["scheme"] == "int8" and on_cpu(case)


def is_integer(case: Case) -> bool:
    return case["scheme"].startswith("int")


def large_int8(case: Case) -> bool:
    """Not the quick cases: importing torchao takes longer than all of them."""
    return is_int8(case) and case["n"] >= 4096


def compiles(case: Case) -> bool:
    return large_int8(case) and case["m"] == 1


def packs(case: Case) -> bool:
    scheme = Scheme.parse(case["scheme"])
    return on_cpu(case) and scheme.format == "int4" and scheme.group in (32, 64, 128, 256) and case["n"] % 16 == 0


def large_int4(case: Case) -> bool:
    return on_cpu(case) and case["scheme"] == "int4:g128" and case["n"] >= 4096


def gpu_int8(case: Case) -> bool:
    return on_gpu(case) and case["scheme"] == "int8"


def gpu_int4(case: Case) -> bool:
    return on_gpu(case) and case["scheme"] == "int4:g128"


# --- the picture ------------------------------------------------------------------------------------------------------


def picture(records: Sequence[Record]) -> str | None:
    """How many times as fast as float32's product each path is: rows of x to the right, a panel a format and shape."""
    from mlsys.bench.plots import COLOURS, LINES, MARKERS, new_figure, to_svg

    panels: dict[tuple[int, int, str], list[Record]] = {}
    for record in records:
        if record.ratio_to_reference and record.role != "reference":
            panels.setdefault((record.case["n"], record.case["k"], record.case["scheme"]), []).append(record)
    panels = {key: found for key, found in panels.items() if len({r.case["m"] for r in found}) > 1}
    if not panels:
        return None
    names = list(dict.fromkeys(r.impl for found in panels.values() for r in found))
    figure, axes = new_figure(2, -(-len(panels) // 2))
    keys: dict[str, Any] = {}
    for ax, ((n, k, scheme), found) in zip(axes, panels.items(), strict=False):
        for style, name in enumerate(names):
            points = sorted((r.case["m"], r.ratio_to_reference) for r in found if r.impl == name)
            if not points:
                continue
            rows, ratios = zip(*points, strict=True)
            look: dict[str, Any] = {
                "color": COLOURS[(style + style // len(COLOURS)) % len(COLOURS)],
                "marker": MARKERS[style % len(MARKERS)],
                "linestyle": LINES[style % len(LINES)],
            }
            (keys[name],) = ax.plot(rows, [1 / ratio for ratio in ratios], **look, label=name)
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ticks = sorted({r.case["m"] for r in found})
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set(title=f"{scheme}, {n} × {k}", xlabel="rows of x", ylabel="times as fast as float32")
        ax.grid(True, alpha=0.3)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    figure.legend(handles=[keys[name] for name in names], loc="outside right upper", fontsize=8, frameon=False)
    return to_svg(figure)


bench = Benchmark(
    __file__,
    cases={
        "quick": [
            case(1, "int4:g128", 512, 768),
            case(1, "int8", 512, 768),
            case(16, "int4:g128", 512, 768),
            *(gpu_case(m, scheme) for scheme in ("int4:g128", "int8") for m in (1, 512)),
        ],
        "default": [
            *(gpu_case(m, scheme) for m in (1, 4, 16, 64, 512, 4096) for scheme in ("int8", "int4:g128")),
            *(gpu_case(m, scheme, 14336, 4096) for m in (1, 16) for scheme in ("int8", "int4:g128")),
            *(case(m, scheme) for m in (1, 4, 16, 64, 512) for scheme in ("int8", "int4:g128")),
            *(case(m, scheme) for m in (1, 16) for scheme in FORMATS[2:]),
            *(case(m, scheme, 11008, 4096) for m in (1, 512) for scheme in ("int8", "int4:g128")),
        ],
        "full": [
            *(gpu_case(m, scheme) for m in (1, 2, 4, 8, 16, 32, 64, 512, 4096) for scheme in ("int8", "int4:g128")),
            *(
                gpu_case(m, scheme, n, k)
                for n, k in ((14336, 4096), (4096, 14336))
                for m in (1, 16, 512)
                for scheme in ("int8", "int4:g128")
            ),
            *(case(m, scheme) for m in (1, 2, 4, 8, 16, 64, 512) for scheme in FORMATS),
            *(case(m, scheme, n, k) for n, k in ((11008, 4096), (4096, 11008)) for m in (1, 512) for scheme in FORMATS),
        ],
    },
    inputs=inputs,
    work=work,
    impls={
        "fp32 matmul": Impl(lambda: matmul(torch.float32), "reference"),
        "qlinear": Impl(lambda: ours(), "ours"),
        "qlinear, x in int8": Impl(lambda: ours(activations="int8"), "ours", only=is_integer),
        "triton, tiles only": Impl(tiles_only, "variant", "triton", only=lambda case: on_gpu(case) and case["m"] <= 8),
        "dequantize": Impl(lambda: ours("dequantize"), "variant"),
        "int_mm": Impl(
            lambda: ours("int_mm", "int8"),
            "variant",
            only=lambda case: is_int8(case) or (gpu_int8(case) and case["m"] > 16),
        ),
        "int8pack": Impl(lambda: ours("int8pack", dtype=torch.bfloat16), "peer", only=is_int8),
        "int4pack": Impl(lambda: ours("int4pack", dtype=torch.bfloat16), "peer", only=packs),
        "bf16 matmul": Impl(lambda: matmul(torch.bfloat16), "peer"),
        "torchao int8 weights": Impl(lambda: torchao(False), "peer", "torchao", only=large_int8),
        "torchao int8, x in int8": Impl(lambda: torchao(True), "peer", "torchao", only=large_int8),
        "torchao int8 weights, compiled": Impl(
            lambda: torchao(False, True), "peer", "torchao", only=lambda case: compiles(case) or gpu_int8(case)
        ),
        "torchao int4 weights": Impl(lambda: torchao(False, bits=4), "peer", "torchao", only=large_int4),
        "torchao int4 weights, compiled": Impl(
            lambda: torchao(False, True, 4),
            "peer",
            "torchao",
            only=lambda case: (large_int4(case) and case["m"] == 1) or gpu_int4(case),
        ),
        "torchao int8, x in int8, compiled": Impl(lambda: torchao(True, True), "peer", "torchao", only=gpu_int8),
    },
    subject="qlinear",
    prepare=prepare_call,
    verify=verify,
    figures=figures,
    yours=lambda case: on_cpu(case) and is_integer(case),
    contract="quant.qlinear",
    fits=lambda case, device: on_gpu(case) == (device != "cpu"),
    plots=[
        Plot(
            x="m",
            xlabel="rows of x",
            panel=("scheme",),
            y="time",
            per="m",
            only=lambda case: case["n"] == case["k"] and is_integer(case),
        )
    ],
    pictures={"speed-up": picture},
)

if __name__ == "__main__":
    bench.main()
