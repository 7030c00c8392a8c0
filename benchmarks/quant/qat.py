"""QAT: does training with the rounding in place beat rounding afterwards at 2 and 3 bits, and what does a step cost?

Two kinds of cases. "digits": a small network learns scikit-learn's handwritten digits, 1,200 of them, and is judged by
the other 597. All start from the same network of 30 epochs and train 30 more: without rounding, and then rounded to
nearest ("rounded after"); or with it, with scales that span min … max ("trained") or learned steps ("learned").
Means of three seeds. What is timed there is a training step. "weights": rounding a matrix and its gradient, with the
peers: torch's own fake quantization, which is given the scales, and torchao's, which finds them as we do.

What to look at: the accuracies. The fewer bits, the more the training wins: at 4 bits it makes up for all that rounding
afterwards loses, at 2 it decides. There it matters that the step is learned: three codes that span all weights are
nearly all 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlsys.bench import Benchmark, Impl, Record, Work
from mlsys.quant import Scheme, quantize
from mlsys.quant.qat import Range, convert_, fake_quantize, first_step, lsq, prepare_

Case = Mapping[str, Any]
TRAINED, BATCH, HIDDEN = 1200, 64, 16
WAYS: dict[Range, str] = {"minmax": "trained", "learned": "learned"}


def weights(scheme: str, rows: int, columns: int) -> Case:
    return {"task": "weights", "scheme": scheme, "rows": rows, "columns": columns}


def digits(scheme: str, *, epochs: int = 30, seeds: int = 3) -> Case:
    return {"task": "digits", "scheme": scheme, "epochs": epochs, "seeds": seeds}


@dataclass(frozen=True)
class Digits:
    """Images (n, 64) in 0 … 1 and their labels, in a fixed random order."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Matrix:
    """Weights, and the gradient of what they are rounded to."""

    w: Tensor
    gradient: Tensor


@dataclass
class Got:
    """A result to verify, and accuracies."""

    values: Tensor
    accuracies: dict[str, float] = field(default_factory=dict)


def inputs(case: Case, device: str) -> Any:
    generator = torch.Generator(device).manual_seed(0)
    if case["task"] == "weights":
        w, gradient = torch.randn(2, case["rows"], case["columns"], generator=generator, device=device)
        return Matrix(w, gradient)
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    turn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return Digits((torch.tensor(images).float() / 16)[turn].to(device), torch.tensor(labels)[turn].to(device))


def work(case: Case, given: Any) -> Work:
    """Weights and gradients are read once and written once; of a step, the products."""
    if isinstance(given, Matrix):
        return Work(flops=0, bytes=4 * given.w.nbytes, items=given.w.numel(), unit="weights")
    parameters = 64 * HIDDEN + HIDDEN * HIDDEN + HIDDEN * 10
    return Work(flops=6 * parameters * BATCH, bytes=0, items=BATCH, unit="images")


# --- a matrix ---------------------------------------------------------------------------------------------------------


Rounding = Callable[[Tensor], Tensor]


def ours(case: Case, given: Matrix) -> Rounding:
    return lambda w: fake_quantize(w, case["scheme"])


def learned(case: Case, given: Matrix) -> Rounding:
    """Steps have gradients too."""
    step = first_step(given.w, case["scheme"]).requires_grad_()
    return lambda w: lsq(w, step, case["scheme"])


def with_torch(case: Case, given: Matrix) -> Rounding:
    """It takes a scale a row, symmetric."""
    scale = quantize(given.w, case["scheme"]).scales()
    assert scale is not None
    most = int(Scheme.parse(case["scheme"]).element.largest)
    zero = torch.zeros(len(given.w), dtype=torch.int32, device=given.w.device)
    return lambda w: torch.fake_quantize_per_channel_affine(w, scale[:, 0], zero, 0, -most, most)


def with_torchao(case: Case, given: Matrix) -> Rounding:
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    scheme = Scheme.parse(case["scheme"])
    config = IntxFakeQuantizeConfig(
        getattr(torch, f"int{scheme.bits}"),
        group_size=scheme.group_size(given.w.shape[1]),
        is_symmetric=not scheme.affine,
    )
    rounding: Rounding = IntxFakeQuantizer(config)
    return rounding


MAKERS = (ours, learned, with_torch, with_torchao)


def round_and_back(rounding: Rounding, given: Matrix) -> Got:
    """The rounded weights; the gradient is made, and left."""
    w = given.w.detach().requires_grad_()
    values = rounding(w)
    values.backward(given.gradient)
    return Got(values.detach())


# --- a network --------------------------------------------------------------------------------------------------------


def network(seed: int) -> nn.Sequential:
    """Three layers, started from the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for n_in, n_out in ((64, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 10)):
        linear = nn.Linear(n_in, n_out)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(n_out, n_in, generator=generator) * (2 / n_in) ** 0.5)
            linear.bias.zero_()
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(net: nn.Module, given: Digits, epochs: int, rate: float, seed: int) -> nn.Module:
    """Adam, with a rate that falls to 0 along a cosine."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), rate)
    steps = epochs * -(-TRAINED // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(epochs):
        for batch in torch.randperm(TRAINED, generator=generator).split(BATCH):
            step(net, given, batch, optimizer)
            schedule.step()
    return net


def step(net: nn.Module, given: Digits, batch: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = functional.cross_entropy(net(given.images[batch]), given.labels[batch])
    loss.backward()
    optimizer.step()
    return loss.detach()


def accuracy(net: nn.Module, given: Digits) -> float:
    """Per cent of the images that were not trained with."""
    with torch.no_grad():
        right = net(given.images[TRAINED:]).argmax(dim=1) == given.labels[TRAINED:]
    return 100 * float(right.float().mean())


def accuracies(case: Case, given: Digits) -> dict[str, float]:
    """Of each way to a network on the grid, from the same start and with as much training."""
    scheme, epochs = case["scheme"], case["epochs"]
    found: dict[str, list[float]] = {}
    for seed in range(case["seeds"]):
        start = train(network(seed), given, epochs, 2e-3, seed)
        after = train(copy.deepcopy(start), given, epochs, 1e-3, seed)
        found.setdefault("floats", []).append(accuracy(after, given))
        for layer in after.modules():
            if isinstance(layer, nn.Linear):
                layer.weight = nn.Parameter(quantize(layer.weight, scheme).dequantize())
        found.setdefault("rounded after", []).append(accuracy(after, given))
        for ranges, name in WAYS.items():
            if ranges == "minmax" or scheme.endswith("sym"):
                net = copy.deepcopy(start)
                prepare_(net, scheme, ranges=ranges)
                train(net, given, epochs, 1e-3, seed)
                convert_(net)
                found.setdefault(name, []).append(accuracy(net, given))
    return {name: sum(values) / len(values) for name, values in found.items()}


def prepare(function: Any, case: Case, given: Any) -> Callable[[], Got]:
    if isinstance(given, Matrix):
        if function in MAKERS:
            rounding = function(case, given)
        else:
            record = quantize(given.w, case["scheme"])
            scale, zero = record.scales(), record.zero
            options = {"bits": record.scheme.bits, "group": record.scheme.group_size(record.columns)}

            def rounding(w: Tensor) -> Tensor:
                return function(w, scale, None if zero is None else zero.float(), **options)

        return lambda: round_and_back(rounding, given)
    net = network(0)
    prepare_(net, case["scheme"], ranges="learned" if function is learned else "minmax")
    optimizer, batch = torch.optim.SGD(net.parameters(), 0.0), torch.arange(BATCH)
    found: dict[str, float] = {}

    def call() -> Got:
        if not found and function is ours:
            found.update(accuracies(case, given))
        return Got(step(net, given, batch, optimizer), found)

    return call


def verify(case: Case, given: Any, got: Got, want: Got) -> tuple[float, float]:
    """Of a matrix, how much larger the rounding's noise is; of a step, that its loss is a number."""
    if isinstance(given, Digits):
        return float(not torch.isfinite(got.values)), 0.0
    mine, theirs = (float((result.values - given.w).square().sum()) for result in (got, want))
    return max(0.0, mine / theirs - 1), 0.01


def figures(case: Case, given: Any, got: Got) -> dict[str, float]:
    return got.accuracies


# --- the picture ------------------------------------------------------------------------------------------------------


def picture(records: Sequence[Record]) -> str | None:
    """Accuracy against bits, symmetric integers."""
    from mlsys.bench.plots import COLOURS, LINES, MARKERS, new_figure, to_svg

    rows = {
        int(r.case["scheme"][3]): r.figures
        for r in records
        if r.role == "reference" and r.case["task"] == "digits" and r.case["scheme"].endswith("sym") and r.figures
    }
    if len(rows) < 2:
        return None
    figure, (ax,) = new_figure(1)
    bits = sorted(rows)
    for style, name in enumerate(("floats", "rounded after", "trained", "learned")):
        look: dict[str, Any] = {"color": COLOURS[style], "marker": MARKERS[style], "linestyle": LINES[style]}
        ax.plot(bits, [rows[b][name] for b in bits], label=name, **look)
    ax.set(title="digits, 64-16-16-10", xlabel="bits, a symmetric scale a row", ylabel="right (%)")
    ax.set_xticks(bits)
    ax.grid(True, alpha=0.3)
    ax.legend(frameon=False, fontsize=8)
    return to_svg(figure)


def is_symmetric_row(case: Case) -> bool:
    scheme = Scheme.parse(case["scheme"])
    return case["task"] == "weights" and not scheme.affine and scheme.group == "channel" and scheme.format[:3] == "int"


bench = Benchmark(
    __file__,
    cases={
        "quick": [weights("int4:sym", 128, 256), digits("int2:sym", epochs=2, seeds=1)],
        "default": [
            *(digits(f"int{bits}:sym") for bits in (2, 3, 4, 5, 6)),
            *(digits(scheme) for scheme in ("int2", "int3", "mxfp4")),
            weights("int4:sym", 1024, 1024),
            weights("int4:sym", 4096, 4096),
            weights("int4:g32:sym", 4096, 4096),
            weights("mxfp4", 1024, 1024),
        ],
        "full": [
            *(digits(f"int{bits}:sym", seeds=10) for bits in (2, 3, 4, 5, 6, 8)),
            *(digits(scheme, seeds=10) for scheme in ("int2", "int3", "int4", "mxfp4", "nvfp4", "nf4")),
            *(weights(s, n, n) for s in ("int4:sym", "int8", "int4:g32:sym", "mxfp4") for n in (1024, 4096)),
        ],
    },
    inputs=inputs,
    work=work,
    impls={
        "mlsys": Impl(lambda: ours, "reference"),
        "learned": Impl(
            lambda: learned, "variant", only=lambda c: c["task"] == "digits" and c["scheme"].endswith("sym")
        ),
        "torch": Impl(lambda: with_torch, "peer", only=is_symmetric_row),
        "torchao": Impl(
            lambda: with_torchao,
            "peer",
            needs="torchao",
            only=lambda c: c["task"] == "weights" and c["scheme"].startswith("int4") and c["scheme"].endswith("sym"),
        ),
    },
    subject="mlsys",
    prepare=prepare,
    verify=verify,
    figures=figures,
    yours=lambda case: case["task"] == "weights" and case["scheme"].startswith("int"),
    fits=lambda case, device: device == "cpu",
    contract="quant.qat",
    pictures={"accuracy": picture},
)

if __name__ == "__main__":
    bench.main()
