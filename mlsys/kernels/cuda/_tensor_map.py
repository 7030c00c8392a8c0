"""Tensor maps: what the tensor memory accelerator has to know of a tensor, and of the box that one copy moves.

A Hopper kernel takes one as `const __grid_constant__ CUtensorMap map` and copies boxes by `mlsys::ptx::tma_load_2d`.
On a GPU the driver encodes it; on the processor it is a structure of the same 128 bytes, which `runtime/async.cpp`
reads.

    a = tensor_map(x, box=(64, 64))          # x: (M, K) bfloat16; 64 rows of 128 bytes, swizzled
    kernel(grid, block, a, y)

Communication:
    One thread issues a copy of up to 256 × 256 elements; no thread computes an address.

Memory:
    128 bytes a map. The tensor is kept alive by it, not copied.

Papers:
    NVIDIA, CUDA Driver API, "Tensor Map Object Management" (cuTensorMapEncodeTiled and its restrictions).
    NVIDIA, PTX ISA, "Tensors" and "Swizzling Modes".

See also:
    `include/mlsys/ptx.cuh` (the copies), `runtime/async.cpp` (what they do on the processor).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

BYTES = 128
_MAGIC = 0x70616D2073796C6D  # async.cpp has the same
_PROCESSOR = struct.Struct("<2Q3Q2Q3I3I48x")
_DRIVER_TYPES = {  # CUtensorMapDataType
    torch.uint8: 0, torch.int8: 0, torch.uint16: 1, torch.int16: 1, torch.uint32: 2, torch.int32: 3, torch.uint64: 4,
    torch.int64: 5, torch.float16: 6, torch.float32: 7, torch.float64: 8, torch.bfloat16: 9,
}  # fmt: skip
_INTERLEAVE_NONE, _SWIZZLE_NONE, _SWIZZLE_128, _L2_256, _ZEROS_OUTSIDE = 0, 0, 3, 3, 0


@dataclass(frozen=True, eq=False)
class TensorMap:
    """A tensor and the box of it that a copy moves; `bytes(map)` is what a kernel gets."""

    tensor: Tensor
    box: tuple[int, ...]
    swizzle: int

    def __bytes__(self) -> bytes:
        """The 128 bytes, for where the tensor is now."""
        return _encoded(self) if self.tensor.device.type == "cpu" else _encoded_by_driver(self, _driver())

    def of(self, tensor: Tensor) -> TensorMap:
        """The same box of another tensor."""
        return replace(self, tensor=tensor)


def tensor_map(tensor: Tensor, box: Sequence[int], *, swizzle: int = 128) -> TensorMap:
    """The map of a tensor of two or three dimensions, for copies of boxes of it.

    box: of a copy, in the order of the tensor's shape, such as (rows, columns); each 1 to 256.
    swizzle: 128, for wgmma: rows of the box have 128 bytes, and the 16-byte pieces of eight of them are permuted, so
    that columns too are read without bank conflicts. Or 0: as they are.
    Parts of a box that lie outside the tensor are read as zeros, and not written. ValueError or TypeError naming what
    the hardware does not take.
    """
    box = tuple(box)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor must be a torch tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _DRIVER_TYPES:
        raise TypeError(f"tensor must be of an ordinary type such as torch.bfloat16, got {tensor.dtype}")
    if tensor.dim() not in (2, 3) or tensor.numel() == 0:
        raise ValueError(f"tensor must have 2 or 3 dimensions, none of them 0, got shape {tuple(tensor.shape)}")
    if len(box) != tensor.dim() or not all(isinstance(n, int) and 1 <= n <= 256 for n in box):
        raise ValueError(f"box must be {tensor.dim()} ints from 1 to 256, one a dimension of the tensor, got {box}")
    if swizzle not in (0, 128):
        raise ValueError(f"swizzle must be 0 or 128, got {swizzle!r}")
    size = tensor.element_size()
    if tensor.stride(-1) != 1 or any(s * size % 16 for s in tensor.stride()[:-1]):
        raise ValueError(
            f"tensor must have rows without gaps, each beginning at a multiple of 16 bytes, got strides "
            f"{tensor.stride()} of {size}-byte elements: pad the rows to a multiple of {max(16 // size, 1)} elements"
        )
    if tensor.data_ptr() % 16:
        raise ValueError(
            f"tensor must begin at a multiple of 16 bytes, got the address {tensor.data_ptr():#x}: give x.clone()"
        )
    row = box[-1] * size
    if row % 16:
        raise ValueError(f"box must have rows of a multiple of 16 bytes, got {box[-1]} elements of {size} bytes: {row}")
    if swizzle and row != swizzle:
        raise ValueError(
            f"box must have rows of 128 bytes with swizzle=128: {128 // size} elements of {size} bytes, got {box[-1]}"
        )
    return TensorMap(tensor, box, swizzle)


def _inner_first(values: Sequence[int], fill: int, count: int = 3) -> list[int]:
    return [*reversed(values), *[fill] * (count - len(values))]


def _strides(tensor: Tensor) -> list[int]:
    return [s * tensor.element_size() for s in reversed(tensor.stride()[:-1])]


def _encoded(m: TensorMap) -> bytes:
    t = m.tensor
    return _PROCESSOR.pack(
        _MAGIC, t.data_ptr(), *_inner_first(t.shape, 1), *(*_strides(t), 0)[:2], *_inner_first(m.box, 1), t.dim(),
        t.element_size(), m.swizzle,
    )  # fmt: skip


def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as e:
        raise RuntimeError(
            f"a tensor map of a GPU's tensor is encoded by NVIDIA's driver, and libcuda.so.1 can not be loaded: {e}"
        ) from e


def _encoded_by_driver(m: TensorMap, driver: Any) -> bytes:
    t, n = m.tensor, m.tensor.dim()
    if not hasattr(driver, "cuTensorMapEncodeTiled"):
        raise RuntimeError("this NVIDIA driver has no cuTensorMapEncodeTiled: a driver for CUDA 12 or later is needed")
    room = (ctypes.c_char * (BYTES + 64))()
    where = -(-ctypes.addressof(room) // 64) * 64  # the driver wants 64-byte alignment
    encode = driver.cuTensorMapEncodeTiled
    encode.restype = ctypes.c_int
    status = encode(
        ctypes.c_void_p(where), ctypes.c_int(_DRIVER_TYPES[t.dtype]), ctypes.c_uint32(n), ctypes.c_void_p(t.data_ptr()),
        (ctypes.c_uint64 * n)(*reversed(t.shape)), (ctypes.c_uint64 * (n - 1))(*_strides(t)),
        (ctypes.c_uint32 * n)(*reversed(m.box)), (ctypes.c_uint32 * n)(*[1] * n), ctypes.c_int(_INTERLEAVE_NONE),
        ctypes.c_int(_SWIZZLE_128 if m.swizzle else _SWIZZLE_NONE), ctypes.c_int(_L2_256), ctypes.c_int(_ZEROS_OUTSIDE),
    )  # fmt: skip
    if status:
        raise RuntimeError(
            f"cuTensorMapEncodeTiled refused a tensor of shape {tuple(t.shape)}, strides {t.stride()}, {t.dtype}, "
            f"box {m.box}, swizzle {m.swizzle}: CUDA error {status}"
        )
    return ctypes.string_at(where, BYTES)
