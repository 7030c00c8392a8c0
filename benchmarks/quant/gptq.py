"""GPTQ: what does one factor H = U D Uᵀ in place of an inverse save, and what does rounding by H gain over the nearest?

The peer "original" is the algorithm as its paper prints it: H inverted by way of its Cholesky factor, the inverse
factored once more, columns rounded one by one with errors carried on within a block of 128, then to the rest. Both
start from the same H and the same grids, and both must end with the same loss. The reference is ours with blocks of
128 as well, in place of 16: how many columns are rounded one by one before large products take over.

What to look at: the time. The original's inverse and second factor cost three times the first factor, and its columns,
which lie apart in memory, update the rest of their block one at a time. And the loss against the bits: GPTQ leaves
about the same share of what rounding to nearest leaves, whatever the bits, so it is worth most where they are few. The
inputs here are strongly correlated, as those of layers are; on independent inputs the two methods are one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlsys.bench import Benchmark, Impl, Plot, Record, Work
from mlsys.quant import QuantizedTensor, Scheme, quantize
from mlsys.quant.gptq import gptq, hessian

Case = Mapping[str, Any]
BLOCK, DAMP = 128, 0.01  # of the paper
SAME = 1e-3  # relative difference of losses
ONE_ROW = 0.5  # what a number halfway between two codes, and those after it, may change in the loss of its row


def case(scheme: str, rows: int, columns: int | None = None, **options: bool) -> Case:
    """Options: dynamic, activation."""
    return {"scheme": scheme, "rows": rows, "columns": columns or rows, **options}


@dataclass(frozen=True)
class Inputs:
    """Weights (R, K), Σ x xᵀ of 2K inputs (K, K), and the squared outputs; those of what round-to-nearest leaves."""

    w: Tensor
    H: Tensor
    size: float
    nearest: float

    def loss(self, values: Tensor) -> float:
        """As `mlsys.quant.gptq.loss`, in one product instead of two: the other is of w alone."""
        return squared(self.w - values, self.H) / self.size


def squared(m: Tensor, H: Tensor) -> float:
    """tr(m H mᵀ)."""
    return float(((m @ H) * m).sum(dtype=torch.float64))


def inputs(case: Case, device: str) -> Inputs:
    """Inputs that lie mostly in a quarter of all directions, with columns of unequal size; normal weights."""
    rows, columns = case["rows"], case["columns"]
    generator = torch.Generator(device).manual_seed(columns)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    few = max(columns // 4, 1)
    x = draw(2 * columns, few) @ draw(few, columns) / math.sqrt(few) + 0.3 * draw(2 * columns, columns)
    H = hessian(x * torch.exp(0.5 * draw(columns)))
    w = 0.02 * draw(rows, columns)
    nearest = quantize(w, case["scheme"]).dequantize()
    return Inputs(w, H, squared(w, H), squared(w - nearest, H))


def work(case: Case, given: Inputs) -> Work:
    """A factor of H, and each column's error for each column after it."""
    rows, columns = given.w.shape
    return Work(flops=columns**3 / 3 + rows * columns**2, bytes=given.w.nbytes + given.H.nbytes)


def original(w: Tensor, H: Tensor, scheme: str, *, groups: str = "static") -> Tensor:
    """Algorithm 1 of the paper, line by line, for integers with zero points; what the codes stand for."""
    grid = Scheme.parse(scheme)
    size, largest = grid.group_size(w.shape[1]), grid.element.largest
    w = w.clone()
    damped = H + DAMP * H.diagonal().mean() * torch.eye(len(H), device=H.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    done = torch.zeros_like(w)

    def grid_of(group: Tensor) -> tuple[Tensor, Tensor]:
        low, high = group.amin(dim=1).clamp(max=0), group.amax(dim=1).clamp(min=0)
        scale = (high - low) / largest
        return scale, (-low / scale).round()

    grids = [grid_of(w[:, start : start + size]) for start in range(0, w.shape[1], size)]
    for start in range(0, w.shape[1], BLOCK):
        stop = min(start + BLOCK, w.shape[1])
        now = w[:, start:stop].clone()
        error = torch.zeros_like(now)
        for k in range(stop - start):
            if groups == "dynamic" and (start + k) % size == 0:
                grids[(start + k) // size] = grid_of(torch.cat((now[:, k:], w[:, stop:]), dim=1)[:, :size])
            scale, zero = grids[(start + k) // size]
            row = factor[start + k, start + k : stop]
            done[:, start + k] = scale * ((now[:, k] / scale + zero).round().clamp(0, largest) - zero)
            error[:, k] = (now[:, k] - done[:, start + k]) / row[0]
            now[:, k:] -= error[:, k, None] * row
        w[:, stop:] -= error @ factor[start:stop, stop:]
    return done


def prepare(function: Callable[..., Any], case: Case, given: Inputs) -> Callable[[], Any]:
    options = {"groups": "dynamic"} if case.get("dynamic") else {}
    if case.get("activation"):
        options["order"] = "activation"
    return lambda: function(given.w, given.H, case["scheme"], **options)


def values(got: Any) -> Tensor:
    found: Tensor = got if isinstance(got, Tensor) else got.dequantize()
    return found


def verify(case: Case, given: Inputs, got: Any, want: Any) -> tuple[float, float]:
    """The loss, relative to that of the reference."""
    mine, theirs = (given.loss(values(result)) for result in (got, want))
    return abs(mine / theirs - 1), max(SAME, ONE_ROW / len(given.w))


def figures(case: Case, given: Inputs, got: Any) -> dict[str, float]:
    """The loss, as a share of the outputs and of what rounding to nearest leaves; bits per weight."""
    found = given.loss(values(got))
    bits = {"bits per weight": got.bits_per_weight} if isinstance(got, QuantizedTensor) else {}
    return {"loss": found, "of nearest": found * given.size / given.nearest, **bits}


# --- the picture ------------------------------------------------------------------------------------------------------


def shared(case: Case) -> str | None:
    """Who shares a scale, where a case is one of those that differ in this and in bits only; else the format."""
    if case["columns"] != STUDY or case["rows"] != STUDY or case.get("dynamic") or case.get("activation"):
        return None
    kind, _, group = case["scheme"].partition(":")
    return {"": "per row", "g128": "groups of 128", "g32": "groups of 32"}[group] if kind.startswith("int") else kind


def picture(records: Sequence[Record]) -> str | None:
    """Left the loss against bits per weight, of GPTQ and of rounding to nearest; right the one over the other."""
    from mlsys.bench.plots import COLOURS, LINES, MARKERS, new_figure, to_svg

    shown = [r for r in records if r.impl == "gptq" and shared(r.case) and "bits per weight" in r.figures]
    if not shown:
        return None
    figure, (left, right) = new_figure(2, width=5.0)
    for style, name in enumerate(dict.fromkeys(shared(r.case) for r in shown)):
        points = sorted(
            (r.figures["bits per weight"], r.figures["loss"], r.figures["of nearest"])
            for r in shown
            if shared(r.case) == name
        )
        bits, losses, shares = zip(*points, strict=True)
        look: dict[str, Any] = {"color": COLOURS[style % len(COLOURS)], "marker": MARKERS[style % len(MARKERS)]}
        line = LINES[style % len(LINES)]
        left.plot(bits, losses, **look, linestyle=line, label=f"{name}, GPTQ")
        nearest = [x / share for x, share in zip(losses, shares, strict=True)]
        left.plot(bits, nearest, **look, linestyle=line, fillstyle="none", label=f"{name}, nearest")
        right.plot(bits, shares, **look, linestyle=line, label=str(name))
    left.set_yscale("log")
    left.set(title=f"{STUDY} × {STUDY}", xlabel="bits per weight", ylabel="squared error of outputs, relative")
    right.set(title="GPTQ ÷ nearest", xlabel="bits per weight", ylabel="share of the error that is left")
    right.set_ylim(bottom=0)
    for ax in (left, right):
        ax.grid(True, alpha=0.3)
        ax.legend(frameon=False, fontsize=7)
    return to_svg(figure)


STUDY = 1024  # rows and columns, where formats are compared
SIZES = (512, 1024, 2048, 4096)
FORMATS = [
    *(f"int{bits}{group}" for group in ("", ":g128", ":g32") for bits in (2, 3, 4, 5, 6)),
    *("nf4", "mxfp4", "nvfp4"),
]
FEW = [scheme for scheme in FORMATS if scheme[:4] not in ("int5", "int6", "nvfp")]
bench = Benchmark(
    __file__,
    cases={
        "quick": [
            case("int3:g32", 32, 64, dynamic=True),
            case("mxfp4", 32, 64),
        ],
        "default": [
            *(case("int4:g128", n) for n in SIZES),
            case("int3:g128", STUDY, dynamic=True),
            case("int3:g128", STUDY, activation=True),
            *(case(scheme, STUDY) for scheme in FEW if scheme != "int4:g128"),
        ],
        "full": [
            *(case("int4:g128", n) for n in SIZES),
            case("int4:g128", 11008, 4096),
            case("int4:g128", 4096, 1024),
            case("int4:g128", 1024, 4096),
            case("int4:g128", 4096, dynamic=True),
            *(case("int4:g128", n, activation=True) for n in SIZES),
            *(case(scheme, STUDY) for scheme in FORMATS if scheme != "int4:g128"),
        ],
    },
    inputs=inputs,
    work=work,
    impls={
        "block of 128": Impl(lambda: partial(gptq, block=BLOCK), "reference"),
        "gptq": Impl(lambda: gptq, "ours"),
        "original": Impl(
            lambda: original, "peer", only=lambda c: c["scheme"].startswith("int") and not c.get("activation")
        ),
    },
    subject="gptq",
    prepare=prepare,
    verify=verify,
    figures=figures,
    yours=lambda c: not c.get("dynamic") and not c.get("activation"),
    contract="quant.gptq",
    plots=(
        Plot(
            x="columns",
            xlabel="rows and columns, int4, groups of 128",
            only=lambda c: c == case("int4:g128", c["columns"]),
        ),
    ),
    pictures={"loss": picture},
)

if __name__ == "__main__":
    bench.main()
