"""A small language model quantized: which method loses how much at how many bits, and what do outliers do to int8?

The model was trained on this machine from the source of Python's standard library; nats a byte are those of files that
it was not trained on. All linear layers are quantized (the token embedding, which is also the output, is not). Times
are those of `quantize_`, calibration on 64 windows of training text included.

What to look at: left, the loss that each method adds, against bits a weight. At 8 bits there is nothing to
choose between; below 5, each bit less costs four to six times as much. Right, outliers of growing size, planted such
that the float model stays what it is: three columns of what each norm puts out are made larger, and the weights that
read them smaller. One scale for all inputs is lost then, one for each token little better; SmoothQuant hands the
outliers back, LLM.int8() takes them out. AWQ has little to do where no column of the inputs is much larger than others,
as in this model without planted ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mlsys.bench import Benchmark, Impl, Record, Work
from mlsys.data import text
from mlsys.data.trained import trained
from mlsys.models._layers import Block
from mlsys.models.training import evaluate
from mlsys.models.transformer import Transformer
from mlsys.quant import Scheme
from mlsys.quant.llm_int8 import outliers
from mlsys.quant.model import QuantizedLinear, quantize_
from mlsys.quant.qlinear import round_rows

Case = Mapping[str, Any]
SEQ, BATCH = 128, 16
CALIBRATION = {"small": 64, "tiny": 4}  # windows
EVALUATED = {"small": 200, "tiny": 16}  # the same
PLANTED = (5, 23, 30)  # columns, of 64 or 32
SAME, SAME_INTEGERS = 1e-3, 5e-2  # relative: sums in another order; and an input rounded to the other side


def case(scheme: str, *, model: str = "small", planted: int = 0) -> Case:
    """`planted`: how many times larger a few columns of the inputs are made; 0: none, and only weights are rounded."""
    return {"model": model, "scheme": scheme, "planted": planted}


@dataclass(frozen=True)
class Inputs:
    """The float model, its loss on text that it has not seen, that text, and calibration inputs."""

    model: Transformer
    nats: float
    stream: np.ndarray
    windows: int
    calibration: list[Tensor]


@cache
def streams() -> tuple[np.ndarray, np.ndarray]:
    """Tokens of training and held-out files."""
    train, held_out = (text.tokens(files, text.Bytes()) for files in text.split(text.corpus("stdlib")))
    return train, held_out


@cache
def base(name: str) -> Transformer:
    """The model as it was trained."""
    return trained(name)[0]


@cache
def loaded(name: str, planted: int) -> Inputs:
    model = copy.deepcopy(base(name))
    if planted:
        plant_(model, planted)
    train, held_out = streams()
    starts = np.linspace(0, len(train) - SEQ - 1, CALIBRATION[name]).astype(np.int64)
    windows = torch.stack([torch.from_numpy(train[start : start + SEQ].astype(np.int64)) for start in starts])
    nats = evaluate(model, held_out, SEQ, windows=EVALUATED[name])
    return Inputs(model, nats, held_out, EVALUATED[name], list(windows.split(BATCH)))


@torch.no_grad()
def plant_(model: Transformer, times: float) -> None:
    """Columns of what norms put out `times` larger, those of the weights that read them as much smaller."""
    columns = list(PLANTED)
    for block in model.blocks:
        assert isinstance(block, Block)
        attention, mlp = block.attention, block.mlp
        for norm, readers in (
            (block.attention_norm, (attention.q, attention.k, attention.v)),
            (block.mlp_norm, (mlp.gate, mlp.up)),
        ):
            assert isinstance(norm.weight, Tensor)
            norm.weight[columns] *= times
            for reader in readers:
                assert reader is not None  # of a model with SwiGLU
                reader.weight[:, columns] /= times


def inputs(case: Case, device: str) -> Inputs:
    return loaded(case["model"], case["planted"])


def work(case: Case, given: Inputs) -> Work:
    """A forward pass over the calibration inputs; the weights once."""
    weights = sum(layer.weight.numel() for layer in given.model.modules() if isinstance(layer, nn.Linear))
    tokens = sum(batch.numel() for batch in given.calibration)
    return Work(flops=2.0 * weights * tokens, bytes=4.0 * weights)


# --- methods ----------------------------------------------------------------------------------------------------------


def method(name: str, **options: Any) -> Callable[[], Callable[..., Any]]:
    """`quantize_` with this method, whatever is asked for."""

    def quantized(module: nn.Module, scheme: str, method: str, calibration: Any = None, exclude: Any = ()) -> Any:
        return quantize_(module, scheme, name, calibration, exclude=list(exclude), **options)

    return lambda: quantized


class PerTensor(nn.Module):
    """Inputs rounded with one scale for all of them, as a static or dynamic scale of the whole tensor would."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().max() / 127
        y: Tensor = self.layer((x / scale).round() * scale)
        return y


def per_tensor(module: nn.Module, scheme: str, method: str, calibration: Any = None, exclude: Any = ()) -> Any:
    """Weights to nearest; inputs with one scale."""
    report = quantize_(module, scheme, exclude=list(exclude))
    for name, layer in list(module.named_modules()):
        if isinstance(layer, QuantizedLinear):
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, PerTensor(layer))
    return report


def prepare(function: Callable[..., Any], case: Case, given: Inputs) -> Callable[[], Any]:
    calibration = given.calibration

    def quantized() -> Transformer:
        model = copy.deepcopy(given.model)
        function(model, case["scheme"], "gptq", calibration=calibration, exclude=[])
        return model

    return quantized


# --- checks and figures -----------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """What a quantized layer computes, in float operations on matrices that are written out."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.layer, self.matrix = layer, layer.quantized.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        x = x if layer.divisor is None else x / layer.divisor
        if not layer.activations:
            return functional.linear(x, self.matrix, layer.bias)
        exact = torch.zeros(x.shape[-1], dtype=torch.bool)
        matrix = self.matrix
        if layer.threshold is not None:
            exact[outliers(x, layer.threshold)] = True
        if layer.outlier_columns is not None and layer.outlier_weight is not None:
            exact[layer.outlier_columns] = True
            matrix = matrix.index_copy(1, layer.outlier_columns, layer.outlier_weight)
        codes, scale = round_rows((x * ~exact).flatten(0, -2))
        rounded = (codes * scale).reshape(x.shape)
        return functional.linear(torch.where(exact, x, rounded), matrix, layer.bias)


def verify(case: Case, given: Inputs, got: Any, want: Any) -> tuple[float, float]:
    """Logits of the quantized model, against those of its layers written out in plain torch."""
    plain, integers = copy.deepcopy(got), False
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, QuantizedLinear):
            parent, _, last = name.rpartition(".")
            setattr(plain.get_submodule(parent), last, Plain(layer))
            integers |= layer.activations is not None
        integers |= isinstance(layer, PerTensor)
    with torch.no_grad():
        ours, theirs = (model(given.calibration[0][:4]) for model in (got, plain))
    error = float((ours - theirs).norm() / theirs.norm())
    return error, SAME_INTEGERS if integers else SAME


def figures(case: Case, given: Inputs, got: Any) -> dict[str, float]:
    """Loss on unseen text, what of it is due to quantization, and bits a weight of the linear layers.

    Divisors of inputs are not counted: those of SmoothQuant and AWQ could be put into the norm before at no cost.
    """
    nats = evaluate(got, given.stream, SEQ, windows=given.windows)
    layers = [layer for layer in got.modules() if isinstance(layer, QuantizedLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    nbytes = sum(layer.nbytes - (layer.divisor.nbytes if layer.divisor is not None else 0) for layer in layers)
    bits = 8 * nbytes / weights if weights else math.nan
    return {"nats/byte": nats, "added": nats - given.nats, "bits per weight": bits}


# --- the picture ------------------------------------------------------------------------------------------------------


def picture(records: Sequence[Record]) -> str | None:
    """Added loss: left against bits per weight, right against the size of planted outliers at int8."""
    from mlsys.bench.plots import COLOURS, LINES, MARKERS, new_figure, to_svg

    shown = [r for r in records if "added" in r.figures and r.case["model"] == "small"]
    if not shown:
        return None
    figure, (left, right) = new_figure(2, width=5.0)
    for ax, planted in ((left, False), (right, True)):
        there = [r for r in shown if bool(r.case["planted"]) == planted]
        for style, name in enumerate(dict.fromkeys(r.impl for r in there)):
            lines: dict[int | str, list[tuple[float, float]]] = {}  # one for each size of group
            for r in there:
                if r.impl == name:
                    x = r.case["planted"] if planted else r.figures["bits per weight"]
                    lines.setdefault(Scheme.parse(r.case["scheme"]).group, []).append(
                        (x, max(r.figures["added"], LEAST))
                    )
            for number, points in enumerate(lines.values()):
                ax.plot(
                    *zip(*sorted(points), strict=True),
                    color=COLOURS[style % len(COLOURS)],
                    marker=MARKERS[style % len(MARKERS)],
                    linestyle=LINES[style % len(LINES)],
                    label=None if number else name,
                )
        ax.set_yscale("log")
        ax.set_ylabel("added nats a byte")
        ax.grid(True, alpha=0.3)
        if ax.lines:
            ax.legend(frameon=False, fontsize=7)
    left.set(title="weights alone", xlabel="bits per weight, scales and zero points included")
    right.set(title="int8 weights, and inputs but for rtn", xlabel="outliers, times as large as the column was")
    if right.lines:
        right.set_xscale("log")
    return to_svg(figure)


LEAST = 1e-4  # nats: less is noise, and drawn here
BITS = (8, 6, 5, 4, 3, 2)
TIMES = (1, 3, 10, 30, 100)
bench = Benchmark(
    __file__,
    cases={
        "quick": [case("int3:g32:bf16", model="tiny"), case("int8", model="tiny", planted=30)],
        "default": [
            *(case(f"int{bits}:g64:affine:bf16") for bits in BITS),
            case("int2:g16:bf16"),
            *(case("int8", planted=times) for times in TIMES),
        ],
        "full": [
            *(case(f"int{bits}:g64:affine:bf16") for bits in BITS),
            *(case(f"int{bits}:g16:bf16") for bits in (4, 3, 2)),
            *(case("int8", planted=times) for times in (*TIMES, 300)),
        ],
    },
    inputs=inputs,
    work=work,
    impls={
        "rtn": Impl(method("rtn"), "reference"),
        **{name: Impl(method(name), "ours", only=lambda c: not c["planted"]) for name in ("hqq", "awq", "gptq")},
        "gptq in sequence": Impl(method("gptq", sequential=True), "variant", only=lambda c: not c["planted"]),
        "w8a8 per tensor": Impl(lambda: per_tensor, "variant", only=lambda c: bool(c["planted"])),
        "w8a8 per token": Impl(method("rtn", activations="int8"), "variant", only=lambda c: bool(c["planted"])),
        **{name: Impl(method(name), "ours", only=lambda c: bool(c["planted"])) for name in ("smoothquant", "llm_int8")},
    },
    subject="gptq",
    prepare=prepare,
    verify=verify,
    figures=figures,
    yours=lambda c: not c["planted"],
    contract="quant.model",
    pictures={"loss": picture},
)

if __name__ == "__main__":
    bench.main()
