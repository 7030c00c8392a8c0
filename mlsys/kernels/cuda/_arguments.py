"""Arguments of a launch: each is converted by what the kernel's own signature says, or refused.

A parameter's code comes from the compiler (mlsys_module.h): `f4` a float, `i8` a long long, `*cf4` a pointer to
constant floats, `*v4f4` a pointer to float4, `s128` a structure of 128 bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlsys.kernels.cuda._source import Declared
from mlsys.kernels.cuda._tensor_map import TensorMap

# What an element of this code may be in torch. torch has few operations for unsigned integers: the signed ones will do.
_DTYPES = {
    "f4": (torch.float32,),
    "f8": (torch.float64,),
    "h2": (torch.float16,),
    "b2": (torch.bfloat16,),
    "i1": (torch.int8, torch.uint8),
    "u1": (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2),
    "?1": (torch.bool, torch.uint8),
    "i2": (torch.int16, torch.uint16),
    "u2": (torch.uint16, torch.int16, torch.bfloat16, torch.float16),
    "i4": (torch.int32, torch.uint32),
    "u4": (torch.uint32, torch.int32),
    "i8": (torch.int64, torch.uint64),
    "u8": (torch.uint64, torch.int64),
}
_NAMES = {
    "f4": "float", "f8": "double", "h2": "__half", "b2": "__nv_bfloat16", "i1": "signed char", "u1": "unsigned char",
    "?1": "bool", "i2": "short", "u2": "unsigned short", "i4": "int", "u4": "unsigned", "i8": "long long",
    "u8": "unsigned long long",
}  # fmt: skip
_INTEGERS = {
    "i1": ctypes.c_int8, "u1": ctypes.c_uint8, "i2": ctypes.c_int16, "u2": ctypes.c_uint16, "i4": ctypes.c_int32,
    "u4": ctypes.c_uint32, "i8": ctypes.c_int64, "u8": ctypes.c_uint64,
}  # fmt: skip

_ROOM = 4096  # bytes


@dataclass(frozen=True)
class Arguments:
    """Converted: one value in memory an argument, an array of their addresses, and the tensors among them."""

    values: tuple[Any, ...]
    pointers: ctypes.Array[ctypes.c_void_p]
    tensors: tuple[tuple[int, Tensor], ...]


def convert(declared: Declared, codes: Sequence[str], args: Sequence[Any]) -> Arguments:
    """The arguments of one launch. TypeError or ValueError naming the parameter, what was given, and what would do."""
    if len(args) != len(codes):
        raise TypeError(f"{declared.name} takes {len(codes)} arguments, got {len(args)}: {declared}")
    names = [p.name or f"number {i}" for i, p in enumerate(declared.parameters)]
    if len(names) != len(codes):  # a declaration that only the compiler could follow
        names = [f"number {i}" for i in range(len(codes))]
    values = tuple(_value(declared.name, name, code, arg) for name, code, arg in zip(names, codes, args, strict=True))
    pointers = (ctypes.c_void_p * max(len(values), 1))(*map(ctypes.addressof, values))
    return Arguments(
        values, pointers, tuple((i, tensor) for i, arg in enumerate(args) if (tensor := _tensor(arg)) is not None)
    )


def device_of(args: Sequence[Any]) -> torch.device:
    """Where all tensors among the arguments are; the CPU if there are none. ValueError if on several devices."""
    devices = {tensor.device for arg in args if (tensor := _tensor(arg)) is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors of a launch must be on one device, got {', '.join(sorted(map(str, devices)))}")
    return devices.pop() if devices else torch.device("cpu")


def copied(args: Sequence[Any]) -> list[Any]:
    """The same arguments in memory of their own, with room round it; what shares memory still does."""
    storages: dict[int, torch.UntypedStorage] = {}

    def copy(tensor: Tensor) -> Tensor:
        storage = tensor.detach().untyped_storage()
        if storage.data_ptr() not in storages:
            larger = torch.UntypedStorage(storage.nbytes() + 2 * _ROOM)
            larger[_ROOM : _ROOM + storage.nbytes()].copy_(storage)
            storages[storage.data_ptr()] = larger
        with torch.no_grad():
            empty = torch.empty(0, dtype=tensor.dtype)
            offset = tensor.storage_offset() + _ROOM // tensor.element_size()
            return empty.set_(storages[storage.data_ptr()], offset, tensor.shape, tensor.stride())

    return [
        arg.of(copy(arg.tensor)) if isinstance(arg, TensorMap) else copy(arg) if isinstance(arg, Tensor) else arg
        for arg in args
    ]


def _tensor(arg: Any) -> Tensor | None:
    """The tensor that an argument is, or speaks of."""
    return arg.tensor if isinstance(arg, TensorMap) else arg if isinstance(arg, Tensor) else None


def _value(kernel: str, name: str, code: str, arg: Any) -> Any:
    where = f"argument {name} of {kernel}"
    if code.startswith("*"):
        return ctypes.c_void_p(_address(where, code[1:].removeprefix("c"), arg))
    if isinstance(arg, Tensor):
        raise TypeError(f"{where} is {_spoken(code)}, not a pointer: got a tensor, give {name}.item()")
    if code in ("f4", "f8"):
        if isinstance(arg, bool) or not isinstance(arg, int | float):
            raise TypeError(f"{where} is a {_NAMES[code]}: give a float, got {arg!r}")
        return (ctypes.c_float if code == "f4" else ctypes.c_double)(arg)
    if code == "?1":
        if not isinstance(arg, bool | int):
            raise TypeError(f"{where} is a bool: give True or False, got {arg!r}")
        return ctypes.c_bool(bool(arg))
    if code in _INTEGERS:
        kind = _INTEGERS[code]
        if isinstance(arg, bool) or not isinstance(arg, int):
            raise TypeError(f"{where} is {_spoken(code)}: give an int, got {arg!r}")
        if kind(arg).value != arg:
            raise ValueError(f"{where} is {_spoken(code)}, which cannot hold {arg}")
        return kind(arg)
    if code in ("h2", "b2"):
        if isinstance(arg, bool) or not isinstance(arg, int | float):
            raise TypeError(f"{where} is a {_NAMES[code]}: give a float, got {arg!r}")
        half = torch.tensor(arg, dtype=torch.float16 if code == "h2" else torch.bfloat16)
        return ctypes.c_uint16(int(half.view(torch.uint16)))
    if code.startswith("v"):  # a vector by value: its elements, or its bytes
        return _vector(where, code, arg)
    size = int(code[1:])
    raw = bytes(arg) if isinstance(arg, bytes | bytearray | ctypes.Structure | ctypes.Array | TensorMap) else None
    if raw is None or len(raw) != size:
        raise TypeError(
            f"{where} is a structure of {size} bytes: give that many bytes or a ctypes structure, got {arg!r}"
        )
    return (ctypes.c_char * size).from_buffer_copy(raw)


def _vector(where: str, code: str, arg: Any) -> Any:
    count, element = int(code[1]), code[2:]
    if not isinstance(arg, Sequence) or len(arg) != count:
        raise TypeError(f"{where} is a vector of {count} × {_NAMES[element]}: give {count} numbers, got {arg!r}")
    raw = b"".join(bytes(_value("it", f"{where}[{i}]", element, x)) for i, x in enumerate(arg))
    return (ctypes.c_char * len(raw)).from_buffer_copy(raw)


def _address(where: str, code: str, arg: Any) -> int | None:
    if arg is None:
        return None
    if not isinstance(arg, Tensor):
        raise TypeError(f"{where} is a pointer: give a tensor, got {arg!r}")
    element = code.split("v", 1)[1][1:] if code.startswith("v") and code != "void" else code
    allowed = _DTYPES.get(element)
    if allowed is not None and arg.dtype not in allowed:
        raise TypeError(
            f"{where} is a pointer to {_NAMES[element]}: give a tensor of {allowed[0]}, got {arg.dtype}; "
            f"x.to({allowed[0]}) converts"
        )
    if not arg.is_contiguous():
        raise ValueError(
            f"{where} must be contiguous, since a kernel gets no strides: got shape {tuple(arg.shape)} with strides "
            f"{arg.stride()}; give x.contiguous()"
        )
    if arg.is_conj() or arg.is_neg():
        raise ValueError(
            f"{where} must be plain memory, got a lazy conjugate or negative: give x.resolve_conj().resolve_neg()"
        )
    return int(arg.data_ptr())


def _spoken(code: str) -> str:
    if code.startswith("v"):
        return f"a vector of {code[1]} × {_NAMES[code[2:]]}"
    name = _NAMES.get(code, f"a structure of {code[1:]} bytes")
    return name if name.startswith("a ") else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
