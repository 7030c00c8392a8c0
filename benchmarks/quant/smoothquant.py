"""SmoothQuant: how much of the error of 8-bit products do outliers make, and what does handing them over leave?

A layer's inputs are normal, with one column in a hundred 60 times larger, the same ones for all tokens; some cases have
none. Weights and inputs are rounded to 8 bits, and the integers multiplied: "as it is", and with columns divided by s
and the weights multiplied by it. What is timed is the work once a layer, from inputs to
smoothed weights, which is done before a model runs. The peer is torchao's observer, which finds the same s.

What to look at: the error, for one scale a token and for one scale for all of x. α = ½ takes away nearly all that
outliers do; α = 1 leaves the weights what x had. Without outliers there is little to gain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlsys.bench import Benchmark, Impl, Record, Work
from mlsys.quant import qlinear, quantize
from mlsys.quant.smoothquant import absmax, smooth, smooth_scale

Case = Mapping[str, Any]
LARGER, SHARE = 60.0, 0.01  # outliers


def case(columns: int, rows: int, *, alpha: float = 0.5, outliers: bool = True) -> Case:
    return {"columns": columns, "rows": rows, "alpha": alpha, "outliers": outliers}


@dataclass(frozen=True)
class Inputs:
    """Calibration inputs (512, K), others to judge by, and weights (N, K)."""

    x: Tensor
    others: Tensor
    w: Tensor


def inputs(case: Case, device: str) -> Inputs:
    columns = case["columns"]
    generator = torch.Generator(device).manual_seed(columns)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    size = torch.exp(0.3 * draw(columns))
    if case["outliers"]:
        turn = torch.randperm(columns, generator=generator, device=device)
        size[turn[: max(1, int(SHARE * columns))]] *= LARGER
    return Inputs(draw(512, columns) * size, draw(512, columns) * size, 0.02 * draw(case["rows"], columns))


def work(case: Case, given: Inputs) -> Work:
    """Inputs are read once, weights twice, and written once."""
    return Work(flops=0, bytes=given.x.nbytes + 3 * given.w.nbytes, items=1, unit="layers")


def ours(given: Inputs, alpha: float) -> tuple[Tensor, Tensor]:
    """The scale, and the weights times it."""
    s = smooth_scale(absmax(given.x), given.w, alpha)
    return s, smooth(given.w, s)


def torchao(given: Inputs, alpha: float) -> tuple[Tensor, Tensor]:
    from torchao.prototype.smoothquant.core import SmoothQuantObserver

    observer = SmoothQuantObserver(given.w, alpha)
    observer(given.x)
    s, _, _ = observer.calculate_qparams()
    return s, given.w * s


def prepare(function: Callable[..., Any], case: Case, given: Inputs) -> Callable[[], Any]:
    if function in (ours, torchao):
        return lambda: function(given, case["alpha"])

    def theirs() -> tuple[Tensor, Tensor]:
        s, (w,) = function(absmax(given.x), [given.w], case["alpha"])
        return s, w

    return theirs


def verify(case: Case, given: Inputs, got: Any, want: Any) -> tuple[float, float]:
    """The largest relative difference of s."""
    return float(((got[0] - want[0]) / want[0]).abs().max()), 1e-4


def error(x: Tensor, w: Tensor, want: Tensor, *, one_scale: bool = False) -> float:
    """Squared, relative, of the product of both in 8 bits."""
    weight = quantize(w, "int8")
    if one_scale:
        y = quantize(x, "int8:tensor").dequantize() @ weight.dequantize().T
    else:
        y = qlinear(x, weight, activations="int8")
    return float((y - want).double().square().sum() / want.double().square().sum())


def figures(case: Case, given: Inputs, got: Any) -> dict[str, float]:
    """Errors of inputs that were not calibrated with, as they are and smoothed."""
    s, w = got
    want = (given.others.double() @ given.w.double().T).float()
    return {
        "error": error(given.others / s, w, want),
        "as it is": error(given.others, given.w, want),
        "error, one scale": error(given.others / s, w, want, one_scale=True),
        "as it is, one scale": error(given.others, given.w, want, one_scale=True),
    }


# --- the picture ------------------------------------------------------------------------------------------------------


def picture(records: Sequence[Record]) -> str | None:
    """Errors against α."""
    from mlsys.bench.plots import COLOURS, LINES, MARKERS, new_figure, to_svg

    shown = [r for r in records if r.role == "reference" and r.case["columns"] == STUDY and "error" in r.figures]
    if len(shown) < 3:
        return None
    figure, axes = new_figure(2)
    for ax, outliers in zip(axes, (True, False), strict=True):
        mine = sorted((r for r in shown if r.case["outliers"] == outliers), key=lambda r: float(r.case["alpha"]))
        for style, (name, label) in enumerate({"": "a scale for each token", ", one scale": "one scale"}.items()):
            look: dict[str, Any] = {"color": COLOURS[style], "linestyle": LINES[style]}
            alphas = [r.case["alpha"] for r in mine]
            ax.plot(alphas, [r.figures["error" + name] for r in mine], marker=MARKERS[style], label=label, **look)
            if mine:
                ax.axhline(mine[0].figures["as it is" + name], alpha=0.5, label=f"{label}, not smoothed", **look)
        ax.set_yscale("log")
        ax.set(title="with outliers" if outliers else "without", xlabel="α", ylabel="squared error, relative")
        ax.grid(True, alpha=0.3)
        ax.legend(frameon=False, fontsize=7)
    return to_svg(figure)


STUDY = 1024
ALPHAS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
bench = Benchmark(
    __file__,
    cases={
        "quick": [case(256, 96), case(256, 96, alpha=0.9, outliers=False)],
        "default": [
            *(case(STUDY, 768, alpha=alpha, outliers=outliers) for outliers in (True, False) for alpha in ALPHAS),
            case(4096, 4096),
        ],
        "full": [
            *(case(STUDY, 768, alpha=alpha, outliers=outliers) for outliers in (True, False) for alpha in ALPHAS),
            case(4096, 4096),
            case(4096, 11008),
            case(11008, 4096),
        ],
    },
    inputs=inputs,
    work=work,
    impls={
        "mlsys": Impl(lambda: ours, "reference"),
        "torchao": Impl(lambda: torchao, "peer", needs="torchao"),
    },
    subject="mlsys",
    prepare=prepare,
    verify=verify,
    figures=figures,
    contract="quant.smoothquant",
    pictures={"alpha": picture},
)

if __name__ == "__main__":
    bench.main()
