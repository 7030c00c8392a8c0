"""Flash attention as fused Triton kernels: the loops of `flash`, with tiles that never leave the chip.

On a GPU each line of `flash` is a kernel of its own, and between two of them a tile goes through memory. Here a
program holds a block of queries in registers and walks along the keys that it sees; what it reads is a tile of keys
and values at a time, what it writes is O and L, once.

                      keys →  n ─┐ BLOCK_N
    queries                   ┌──┴─┐
      ↓        block 0        │ ╲  ·    ·    ·            causal: a block of queries walks from its first visible tile
     m ─┐                     │ □ │╲  ·    ·              to its last. □ tiles that are seen whole: no mask, and the
        │ BLOCK_M  block 1    │ □ │ □ │╲  ·               multiplication by `scale` and the subtraction of the maximum
       ─┘                     │ □ │ □ │ □ │╲              are one instruction. ╲ tiles on an edge: masked.

The forward kernel, one program for each block and head, longest first, so that no long one starts last:

    S = q Kⱼᵀ     m' = max(m, rowmax S · unit)     P = 2^(S · unit − m')     unit = scale · log₂ e
    z ← z · 2^(m − m') + rowsum P     A ← A · 2^(m − m') + P Vⱼ     at the end   O = A / z,   L = m + log₂ z

The backward pass is three kernels, none of which adds to what another program has written: so there are no atomics,
and the same inputs give the same bits.

    row_sums   D = rowsum(dO ∘ O) − dL
    grad_kv    a block of keys walks along the queries that see it, of all heads that share it one after the other:
               Pᵀ = 2^(K qᵀ · unit − L)    dV += Pᵀ dO    dSᵀ = Pᵀ ∘ (V dOᵀ − D)    dK += dSᵀ q
    grad_q     a block of queries walks along its keys:    dQ += dS K

Tiles of `grad_kv` are transposed, so that Pᵀ and dSᵀ are left factors as they lie in registers. The price of two
kernels is that S and dP are computed twice, seven products instead of five.

Packed sequences (`varlen`) are the same kernels, with a sequence in place of a batch entry: cumulative lengths say
where it begins and ends, and programs beyond its end leave at once. A window is a second edge, on the left.

On sm_90, what a loop reads comes by TMA if its rows are aligned to 16 bytes: a descriptor says where the tensor lies,
one thread asks for a whole tile, and the registers that held addresses are free for the sums.

Numbers of 16 bits are multiplied as they are and summed in float32; scores and P stay in float32 until P is a factor.
float32 is multiplied in float32 (`precision="ieee"`), without tensor cores; "tf32" takes them, and drops 13 bits of
each factor.

Cost:
    `flash`'s FLOPs forward; backward 3.5 times as many (seven products to two), where `flash` has 2.5. One read of K
    and V for each block of queries, most of them from the second-level cache.

Memory:
    O and L; backward D and the gradients. Nothing else, and no tile.

Where it loses: masks of any shape, ALiBi, soft-cap and sinks are `flash`'s. For a single query there are too few
programs to fill a GPU: that is `paged_triton`'s work. Backward, kernels that share dQ between programs by atomics
compute a quarter less, and differ in their last bits from run to run.

Papers:
    Dao 2023, arXiv:2307.08691, sections 3.1 and 3.2 (loops, and a program for each block of queries, or of keys).
    Tillet, Kung & Cox 2019, "Triton: An Intermediate Language and Compiler for Tiled Neural Network
    Computations", MAPL.

See also:
    `mlsys.attention.flash` (the readable version, with the formulas), `mlsys.attention.paged_triton` (decoding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, Unpack, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlsys.attention._flash_scores import TileOptions
from mlsys.attention._flash_triton_launch import LARGEST, Call, Configs, backward, forward, specimens
from mlsys.attention._flash_triton_tiles import LOG2E
from mlsys.attention._inputs import check_qkv, check_rules
from mlsys.attention._packed import lengths
from mlsys.kernels._triton import on_device

__all__ = ["Configs", "attention", "specimens", "typical", "varlen"]

Precision = Literal["ieee", "tf32"]


class _Options(TileOptions, total=False):
    precision: Precision
    config: Configs | None


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[_Options]
) -> Tensor: ...


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[_Options]
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b h_kv s d"],
    v: Float[Tensor, "b h_kv s dv"],
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    mask: Tensor | None = None,
    alibi: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    block_q: int | None = None,
    block_k: int | None = None,
    precision: Precision = "ieee",
    config: Configs | None = None,
) -> Float[Tensor, "b h t dv"] | tuple[Float[Tensor, "b h t dv"], Float[Tensor, "b h t"]]:
    """`flash.attention` in float32, bfloat16 or float16, on a GPU, or on a CPU under Triton's interpreter.

    Options and results are `flash`'s, to rounding, and so is what becomes of NaN; but mask, alibi, softcap, sinks,
    block_q and block_k must be None. Any strides will do. The tiles are those that were the fastest here
    (`mlsys tune`), unless `config` forces some.
    Raises TypeError or ValueError naming the argument if shapes, dtypes, devices or options are wrong, or not for these
    kernels (mask, alibi, softcap, sinks); RuntimeError if asked for a second derivative, or on a CPU without the
    interpreter.
    """
    scale = check_qkv(q, k, v, causal, scale)
    check_rules(q, k, causal, window, None, None, None, None)
    _refuse(mask=mask, alibi=alibi, softcap=softcap, sinks=sinks)
    configs = _checked(q, v, block_q, block_k, precision, config)
    on_device("mlsys.attention.flash", q=q, k=k, v=v)
    left, right = window[0], 0 if causal else window[1]
    call = Call(q.shape[0], q.shape[2], k.shape[2], left, right, abs(scale), precision, configs)
    # a maximum times a negative number is a minimum: the sign goes to the queries, where it costs no rounding
    out, lse = _attend(q if scale >= 0 else -q, k, v, call, return_lse)
    return out if lse is None else (out, lse)


def varlen(
    q: Float[Tensor, "total_q h d"],
    k: Float[Tensor, "total_k h_kv d"],
    v: Float[Tensor, "total_k h_kv dv"],
    cu_seqlens_q: Int[Tensor, " n_plus_1"],
    cu_seqlens_k: Int[Tensor, " n_plus_1"],
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    alibi: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    block_q: int | None = None,
    block_k: int | None = None,
    precision: Precision = "ieee",
    config: Configs | None = None,
) -> Float[Tensor, "total_q h dv"] | tuple[Float[Tensor, "total_q h dv"], Float[Tensor, "total_q h"]]:
    """`flash.varlen`, in one launch for all sequences. The lengths are read by the CPU first, which waits for them.

    What the tensors hold of one sequence, NaN included, reaches no other.
    """
    lengths_q, lengths_k = lengths(q, k, v, cu_seqlens_q, cu_seqlens_k)
    q4, k4, v4 = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, total, ·)
    scale = check_qkv(q4, k4, v4, causal, scale)
    check_rules(q4, k4, causal, window, None, None, None, None)
    _refuse(alibi=alibi, softcap=softcap, sinks=sinks)
    configs = _checked(q, v, block_q, block_k, precision, config)
    device = on_device("mlsys.attention.flash", q=q, k=k, v=v)
    ends = [x.to(device, torch.int32).contiguous() for x in (cu_seqlens_q, cu_seqlens_k)]
    left, right = window[0], 0 if causal else window[1]
    call = Call(
        len(lengths_q), max(lengths_q), max(lengths_k), left, right, abs(scale), precision, configs, *ends
    )  # fmt: skip
    out, lse = _attend(q4 if scale >= 0 else -q4, k4, v4, call, return_lse)
    out = out[0].transpose(0, 1)
    return out if lse is None else (out, lse[0].transpose(0, 1))


def _refuse(**options: object) -> None:
    for name, x in options.items():
        if x is not None:
            raise ValueError(f"{name} is not for the Triton kernels: leave it None, or use mlsys.attention.flash")


def _checked(q: Tensor, v: Tensor, block_q: object, block_k: object, precision: object, config: object) -> Configs:
    """The configs to force, after refusing what the kernels of attention cannot take."""
    for name, block, constant in (("block_q", block_q, "BLOCK_M"), ("block_k", block_k, "BLOCK_N")):
        if block is not None:
            raise ValueError(
                f"{name} is not for the Triton kernels, got {block!r}: force {constant} with "
                "config=Configs(forward=…), of mlsys.kernels._triton.config"
            )
    if q.dtype == torch.float64:
        raise TypeError(
            "q must be float32, bfloat16 or float16 for the Triton kernels, got float64: use mlsys.attention.flash"
        )
    for name, x in (("q", q), ("v", v)):
        if x.shape[-1] > LARGEST:
            raise ValueError(
                f"{name} must have head_dim at most {LARGEST} for the Triton kernels, got {x.shape[-1]}: "
                "use mlsys.attention.flash"
            )
    if precision not in ("ieee", "tf32"):
        raise ValueError(f'precision must be "ieee" or "tf32", got {precision!r}')
    if config is not None and not isinstance(config, Configs):
        raise TypeError(f"config must be Configs or None, got {type(config).__name__}: e.g. Configs(forward=config(…))")
    return config or Configs()


def _attend(q: Tensor, k: Tensor, v: Tensor, call: Call, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """O, and L in natural logarithms if it is returned; recorded for a backward pass if one may come."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        out, lse = _Flash.apply(q, k, v, call, return_lse)
        return out, lse
    out, lse = _results(q, v, call)
    forward(q, k, v, out, lse, call)
    return out, lse / LOG2E if return_lse else None


class _Flash(torch.autograd.Function):
    """Keeps the inputs, O and L for the backward pass; never a tile."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        out, lse = _results(q, v, call)
        forward(q, k, v, out, lse, call)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        return out, lse / LOG2E if return_lse else None

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("flash_triton has no second derivative: use naive.attention with create_graph=True")
        grad, grad_lse = grads
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        backward(q, k, v, out, lse, grad, grad_lse, (dq, dk, dv), ctx.call)
        return dq, dk, dv, None, None


def _results(q: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Room for O and L, of the layout of what is returned."""
    b, h, t, _ = q.shape
    dv = v.shape[3]
    lse = q.new_empty(b, h, t, dtype=torch.float32)
    if call.ends_q is None:
        return q.new_empty(b, h, t, dv), lse
    return q.new_empty(b, t, h, dv).transpose(1, 2), lse


def typical(
    device: torch.device, dtype: torch.dtype, shape: Sequence[int] | None
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls to tune for, both passes: of batch × heads × length × head_dim, or usual ones. For `mlsys tune`."""
    if shape is not None and len(shape) != 4:
        raise ValueError("it must be batch, heads, length and head_dim, such as 4x16x4096x128")
    for sizes in [shape] if shape else ((4, 32, 4096, 64), (4, 16, 4096, 128), (1, 16, 16384, 128)):
        x = torch.randn(*sizes, dtype=dtype, device=device, requires_grad=True)
        for causal in (True, False):
            yield f"{' × '.join(map(str, sizes))}{' causal' if causal else ''}", partial(_both_passes, x, causal)


def _both_passes(x: Tensor, causal: bool) -> None:
    """Forward and backward of attention to itself, with x as the gradient that arrives."""
    attention(x, x, x, causal=causal).backward(x.detach())
