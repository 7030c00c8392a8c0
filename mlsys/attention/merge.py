"""Attention over two disjoint sets of keys, each done apart, is attention over both: one weighted average.

A softmax over a set of keys leaves two things behind: the average O of the values
and the logarithm L of its denominator, the log-sum-exp of the scores. That is all
another set of keys needs to know. For sets A and B,

    L = log(exp L_A + exp L_B)
    O = exp(L_A − L) · O_A + exp(L_B − L) · O_B

since exp L_A · O_A is A's numerator, and numerators and denominators add. The two
weights sum to 1. Nothing here asks where the sets came from, so the one equation is

    flash attention    the next tile of keys joins those before it (`flash` keeps the
                       numerator undivided and divides once, at the end);
    split keys         a long row is shared out among cores, whose parts are merged;
    ring attention     keys travel round the devices, and each merges what comes by;
    shared prefixes    a prompt's keys are attended to once for all who continue it.

`merge` is associative and commutative, and a set of no keys, O = 0 and L = −∞, is its
neutral element: parts may be merged in any order, and in a tree.

An attention sink is one more term of the denominator: give it to one of the parts only,
or it counts twice.

Cost:
    3 FLOPs an element of the output, two exponentials and a logarithm a row: nothing beside the
    attention itself. It is bound by memory: both outputs are read and one is written.

Memory:
    The result, and two numbers a row. The backward pass keeps the inputs and O.

Papers:
    Milakov & Gimelshein 2018, arXiv:1805.02867 (section 3.1, equation 4: the operation, and that it is associative).
    Liu et al. 2023, arXiv:2310.01889 (section 3: blocks of keys that travel round a ring of devices).
    Juravsky et al. 2024, arXiv:2402.05099 (section 3.1: a shared prefix and the suffixes, joined by log-sum-exp).

See also:
    `mlsys.attention.flash` (whose tiles are merged this way), `mlsys.attention.naive` (`return_lse`).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from mlsys.attention._inputs import DTYPES


def merge(
    out_a: Float[Tensor, "b h t dv"],
    lse_a: Float[Tensor, "b h t"],
    out_b: Float[Tensor, "b h t dv"],
    lse_b: Float[Tensor, "b h t"],
) -> tuple[Float[Tensor, "b h t dv"], Float[Tensor, "b h t"]]:
    """Output and log-sum-exp of attention over the union of two disjoint sets of keys.

    `out_a` (b, h, t, dv) and `lse_a` (b, h, t, natural logarithm) are what `attention(…, return_lse=True)` gives
    for the one set, `out_b` and `lse_b` for the other. Either may be empty in any row: −∞ in its lse, and its
    out is then not looked at. If both are, the row is 0 with −∞. Differentiable in all four. The average is worked
    out in the wider dtype of out and lse, and rounded once to that of the outputs.
    Raises TypeError or ValueError naming the argument if shapes, dtypes or devices disagree.
    """
    _check(out_a, lse_a, out_b, lse_b)
    top = torch.maximum(lse_a, lse_b).detach()  # subtracted before exp, as in any softmax
    top = top.masked_fill(top == -math.inf, 0.0)  # two empty sets: −∞ − 0 and not −∞ − −∞
    z_a, z_b = torch.exp(lse_a - top), torch.exp(lse_b - top)  # the denominators, (b, h, t)
    z = z_a + z_b
    neither = z == 0
    z = z.masked_fill(neither, 1.0)
    # The output of an empty set is left out rather than multiplied by its weight: 0 · NaN would be NaN.
    out_a, out_b = (o.masked_fill((lse == -math.inf)[..., None], 0.0) for o, lse in ((out_a, lse_a), (out_b, lse_b)))
    out = (z_a / z)[..., None] * out_a + (z_b / z)[..., None] * out_b
    return out.to(out_a.dtype), (top + z.log()).masked_fill(neither, -math.inf)


def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    named = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}: e.g. {name}.float()")
        if x.device != out_a.device:
            raise ValueError(f"{name} must be on out_a's device {out_a.device}, got {x.device}: move it")
    for name in ("lse_a", "lse_b"):
        if named[name].element_size() == 2:
            raise TypeError(
                f"{name} must be float32 or float64, got {named[name].dtype}: a logarithm off by 0.01 is "
                "a weight off by 1%; keep what attention(…, return_lse=True) gives"
            )
    if out_a.ndim != 4:
        raise ValueError(f"out_a must have 4 dimensions (batch, heads, seq, head_dim), got shape {tuple(out_a.shape)}")
    if out_b.shape != out_a.shape:
        raise ValueError(f"out_b must have out_a's shape {tuple(out_a.shape)}, got {tuple(out_b.shape)}")
    if out_b.dtype != out_a.dtype:
        raise TypeError(f"out_b must have out_a's dtype {out_a.dtype}, got {out_b.dtype}: convert one of them")
    if lse_b.dtype != lse_a.dtype:
        raise TypeError(f"lse_b must have lse_a's dtype {lse_a.dtype}, got {lse_b.dtype}: convert one of them")
    for name in ("lse_a", "lse_b"):
        if named[name].shape != out_a.shape[:-1]:
            raise ValueError(
                f"{name} must have one number a row, {tuple(out_a.shape[:-1])}, got shape {tuple(named[name].shape)}"
            )
