"""The few calls of CUDA's driver that a launch takes: load machine code, find a kernel in it, run it.

NVIDIA's own Python library, cuda.core, makes them where it is installed; elsewhere the driver's library is called
through ctypes, which needs nothing but the driver. Both take arguments as cuLaunchKernel does, an array of addresses,
as kernels on the processor do: cuda.core's own `launch` converts arguments itself, and knows no structures, so its
bindings are used for that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_HANDLE, _INT, _UINT = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint
_PROTOTYPES = {
    "cuInit": [_UINT],
    "cuDriverGetVersion": [ctypes.POINTER(_INT)],
    "cuGetErrorName": [_INT, ctypes.POINTER(ctypes.c_char_p)],
    "cuGetErrorString": [_INT, ctypes.POINTER(ctypes.c_char_p)],
    "cuDeviceGet": [ctypes.POINTER(_INT), _INT],
    "cuDevicePrimaryCtxRetain": [ctypes.POINTER(_HANDLE), _INT],
    "cuCtxPushCurrent_v2": [_HANDLE],
    "cuCtxPopCurrent_v2": [ctypes.POINTER(_HANDLE)],
    "cuModuleLoadData": [ctypes.POINTER(_HANDLE), ctypes.c_char_p],
    "cuModuleGetFunction": [ctypes.POINTER(_HANDLE), _HANDLE, ctypes.c_char_p],
    "cuFuncSetAttribute": [_HANDLE, _INT, _INT],
    "cuLaunchKernel": [_HANDLE, *[_UINT] * 7, _HANDLE, ctypes.POINTER(_HANDLE), ctypes.POINTER(_HANDLE)],
}


class CudaError(RuntimeError):
    """The driver refused; its name for why, and its words."""


class Function(Protocol):
    """A kernel on a device, ready to be launched."""

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        shared: int,
        stream: int,
        pointers: ctypes.Array[ctypes.c_void_p],
    ) -> None:
        """Onto a stream, without waiting. CudaError if the driver refuses."""


class Driver(Protocol):
    """What a launch needs of a driver."""

    def version(self) -> tuple[int, int]:
        """Of CUDA, the newest that the driver knows."""

    def functions(self, ordinal: int, cubin: bytes, names: Sequence[str]) -> dict[str, Function]:
        """Load machine code onto a device; its kernels by mangled name."""


@cache
def driver() -> Driver:
    """cuda.core if it is installed, else the driver's library. CudaError if there is no driver."""
    try:
        return Core()
    except ImportError:
        return Library()


class Library:
    """The driver's library, through ctypes."""

    def __init__(self, library: Any = None) -> None:
        try:
            self.cuda = library or ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError(f"NVIDIA's driver is not installed, launching on a GPU needs it: {error}") from None
        for name, types in _PROTOTYPES.items():
            getattr(self.cuda, name).argtypes = types
        self.call("cuInit", 0)

    def version(self) -> tuple[int, int]:
        """Of CUDA, the newest that the driver knows."""
        number = _INT()
        self.call("cuDriverGetVersion", ctypes.byref(number))
        return number.value // 1000, number.value % 1000 // 10

    def functions(self, ordinal: int, cubin: bytes, names: Sequence[str]) -> dict[str, Function]:
        """Load machine code onto a device; its kernels by mangled name. They stay for as long as the process."""
        module = _HANDLE()
        found: dict[str, Function] = {}
        with self.current(context := self.context(ordinal)):
            self.call("cuModuleLoadData", ctypes.byref(module), cubin)
            for name in names:
                handle = _HANDLE()
                self.call("cuModuleGetFunction", ctypes.byref(handle), module, name.encode())
                found[name] = _LibraryFunction(self, context, handle)
        return found

    def context(self, ordinal: int) -> ctypes.c_void_p:
        """A device's own context, the one that torch uses."""
        device, context = _INT(), _HANDLE()
        self.call("cuDeviceGet", ctypes.byref(device), ordinal)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        return context

    @contextmanager
    def current(self, context: ctypes.c_void_p) -> Iterator[None]:
        """Calls in here go to this context."""
        self.call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent_v2", ctypes.byref(_HANDLE()))

    def call(self, name: str, *args: object) -> None:
        """CudaError unless it succeeds."""
        status = getattr(self.cuda, name)(*args)
        if status:
            words = [ctypes.c_char_p(), ctypes.c_char_p()]
            self.cuda.cuGetErrorName(status, ctypes.byref(words[0]))
            self.cuda.cuGetErrorString(status, ctypes.byref(words[1]))
            raise CudaError(f"{name}: " + ": ".join((w.value or b"unknown").decode() for w in words))


class _LibraryFunction:
    def __init__(self, library: Library, context: ctypes.c_void_p, handle: ctypes.c_void_p) -> None:
        self.driver, self.context, self.handle, self.allowed = library, context, handle, 0

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        shared: int,
        stream: int,
        pointers: ctypes.Array[ctypes.c_void_p],
    ) -> None:
        with self.driver.current(self.context):
            if shared > self.allowed:  # above 48 KB a kernel has to ask for it
                self.driver.call("cuFuncSetAttribute", self.handle, _MAX_DYNAMIC_SHARED, shared)
                self.allowed = shared
            self.driver.call("cuLaunchKernel", self.handle, *grid, *block, shared, stream or None, pointers, None)


class Core:
    """NVIDIA's cuda.core. ImportError if it is not installed, or older than its first stable names."""

    def __init__(self) -> None:
        from cuda.bindings import driver as bindings
        from cuda.core import Device, ObjectCode

        self.bindings, self.device, self.object_code = bindings, Device, ObjectCode

    def version(self) -> tuple[int, int]:
        """Of CUDA, the newest that the driver knows."""
        number = self.call("cuDriverGetVersion")
        return number // 1000, number % 1000 // 10

    def functions(self, ordinal: int, cubin: bytes, names: Sequence[str]) -> dict[str, Function]:
        """Load machine code onto a device; its kernels by mangled name."""
        self.device(ordinal).set_current()
        code = self.object_code.from_cubin(cubin)
        return {name: _CoreFunction(self, ordinal, code.get_kernel(name)) for name in names}

    def call(self, name: str, *args: object) -> Any:
        """Its result. CudaError unless it succeeds."""
        status, *result = getattr(self.bindings, name)(*args)
        if int(status):
            words = [getattr(self.bindings, f"cuGetError{part}")(status)[1] for part in ("Name", "String")]
            raise CudaError(f"{name}: " + ": ".join((w or b"unknown").decode() for w in words))
        return result[0] if result else None


class _CoreFunction:
    def __init__(self, core: Core, ordinal: int, kernel: Any) -> None:
        self.core, self.ordinal, self.kernel, self.allowed = core, ordinal, kernel, 0

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        shared: int,
        stream: int,
        pointers: ctypes.Array[ctypes.c_void_p],
    ) -> None:
        names, handle = self.core.bindings, int(self.kernel.handle)
        self.core.device(self.ordinal).set_current()
        if shared > self.allowed:  # above 48 KB a kernel has to ask for it
            which = names.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self.core.call("cuKernelSetAttribute", which, shared, names.CUkernel(handle), names.CUdevice(self.ordinal))
            self.allowed = shared
        self.core.call(
            "cuLaunchKernel",
            names.CUfunction(handle),
            *grid,
            *block,
            shared,
            names.CUstream(stream),
            ctypes.addressof(pointers),
            0,
        )
