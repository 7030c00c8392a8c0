"""Functions and results on their way between processes: by name what the other side can import, by value the rest.

pickle sends a function as its module and name, so it fails for what the receiver cannot import: the script that runs
(`__main__`), a notebook's cells, closures, pytest's test modules, files loaded by path. cloudpickle sends such code
itself, but only for `__main__` and closures by its own choice; here each module is looked up as a fresh Python would,
and those that it would not find travel by value too.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import linecache
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import cloudpickle
import torch

# cloudpickle's list of modules that go by value belongs to the process: one thread must not tidy up what another needs.
_registry = threading.RLock()


def _after_fork() -> None:
    global _registry
    _registry = threading.RLock()  # another thread may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Pickler(cloudpickle.Pickler):
    """cloudpickle, with the choice of what goes by value made for each module when it is first met."""

    def __init__(self) -> None:
        self.file = io.BytesIO()
        super().__init__(self.file, protocol=pickle.HIGHEST_PROTOCOL)
        self.known: dict[str, bool] = {}  # module → whether the other side can import it
        self.registered: list[ModuleType] = []
        self.by_value: dict[int, Any] = {}  # classes and functions at the top of a module, by id
        self.sources: dict[str, Any] = {}  # code that is in no file (a notebook's cell) → its lines, for tracebacks

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, FunctionType | type):
            by_value = self._decide(getattr(obj, "__module__", None))
            if by_value and obj.__qualname__ == obj.__name__ != "<lambda>":
                self.by_value[id(obj)] = obj
            if isinstance(obj, FunctionType):
                filename = obj.__code__.co_filename
                if filename in linecache.cache and not Path(filename).exists():
                    self.sources[filename] = linecache.cache[filename]
        elif isinstance(obj, ModuleType):
            by_value = self._decide(obj.__name__)
            # cloudpickle knows modules by their exact type, and takes along those that an attribute's name fits:
            # `torch.distributed.config`, of a class of its own, for any function with `dist` and a `.config` in it.
            if type(obj) is not ModuleType and not by_value and sys.modules.get(obj.__name__) is obj:
                return importlib.import_module, (obj.__name__,)
        elif type(obj) is torch.Tensor and _is_plain(obj):
            return _reduced(obj)
        return super().reducer_override(obj)

    def _decide(self, name: str | None) -> bool:
        """Whether what this module defines goes by value."""
        module = sys.modules.get(name) if name else None
        if module is None or name is None:
            return False
        if name not in self.known:
            self.known[name] = importable(module)
            registered = name == "__main__" or name in cloudpickle.list_registry_pickle_by_value()
            if not self.known[name] and not registered:
                cloudpickle.register_pickle_by_value(module)
                self.registered.append(module)
        return not self.known[name]

    def unregister(self) -> None:
        """Leave cloudpickle's registry as it was."""
        for module in self.registered:
            cloudpickle.unregister_pickle_by_value(module)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is nothing but its elements: not sparse, not a view that negates, without attributes."""
    views = tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
    where = tensor.layout is torch.strided and tensor.device.type in ("cpu", "cuda")
    return where and not views and tensor.numel() > 0 and not vars(tensor)


def _reduced(tensor: torch.Tensor) -> tuple[Any, ...]:
    """How to make this tensor again from its bytes, of a view only its own, and of a GPU's on the CPU.

    torch's own way goes through `torch.save`, which takes twice as long and sends the whole storage of a view.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    strides = tensor.stride() if tensor.device.type == "cpu" and _is_dense(tensor) else None
    if strides is not None:  # a transposed matrix comes back transposed
        flat = torch.as_strided(tensor.detach(), (tensor.numel(),), (1,)).view(torch.uint8)
    buffer = pickle.PickleBuffer(flat.numpy().data)
    return _rebuilt, (buffer, tensor.dtype, tuple(tensor.shape), strides, tensor.requires_grad)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill a range of memory, in whatever order."""
    return torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride() == tensor.stride()


def _rebuilt(
    buffer: bytearray, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...] | None, requires_grad: bool
) -> torch.Tensor:
    flat = torch.frombuffer(buffer, dtype=dtype)
    whole = flat.reshape(shape) if strides is None else flat.as_strided(shape, strides)
    return whole.requires_grad_(requires_grad)


@dataclass(frozen=True)
class Parcel:
    """A function and its arguments on their way to processes that have not seen its code.

    data:    pickled.
    modules: that it takes by name, and so must be imported there.
    sources: lines of code that is in no file, by the name that it has in tracebacks.
    """

    data: bytes
    modules: list[str]
    sources: dict[str, Any]


@contextlib.contextmanager
def _pickling() -> Iterator[_Pickler]:
    """A pickler; while it is used, the registry is this thread's."""
    pickler = _Pickler()
    with _registry:
        try:
            yield pickler
        finally:
            pickler.unregister()


def pack(value: Any) -> Parcel:
    """`value`, with what a fresh process needs to unpack it."""
    with _pickling() as pickler:
        pickler.dump(value)
        pickler.dump(list(pickler.by_value.values()))  # shares what was dumped before
    modules = [name for name, found in pickler.known.items() if found]
    return Parcel(pickler.file.getvalue(), modules, pickler.sources)


def unpack(parcel: Parcel) -> Any:
    """The value again.

    Classes and functions that came by value are put under their names into modules of their names, so that plain
    pickle, which `torch.save` and `all_gather_object` use, finds them here too.
    """
    linecache.cache.update(parcel.sources)
    unpickler = pickle.Unpickler(io.BytesIO(parcel.data))
    value = unpickler.load()
    for found in unpickler.load():
        module = sys.modules.setdefault(found.__module__, ModuleType(found.__module__))
        if not hasattr(module, found.__name__):
            setattr(module, found.__name__, found)
    return value


def dumps(value: Any) -> bytes:
    """`value` as bytes. CUDA tensors are sent as CPU tensors; a view takes only its own bytes."""
    with _pickling() as pickler:
        pickler.dump(value)
    return pickler.file.getvalue()


def loads(data: bytes | bytearray | memoryview) -> Any:
    """What `dumps` was given."""
    return pickle.loads(data)


def dump_error(error: BaseException) -> bytes | None:
    """An exception as bytes, without its traceback; None if it cannot be sent.

    An exception is pickled as a call of its class with its `args`, which fails for every class whose `__init__` takes
    something else than it hands on to `Exception`. Such a one is made again without `__init__`.
    """
    error = error.with_traceback(None)
    for sent in (error, _Made(error)):
        with contextlib.suppress(Exception):
            data = dumps(sent)
            if type(loads(data)) is type(error):
                return data
    return None


class _Made:
    """Pickled in place of an exception, and unpickled as that exception."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (type(self.error), self.error.args, vars(self.error))


def _made(kind: type[BaseException], args: tuple[Any, ...], attributes: dict[str, Any]) -> BaseException:
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(attributes)
    return error


def importable(module: ModuleType) -> bool:
    """Whether a fresh Python with this `sys.path` would import this very file under this name."""
    if module.__name__ == "__main__":
        return False
    if type(getattr(module, "__loader__", None)).__module__.startswith("_pytest"):
        return False  # a test module or conftest: importing it anew would need pytest, and take a second
    if module.__spec__ is None:  # made by hand: by a package, as torch.ops is, or by whoever now launches
        return _find(module.__name__.partition(".")[0], None) is not None
    name, path, origin = "", None, None
    for part in module.__name__.split("."):
        name = f"{name}.{part}" if name else part
        spec = _find(name, path)
        if spec is None:
            return False
        path, origin = spec.submodule_search_locations, spec.origin if spec.has_location else None
    file = getattr(module, "__file__", None)
    return file is None or origin is None or os.path.realpath(origin) == os.path.realpath(file)


def _find(name: str, path: Any) -> Any:
    """The module's spec; `importlib.util.find_spec` would take the answer from `sys.modules`."""
    for finder in sys.meta_path:
        if type(finder).__module__.startswith("_pytest") or not hasattr(finder, "find_spec"):
            continue
        with contextlib.suppress(Exception):  # of a namespace package whose parent is not imported
            spec = finder.find_spec(name, path)
            if spec is not None:
                return spec
    return None
