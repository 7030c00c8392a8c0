"""Matrix product in Triton: tiles in an order that suits the cache, programs that stay, copies that hardware makes.

A program computes a tile of C: it walks along k, multiplies a tile of A by one of B with the tensor cores, and keeps
the sums in registers. Which thread holds what, how tiles lie in shared memory and how many are on their way are the
compiler's work. What is left to decide is which tile comes when.

    C in tiles, GROUP = 2      Programs that run at the same time should read the same tiles of A and B. Six of them
                               in row order need, for each slice of k, one of A's tiles and six of B's, seven in
     0  2  4  6  8 10          all; in groups of two rows, two and three, five in all. Read once by all of them, they
     1  3  5  7  9 11          come from the second-level cache. A hundred programs: 101 tiles in row order, 21 in
    12 14 16 18 20 22          groups of eight rows.
    13 15 17 19 21 23
    24 25 26 27 28 29          The last group has the rows that are left.

`tiled`       a program for each tile. Each fills its pipeline, multiplies, stores and leaves; a tile of this size fills
              a multiprocessor, which loads nothing while it stores.
`persistent`  as many programs as multiprocessors, and program p walks along the tiles p, p + P, p + 2P, …; the loops
              over tiles and over k are made one, so that the first slices of a tile load while the one before is
              stored.
`descriptor`  the same walk, but a descriptor says where a matrix lies, and one thread asks for a whole tile, which the
              hardware (TMA, from sm_90 on) copies: no thread computes addresses or holds them, edges need no masks, and
              C leaves the same way.

Fused behind the sums, while they are in registers, the epilogue C = activation(A · B + bias) costs no traffic. The
backward pass has dz = dy · activation'(z), for which z is stored beside C where it is needed, and then

    dA = dz Bᵀ     dB = Aᵀ dz     dbias = Σ_rows dz

by the same kernels on transposed views, of which nothing is copied. A gradient lies in memory as its factor does.

16-bit factors are multiplied as they are, summed in float32 and rounded once. float32 is multiplied in float32
(`precision="ieee"`), without tensor cores; "tf32" takes them, and drops 13 bits of each factor.

Cost:
    2·m·n·k FLOPs; 4·m·n·k more backward.

Memory:
    C, and z if a gradient is asked for behind an activation other than ReLU, of which C says enough. Traffic:
    `mlsys.kernels.matmul.traffic` from the second-level cache, and from memory what the order of tiles makes of it.

Where it loses: with fewer tiles than multiprocessors part of the chip is idle, and here k is not split. A single row is
bound by reading B.

Papers:
    Tillet, Kung & Cox 2019, "Triton: An Intermediate Language and Compiler for Tiled Neural Network Computations",
    MAPL (programs over tiles).
    Osama, Merrill, Cecka, Garland & Owens 2023, "Stream-K", PPoPP, arXiv:2301.03598 (waves of tiles that do not fill
    the chip, and grids of the size of the chip).

See also:
    `mlsys.kernels.matmul` (the readable version), `mlsys.kernels.matmul_cuda` (the same steps, and those before, in
    CUDA).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mlsys.kernels._inputs import differentiable_once, like
from mlsys.kernels._matmul_triton_launch import KERNELS, Call, before_activation, configs, product, specimens, swapped
from mlsys.kernels._triton import Config, on_device
from mlsys.kernels.matmul import check_inputs

__all__ = ["VARIANTS", "configs", "matmul", "refuse", "specimens", "typical"]

VARIANTS = tuple(KERNELS)
ACTIVATIONS = ("relu", "gelu", "silu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST = 2**31 - 1024  # indices are ints of 32 bits, and those of the last tile go beyond the edge

Precision = Literal["ieee", "tf32"]


def matmul(
    a: Float[Tensor, "m k"],
    b: Float[Tensor, "k n"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    activation: str | None = None,
    approximate: str = "none",
    precision: Precision = "ieee",
    variant: str = "tiled",
    config: Config | None = None,
) -> Float[Tensor, "m n"]:
    """activation(a · b + bias), in float32, bfloat16 or float16, rounded once; differentiable once.

    activation:  None, "relu", "gelu" or "silu". approximate: of the GELU, "none" or "tanh", as `mlsys.kernels.gelu`.
    precision:   of float32 factors: "ieee", or "tf32", which tensor cores take.
    variant:     one of `VARIANTS`. "descriptor" is for matrices with contiguous rows, or columns, that begin at
                 multiples of 16 bytes, and for GPUs from sm_90 on; the others take any strides.
    config:      one of `configs(…)`, for all products of both passes; without it each is tuned, by itself.
    TypeError, ValueError naming the argument, and if the variant cannot do it; RuntimeError without a GPU or the
    interpreter.
    """
    check_inputs(a, b)
    if bias is not None:
        like("bias", bias, a, (b.shape[1],), "a")
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    call = Call(variant, _epilogue(activation, approximate), _precision(precision, a), _config(config))
    if why := refuse(a, b, variant=variant):
        raise (TypeError if a.dtype not in DTYPES else ValueError)(f"variant {variant!r} cannot compute this: {why}")
    on_device("matmul", a=a, b=b, bias=bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (a, b, bias)):
        result: Tensor = _Matmul.apply(a, b, bias, call)
        return result
    return product(a, b, call, bias)[0]


def refuse(a: Tensor, b: Tensor, *, variant: str) -> str | None:
    """Why a variant cannot multiply these matrices, and what to do about it, or None."""
    if a.dtype not in DTYPES:
        return f"it takes float32, bfloat16 or float16, and a is {a.dtype}: convert the matrices, or take 'torch'"
    if max(a.shape + b.shape) > MOST:
        return (
            f"sizes are ints of 32 bits, and the shapes are {tuple(a.shape)} and {tuple(b.shape)}: split the matrices"
        )
    if variant != "descriptor" or 0 in (*a.shape, *b.shape):
        return None
    if a.device.type == "cuda" and (have := torch.cuda.get_device_capability(a.device)) < (9, 0):
        return f"TMA needs compute capability 9.0, this GPU has {have[0]}.{have[1]}: take 'persistent'"
    for name, x in (("a", a), ("b", b)):
        if swapped(x) is None:
            return (
                f"the rows of {name}, or its columns, must be contiguous and begin at multiples of 16 bytes, got shape "
                f"{tuple(x.shape)} and strides {x.stride()} in {x.dtype}: pad them, or take 'persistent'"
            )
    if b.shape[1] * b.element_size() % 16:
        return (
            f"rows of the result must be multiples of 16 bytes, got {b.shape[1]} numbers of {b.dtype}: pad the columns "
            "of b, or take 'persistent'"
        )
    return None


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None, call: Call) -> Tensor:
        keep = call.activation not in ("", "relu")
        c, *z = product(a, b, call, bias, keep=keep)
        of_a, of_b = ctx.needs_input_grad[:2]
        behind = z if keep else [c] if call.activation else []
        ctx.save_for_backward(a if of_b else None, b if of_a else None, *behind)
        ctx.call, ctx.columns = call, [x.stride(0) == 1 and x.stride(1) != 1 for x in (a, b)]
        return c

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        differentiable_once("the Triton matmul", "mlsys.kernels.matmul")
        a, b, *z = ctx.saved_tensors
        call = ctx.call.plain()
        dz = before_activation(dy, z[0], ctx.call.activation) if z else dy
        if call.variant == "descriptor" and dz.numel() and swapped(dz) is None:
            dz = dz.clone(memory_format=torch.contiguous_format)  # such as the expanded gradient of a sum
        da = _laid(ctx.columns[0], dz, b.mT, call) if ctx.needs_input_grad[0] else None
        db = _laid(ctx.columns[1], a.mT, dz, call) if ctx.needs_input_grad[1] else None
        dbias = dz.sum(0, dtype=torch.float32).to(dz.dtype) if ctx.needs_input_grad[2] else None
        return da, db, dbias, None


def _laid(by_columns: bool, left: Tensor, right: Tensor, call: Call) -> Tensor:
    """The gradient left · right of a factor, by columns if the factor lies in memory by columns."""
    return product(right.mT, left.mT, call)[0].mT if by_columns else product(left, right, call)[0]


def _epilogue(activation: object, approximate: object) -> str:
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    if approximate == "tanh" and activation != "gelu":
        raise ValueError(f"approximate is of the GELU, and activation is {activation!r}: leave it 'none'")
    return f"{activation or ''}{' tanh' if approximate == 'tanh' else ''}"


def _precision(precision: object, a: Tensor) -> str:
    if precision not in ("ieee", "tf32"):
        raise ValueError(f'precision must be "ieee" or "tf32", got {precision!r}')
    if precision == "tf32" and a.dtype != torch.float32:
        raise ValueError(f'precision "tf32" is of float32 factors, and a is {a.dtype}: leave it "ieee"')
    return str(precision)


def _config(config: object) -> Config | None:
    if config is not None and not isinstance(config, Config):
        raise TypeError(f"config must be a Config or None, got {type(config).__name__}: take one of configs(…)")
    return config


def typical(
    device: torch.device, dtype: torch.dtype, shape: Sequence[int] | None
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls to tune for, both passes of every variant: of m × n × k, given or usual. For `mlsys tune`."""
    if shape is not None and len(shape) != 3:
        raise ValueError("it must be m, n and k, such as 4096x4096x4096")
    for m, n, k in [shape] if shape else ((4096, 4096, 4096), (8192, 8192, 8192), (16, 4096, 4096)):
        a = torch.randn(m, k, dtype=dtype, device=device, requires_grad=True)
        b = torch.randn(k, n, dtype=dtype, device=device, requires_grad=True)
        for variant in VARIANTS:
            if refuse(a, b, variant=variant) is None:
                yield f"{variant} {m} × {n} × {k}", partial(_both_passes, a, b, variant)


def _both_passes(a: Tensor, b: Tensor, variant: str) -> None:
    """Forward and backward, with the result as the gradient that arrives."""
    c = matmul(a, b, variant=variant)
    c.backward(c.detach())
