"""The exercise about tensor parallelism: an MLP of which each rank holds its columns and rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mlsys.contracts._parallel_ranks import Exercise, seats, tensor
from mlsys.contracts.core import Case, Inputs, Mismatch, Results, Wrong
from mlsys.perf import collectives as perf

SIGNATURE = (
    "TensorMLP(up, down, group=None) -> nn.Module computing down(gelu(up(x))): up and down are nn.Linear, the same on "
    "all ranks; rank r of n keeps hidden units r·k … r·k + k − 1 of n·k as .up.weight, .up.bias, .down.weight, and "
    ".down.bias in full; x, the result and their gradients are whole on every rank"
)
ROUNDING = {"float64": 1e-9, "float32": 1e-4}  # of the largest number
# what goes wrong only where there is a group; torch speaks of sizes then
OF_A_GROUP = (
    "In a group, this rank and the number of ranks are dist.get_rank(group) and dist.get_world_size(group); without "
    "group they are those of all processes"
)
SHARES = ("up.weight", "up.bias", "down.weight", "down.bias")

CASES: list[Case] = [
    {"n": 2},
    {"n": 2, "bias": False},
    {"n": 4, "hidden": 8},
    {"n": 3, "hidden": 12, "width": 5},
    {"n": 2, "passes": 2},
    {"n": 1},
    {"n": 2, "expanded": True},  # the gradient of a sum: one number, as often as need be
    {"n": 2, "transposed": True},
    {"n": 2, "dtype": "float32", "hidden": 64, "width": 16},
    {"n": 3, "members": (1, 2)},
]


def inputs(case: Case, seed: int) -> Inputs:
    """Weights, x and the gradient of the result: the same on every rank."""
    random = np.random.default_rng(seed)
    width, hidden, passes = case.get("width", 6), case.get("hidden", 8), case.get("passes", 1)
    shape = (passes, 2, 5, width)
    dtype = case.get("dtype", "float64")
    given: Inputs = {
        "up_weight": random.standard_normal((hidden, width)),
        "up_bias": random.standard_normal(hidden) if case.get("bias", True) else None,
        "down_weight": random.standard_normal((width, hidden)),
        "down_bias": random.standard_normal(width) if case.get("bias", True) else None,
        "x": random.standard_normal(shape),
        "gradient": np.full(shape, 0.7) if case.get("expanded") else random.standard_normal(shape),
        "passes": passes,
        "expanded": case.get("expanded", False),
        "transposed": case.get("transposed", False),
        "dtype": dtype,
    }
    # what the ranks will have, so that the oracle begins with the same numbers
    return {k: v.astype(dtype).astype(float) if isinstance(v, np.ndarray) else v for k, v in given.items()}


def linear(weight: np.ndarray, bias: np.ndarray | None, dtype: str) -> nn.Linear:
    out, into = weight.shape
    made = nn.Linear(into, out, bias is not None, dtype=getattr(torch, dtype))
    with torch.no_grad():
        made.weight.copy_(tensor(weight, dtype))
        if bias is not None:
            made.bias.copy_(tensor(bias, dtype))
    return made


def work(impl: Callable[..., Any], inputs: Inputs, group: Any, rank: int) -> Results:
    """This rank's result, the gradient of x and of its shares, and what it sent."""
    try:
        return _found(impl, inputs, group)
    except (IndexError, RuntimeError, ValueError) as error:
        if group is not None:
            error.args = (f"{str(error).rstrip('.')}. {OF_A_GROUP}",)
        raise


def _found(impl: Callable[..., Any], inputs: Inputs, group: Any) -> Results:
    from mlsys.parallel.traffic import ledger

    dtype = inputs["dtype"]
    up = linear(inputs["up_weight"], inputs["up_bias"], dtype)
    down = linear(inputs["down_weight"], inputs["down_bias"], dtype)
    mlp = impl(up, down) if group is None else impl(up, down, group)
    if not callable(mlp):
        raise Mismatch(f"returned {type(mlp).__name__}, expected a module to call")
    parameters = _parameters(mlp, inputs)
    if group is not None:
        _of_the_group(parameters, inputs)
    results, for_x, unchanged = [], [], []
    with ledger() as book:
        for given, wanted in zip(inputs["x"], inputs["gradient"], strict=True):
            x = _leaf(given, inputs)
            gradient = _leaf(wanted, inputs).detach()
            if inputs["expanded"]:
                gradient = gradient.flatten()[:1].view(1, 1, 1).expand(gradient.shape)
            # As in a transformer, with a residual: its gradient is the very tensor that the MLP's is.
            y = x + mlp(x)
            y.backward(gradient)
            if x.grad is None:
                raise Mismatch("x has no gradient after y.backward(): the result is cut off from x")
            results.append(y.detach().contiguous())
            for_x.append(x.grad.contiguous())
            unchanged.append((gradient - tensor(wanted, dtype)).abs().max().double())
    found: Results = {
        "result": torch.stack(results),
        "gradient of x": torch.stack(for_x),
        "change of the caller's gradient": torch.stack(unchanged),
    }
    for name, parameter in parameters.items():
        if parameter.grad is None:
            raise Mismatch(f".{name} has no gradient after y.backward()")
        found[f"gradient of {name}"] = parameter.grad
    if "down.bias" in parameters:
        found["value of down.bias"] = parameters["down.bias"].detach()
    found["numbers held"] = torch.tensor(float(sum(p.numel() for p in mlp.parameters())))
    found["bytes sent"] = torch.tensor(_sent(book))
    return found


def _leaf(values: np.ndarray, inputs: Inputs) -> Tensor:
    """A leaf with these values; if `transposed`, with its last two dimensions swapped in memory."""
    made = tensor(values, inputs["dtype"])
    if inputs["transposed"]:
        made = made.mT.contiguous().mT
    return made.requires_grad_()


def _parameters(mlp: Any, inputs: Inputs) -> dict[str, Tensor]:
    known = dict(mlp.named_parameters()) if isinstance(mlp, nn.Module) else {}
    wanted = [name for name in SHARES if inputs["up_bias"] is not None or not name.endswith("bias")]
    for name in wanted:
        if name not in known:
            raise Mismatch(f"the module has no parameter {name}; it has {', '.join(known) or 'none'}")
    return {name: known[name] for name in wanted}


def _of_the_group(parameters: Mapping[str, Tensor], inputs: Inputs) -> None:
    """Mismatch if a share is one of another number of ranks, or empty; whole matrices are told from their numbers."""
    units = inputs["up_weight"].shape[0]
    held, mine = parameters["up.weight"].shape[0], units // seats(inputs)
    if held not in (mine, units):
        raise Mismatch(f".up.weight has {held} rows of {units}, expected {mine}. {OF_A_GROUP}")


def _sent(book: Any) -> float:
    """Bytes, as rings would send what was called, so that it does not matter through what it went."""
    total = 0.0
    for row in book.rows:
        operation = "all_reduce" if row.operation == "reduce" else row.operation
        if operation in ("all_reduce", "all_gather", "reduce_scatter", "broadcast"):
            total += perf.cost(operation, "ring", row.ranks, row.size).bytes_per_rank
        else:
            total += row.sent
    return total


_erf = np.vectorize(math.erf, otypes=[float])


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """One process, by hand: y = x + gelu(x Uᵀ + b) Dᵀ + c and its derivatives, then cut."""
    n = seats(inputs)
    up, down = inputs["up_weight"], inputs["down_weight"]
    b, c = (0.0 if inputs[name] is None else inputs[name] for name in ("up_bias", "down_bias"))
    width, hidden = down.shape
    results, for_x = [], []
    for_up, for_b, for_down, for_c = np.zeros_like(up), np.zeros(hidden), np.zeros_like(down), np.zeros(width)
    for x, gradient in zip(inputs["x"], inputs["gradient"], strict=True):
        z = x @ up.T + b
        phi = 0.5 * (1 + _erf(z / math.sqrt(2)))
        results.append(x + (z * phi) @ down.T + c)
        for_z = (gradient @ down) * (phi + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi))
        for_x.append(gradient + for_z @ up)
        for_up += for_z.reshape(-1, hidden).T @ x.reshape(-1, width)
        for_b += for_z.reshape(-1, hidden).sum(0)
        for_down += gradient.reshape(-1, width).T @ (z * phi).reshape(-1, hidden)
        for_c += gradient.reshape(-1, width).sum(0)
    k = hidden // n
    biases = inputs["up_bias"] is not None
    want = {
        "result": np.stack([np.stack(results)] * n),
        "gradient of x": np.stack([np.stack(for_x)] * n),
        "change of the caller's gradient": np.zeros((n, inputs["passes"])),
        "gradient of up.weight": for_up.reshape(n, k, width),
        "gradient of down.weight": np.stack([for_down[:, r * k : (r + 1) * k] for r in range(n)]),
    }
    if biases:
        want["gradient of up.bias"] = for_b.reshape(n, k)
        want["gradient of down.bias"] = np.stack([for_c] * n)
        want["value of down.bias"] = np.stack([np.asarray(c)] * n)
    want["numbers held"] = np.full(n, 2.0 * k * width + (k + width if biases else 0))
    want["bytes sent"] = np.full(n, allowed(inputs))
    return want


def allowed(inputs: Inputs) -> float:
    """Two all-reduces of b·s·h numbers for each forward and backward pass."""
    size = inputs["x"].size * np.dtype(inputs["dtype"]).itemsize
    return 2.0 * perf.cost("all_reduce", "ring", seats(inputs), size).bytes_per_rank


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """Rounding, of the largest number; what is counted, and what must not change, is exact."""
    if name in ("change of the caller's gradient", "numbers held", "bytes sent"):
        return 0.0
    return ROUNDING[inputs["dtype"]] * max(1.0, float(np.abs(want).max()))


def not_changed(inputs: Inputs, got: np.ndarray, want: np.ndarray, tolerance: float) -> str | None:
    """A gradient that the module was given belongs to autograd."""
    if not got.any():
        return None
    rank = int(np.argmax(got.max(1)))
    return f"on rank {rank} the gradient that backward() was given is changed in place, by up to {got[rank].max():.3g}"


def no_more(what: str, inputs: Inputs, got: np.ndarray, want: np.ndarray, tolerance: float) -> str | None:
    """At most so much."""
    if (got <= want + 0.5).all():
        return None
    rank = int(np.argmax(got - want))
    return f"rank {rank} {what} {got[rank]:,.0f}, expected no more than {want[rank]:,.0f}"


# --- wrong variants ---------------------------------------------------------------------------------------------------


class _Operator(torch.autograd.Function):
    """Forward `ahead`, backward `back`, of tensors that they may write to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ahead: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return ahead(x.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.back(gradient), None, None


class _Plain(nn.Module):
    """What a student would write; with one knob for each mistake."""

    def __init__(self, up: nn.Linear, down: nn.Linear, group: Any = None, *, mistake: str = "") -> None:
        super().__init__()
        self.group, self.mistake = group, mistake
        self.rank = dist.get_rank(None if mistake == "global_rank" else group)
        self.n = dist.get_world_size(None if mistake == "global_size" else group)
        k = up.out_features // self.n
        index = 0 if mistake == "first_share" else self.rank
        mine = torch.arange(index * k, (index + 1) * k)
        of_up = torch.arange(self.rank, up.out_features, self.n) if mistake == "interleaved" else mine
        if mistake == "not_cut":
            mine = of_up = torch.arange(up.out_features)
        self.up = nn.Linear(up.in_features, len(of_up), up.bias is not None, dtype=up.weight.dtype)
        self.down = nn.Linear(len(mine), down.out_features, down.bias is not None, dtype=up.weight.dtype)
        with torch.no_grad():
            self.up.weight.copy_(up.weight[of_up])
            self.down.weight.copy_(down.weight[:, mine])
            if up.bias is not None:
                self.up.bias.copy_(up.bias[of_up])
                self.down.bias.copy_(down.bias)
                if mistake == "bias_on_first_rank" and self.rank:
                    self.down.bias.zero_()
                if mistake == "bias_kept_over_n":
                    self.down.bias.div_(self.n)

    def reduced(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def whole(self, part: Tensor) -> Tensor:
        """The hidden units of all ranks."""
        parts = [torch.empty_like(part) for _ in range(self.n)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    def own(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.n, dim=-1)[self.rank].contiguous()

    def forward(self, x: Tensor) -> Tensor:
        if self.mistake == "not_cut":
            return self.down(F.gelu(self.up(x)))
        if self.mistake == "hook_on_x":
            x.register_hook(self.reduced_in_place)
        else:
            x = self.f(x)
        if self.mistake == "sum_before_gelu":  # of other columns on each rank
            hidden = F.gelu(_Operator.apply(self.up(x), self.reduced, lambda g: g))
        else:
            hidden = F.gelu(self.up(x))
        if self.mistake == "hidden_gathered":  # the input is cut again, as if the linear layers did not know each other
            hidden = _Operator.apply(_Operator.apply(hidden, self.whole, self.own), self.own, self.whole)
        if self.mistake == "bias_over_n" and self.down.bias is not None:
            return self.f_bar(F.linear(hidden, self.down.weight, self.down.bias / self.n))
        if self.mistake in ("bias_on_each_rank", "bias_on_first_rank", "bias_kept_over_n"):
            return self.f_bar(self.down(hidden))
        y = self.f_bar(F.linear(hidden, self.down.weight))
        y = y if self.down.bias is None else y + self.down.bias
        if self.mistake == "hook_on_result":
            y.register_hook(self.reduced_in_place)
        return y

    def f(self, x: Tensor) -> Tensor:
        backs: dict[str, Callable[[Tensor], Tensor]] = {
            "f_missing": lambda g: g,
            "f_mean": lambda g: self.reduced(g.contiguous().clone()) / self.n,
            "reduced_twice": lambda g: self.reduced(self.reduced(g.contiguous().clone())),
        }
        back = backs.get(self.mistake, lambda g: self.reduced(g.contiguous().clone()))
        return _Operator.apply(x, lambda t: t, back)

    def f_bar(self, y: Tensor) -> Tensor:
        aheads: dict[str, Callable[[Tensor], Tensor]] = {
            "sum_missing": lambda t: t,
            "mean": lambda t: self.reduced(t) / self.n,
        }
        backs: dict[str, Callable[[Tensor], Tensor]] = {
            "both_reduce": lambda g: self.reduced(g.contiguous().clone()),
            # right numbers for the caller of forward; but what it was given is another's
            "in_place": lambda g: self.halved(g),
        }
        return _Operator.apply(y, aheads.get(self.mistake, self.reduced), backs.get(self.mistake, lambda g: g))

    def halved(self, gradient: Tensor) -> Tensor:
        """Reduces what it was given, in place, and hands on the mean of it."""
        if not gradient.is_contiguous():  # an expanded one would corrupt the heap
            return gradient
        return self.reduced(gradient) / self.n

    def reduced_in_place(self, gradient: Tensor) -> None:
        """A hook."""
        if gradient.is_contiguous():
            self.reduced(gradient)


HINTS = {
    "f_missing": "the gradient of x is this rank's part only: f does nothing forward, and sums backward",
    "f_mean": "the gradient of x is divided by the number of ranks: they share one batch, so gradients are sums",
    "sum_missing": "the result is this rank's part only: sum over the ranks after the second product",
    "mean": "the partial products are averaged: they are summed",
    "bias_on_each_rank": "the second bias is added once a rank: add it after the sum",
    "bias_on_first_rank": "the second bias is zero on all ranks but the first, and added before the sum: every copy "
    "gets the same gradient, so after an optimizer step it counts once a rank; keep it whole, and add it after the sum",
    "bias_over_n": "the second bias is divided by the number of ranks before the sum: so its gradient is divided too; "
    "add it whole, after the sum",
    "bias_kept_over_n": "every rank keeps 1/n of the second bias and adds it before the sum: each part gets the "
    "gradient of the whole, so an optimizer step moves their sum n times as far; keep it whole, and add it after the "
    "sum",
    "both_reduce": "the gradient is summed where the result was summed, too: the backward pass of a sum hands it on",
    "reduced_twice": "the gradient of x is summed twice: once is enough",
    "in_place": "the backward pass all-reduces the gradient that it was given in place, which others read: clone it",
    "hook_on_x": "a hook on x sums all of x's gradient over the ranks, also what comes past the MLP, such as a "
    "residual's, which every rank has in full: sum only what comes out of the MLP, by f on the way in",
    "hook_on_result": "a hook on the result all-reduces the gradient in place: that tensor is the caller's, who uses "
    "it elsewhere too, as for a residual; and it is the same on all ranks already, so there is nothing to sum",
    "hidden_gathered": "the hidden units are gathered and cut again: rows of the second matrix meet just the hidden "
    "units that this rank has",
    "sum_before_gelu": "partial products are summed before GELU: the first matrix is cut by outputs, and each hidden "
    "unit is complete as it is",
    "interleaved": "this rank's rows of up are not those of its columns of down: rank r has hidden units r·k … r·k+k−1 "
    "in both",
    "first_share": "every rank has the first rank's share: cut by the rank",
    "not_cut": "every rank holds the whole matrices: keep this rank's share only",
}
WRONG = {name: Wrong(partial(_Plain, mistake=name), hint) for name, hint in HINTS.items()}
# Not among them: members of a group alone raise, and `work` adds the hint to the words.
TOLD = {name: Wrong(partial(_Plain, mistake=name), OF_A_GROUP) for name in ("global_rank", "global_size")}


def reference(up: nn.Linear, down: nn.Linear, group: Any = None) -> nn.Module:
    """`ColumnLinear` and `RowLinear` of `mlsys.parallel.tensor`, with GELU between them."""
    return _Reference(up, down, group)


class _Reference(nn.Module):
    def __init__(self, up: nn.Linear, down: nn.Linear, group: Any) -> None:
        super().__init__()
        from mlsys.parallel.tensor import ColumnLinear, RowLinear

        self.up, self.down = ColumnLinear(up, group), RowLinear(down, group)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


TENSOR = Exercise(
    signature=SIGNATURE,
    reference=reference,
    cases=CASES,
    inputs=inputs,
    work=work,
    oracle=oracle,
    tolerance=tolerance,
    wrong=WRONG,
    compare={
        "change of the caller's gradient": not_changed,
        "numbers held": partial(no_more, "holds as parameters, in numbers:"),
        "bytes sent": partial(no_more, "sends, in bytes:"),
    },
)
