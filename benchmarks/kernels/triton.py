"""Triton kernels: what does the compiler make of each, and how near to the memory's bandwidth do softmax and norm come?

Where there is no GPU nothing is timed: every kernel is compiled for an A100 (sm_80) and an H100 (sm_90) with every
config, and what came out is counted: registers of a thread, bytes that were spilled, shared memory, and whether the
instructions appear that a fast kernel of its kind needs. On a GPU, softmax, LayerNorm and RMSNorm are timed beside
torch, torch.compile and Liger, forward and with the backward pass. (The other kernels' own benchmarks time those.)

What to look at: compiled, no spills, and wgmma or mma.sync in whatever multiplies. Timed, the share of the limit, which
is what it takes to read the input and write the result once.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mlsys.bench import Benchmark, Impl, Plot, Work
from mlsys.commands.tune import modules

if TYPE_CHECKING:
    from mlsys.kernels._triton_compile import Compiled

Case = Mapping[str, Any]
Function = Callable[[Case, Mapping[str, Any]], Callable[[], Any]]
MARKS = ("wgmma", "mma.sync", "TMA", "cp.async", "128-bit loads")


def compiled_cases(names: Sequence[str]) -> list[Case]:
    """A case for each kind of call of these modules and each target."""
    if importlib.util.find_spec("triton") is None:
        return []
    found: list[Case] = []
    for name in names:
        specimens = importlib.import_module(modules()[name]).specimens()
        targets: dict[str, tuple[int, ...]] = {s.name: (80, 90) for s in specimens}
        for one in targets:  # some calls are for the newer target only
            launched = [s.targets or targets[one] for s in specimens if s.name == one]
            targets[one] = tuple(t for t in targets[one] if any(t in some for some in launched))
        found += [{"technique": name, "call": one, "target": f"sm_{t}"} for one, some in targets.items() for t in some]
    return found


def timed_case(technique: str, rows: int, columns: int, *, backward: bool = False, dtype: str = "bfloat16") -> Case:
    return {"technique": technique, "rows": rows, "columns": columns, "dtype": dtype, "backward": backward}


def inputs(case: Case, device: str) -> Mapping[str, Any]:
    if "call" in case:
        return {}
    generator = torch.Generator(device).manual_seed(case["columns"])
    x, dy = torch.randn(2, case["rows"], case["columns"], generator=generator, device=device)
    weight = torch.randn(case["columns"], generator=generator, device=device)
    narrow = [y.to(getattr(torch, case["dtype"])) for y in (x, dy, weight)]
    return {"x": narrow[0].requires_grad_(), "dy": narrow[1], "weight": narrow[2].requires_grad_()}


def work(case: Case, given: Mapping[str, Any]) -> Work:
    if "call" in case:
        return Work(flops=0, bytes=0, items=1, unit="kernel")
    # forward reads x and writes the result; backward reads dy, and x or the result, and writes dx
    moved = (5 if case["backward"] else 2) * given["x"].nbytes
    return Work(flops=0, bytes=moved, items=moved, unit="B")


def step(case: Case, given: Mapping[str, Any], softmax: Callable[..., Tensor], norm: Callable[..., Tensor]) -> Any:
    """Forward, or forward and backward, by these functions."""

    def forward() -> Tensor:
        x, weight = given["x"], given["weight"]
        return softmax(x) if case["technique"] == "softmax" else norm(x, weight, kind=case["technique"])

    def both() -> list[Tensor]:
        if not case["backward"]:
            with torch.no_grad():
                return [forward()]
        wanted = [given["x"]] if case["technique"] == "softmax" else [given["x"], given["weight"]]
        y = forward()
        return [y.detach(), *torch.autograd.grad(y, wanted, given["dy"])]

    return both


def torch_norm(x: Tensor, weight: Tensor, *, kind: str) -> Tensor:
    """Both norms by torch."""
    n = x.shape[-1:]
    return F.layer_norm(x, n, weight, None, 1e-5) if kind == "layernorm" else F.rms_norm(x, n, weight, 1e-5)


def torch_softmax(x: Tensor) -> Tensor:
    """By torch."""
    return x.softmax(-1)


def by_torch(case: Case, given: Mapping[str, Any]) -> Callable[[], Any]:
    return (lambda: None) if "call" in case else step(case, given, torch_softmax, torch_norm)


def by_inductor(case: Case, given: Mapping[str, Any]) -> Callable[[], Any]:
    # each case anew and for its very sizes: after some recompilations torch would go on without compiling
    torch.compiler.reset()
    return step(
        case,
        given,
        torch.compile(torch_softmax, fullgraph=True, dynamic=False),
        torch.compile(torch_norm, fullgraph=True, dynamic=False),
    )


def by_liger(case: Case, given: Mapping[str, Any]) -> Callable[[], Any]:
    """The kernels of the liger-kernel package."""
    ops = {name: importlib.import_module(f"liger_kernel.ops.{name}") for name in ("softmax", "layer_norm", "rms_norm")}
    bias = torch.zeros_like(given["weight"])

    def norm(x: Tensor, weight: Tensor, *, kind: str) -> Tensor:
        if kind == "layernorm":
            layer: Tensor = ops["layer_norm"].LigerLayerNormFunction.apply(x, weight, bias, 1e-5)
            return layer
        in_place = False  # else dx would be written over dy
        rms: Tensor = ops["rms_norm"].LigerRMSNormFunction.apply(x, weight, 1e-5, 0.0, "llama", in_place)
        return rms

    return step(case, given, ops["softmax"].LigerSoftmaxFunction.apply, norm)


def by_triton(case: Case, given: Mapping[str, Any]) -> Callable[[], Any]:
    if "call" in case:
        from mlsys.kernels._triton_compile import compiled

        target = int(case["target"].removeprefix("sm_"))
        rows = [
            row for row in compiled([modules()[case["technique"]]], [target], case["call"]) if row.name == case["call"]
        ]
        return lambda: rows
    from mlsys.kernels import norm_triton, softmax_triton

    return step(case, given, softmax_triton.softmax, norm_triton.norm)


def prepare(function: Function, case: Case, given: Mapping[str, Any]) -> Callable[[], Any]:
    return function(case, given)


def verify(case: Case, given: Mapping[str, Any], got: Any, want: Any) -> tuple[float, float]:
    """How many problems the compiled kernels have, of which none is allowed; or the largest relative error."""
    if "call" in case:
        if got is None:  # torch has nothing to be compiled
            return 0.0, 0.0
        return sum(len(row.problems()) for row in got) + (not got), 0.0
    gaps = [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(got, want, strict=True)]
    return max(gaps), 1e-5 if case["dtype"] == "float32" else 1e-2


def figures(case: Case, given: Mapping[str, Any], got: list[Compiled] | None) -> dict[str, float]:
    """Of all configs: the most registers, spills and shared memory; 1 where all of them show an instruction."""
    if "call" not in case or not got:
        return {}
    return {
        "configs": len(got),
        "registers": max(row.registers for row in got),
        "spilled B": max(row.spilled for row in got),
        "shared KiB": max(row.shared for row in got) / 1024,
        **{mark: float(all(mark in row.shows for row in got)) for mark in MARKS},
    }


TIMED = [
    timed_case(technique, rows, columns, backward=backward)
    for rows, columns in ((8192, 8192), (1 << 16, 1024))
    for technique in ("softmax", "layernorm", "rmsnorm")
    for backward in (True, False)
]
bench = Benchmark(
    __file__,
    cases={
        "quick": [*compiled_cases(["kernels.cross_entropy"])[-1:], *TIMED],
        "default": [*compiled_cases(list(modules())), *TIMED],
        "full": [*compiled_cases(list(modules())), *TIMED, timed_case("softmax", 512, 1 << 17)],
    },
    inputs=inputs,
    work=work,
    impls={
        "torch": Impl(lambda: by_torch, "reference"),
        "torch.compile": Impl(lambda: by_inductor, "peer", only=lambda case: "call" not in case),
        "liger": Impl(
            lambda: by_liger, "peer", "liger_kernel", only=lambda case: "call" not in case, install="liger-kernel"
        ),
        "triton": Impl(lambda: by_triton, "ours"),
    },
    subject="triton",
    prepare=prepare,
    verify=verify,
    figures=figures,
    counted=lambda impl, device: device == "cpu",
    fits=lambda case, device: ("call" in case) == (device == "cpu"),
    memory=False,
    plots=(
        Plot(
            x="columns",
            xlabel="columns, of 2²⁶ numbers",
            panel=("technique", "backward"),
            y="throughput",
            only=lambda case: case.get("rows", 0) * case.get("columns", 0) == 1 << 26,
        ),
    ),
)

if __name__ == "__main__":
    bench.main()
