"""What kernels ask of their arguments, said once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16)
_WORDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int32: "int32", torch.uint8: "uint8"}


def tensor(name: str, x: object, dtypes: Sequence[torch.dtype] = FLOATS, shape: str = "") -> Tensor:
    """`x`, if it is a tensor of one of these dtypes, with as many dimensions as `shape` names: "(rows, columns)"."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(_WORDS[d] for d in dtypes)}, got {x.dtype}: convert it")
    if shape and x.ndim != shape.count(",") + (not shape.endswith(",)")):
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(x.shape)}")
    return x


def like(name: str, x: object, other: Tensor, shape: tuple[int, ...], other_name: str = "x") -> Tensor:
    """x, if it is a tensor of this shape, and of the dtype and device of `other`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}, got {x.dtype}: convert one of them")
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {x.device}: move it")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(x.shape)}")
    return x


def forward_only(**tensors: Tensor | None) -> None:
    """ValueError if a gradient is wanted of a tensor: the CUDA kernels have none."""
    for name, x in tensors.items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, and the CUDA kernels compute forward only: give {name}.detach(), call "
                'under torch.no_grad(), or take variant="torch"'
            )


def differentiable_once(kernels: str, remedy: str) -> None:
    """For the beginning of a backward pass: RuntimeError if its result is to be differentiated again.

    `once_differentiable` would say so only if the gradient that arrives requires one, and else drop terms in silence.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{kernels} is differentiable once, and create_graph=True asks for more: use {remedy}")


def variant_of(variant: object, variants: Sequence[str]) -> str:
    """The variant, if it is one of these."""
    if variant not in variants:
        raise ValueError(f"variant must be one of {', '.join(map(repr, variants))}, got {variant!r}")
    return str(variant)
