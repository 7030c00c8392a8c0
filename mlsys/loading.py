"""A function out of someone's file: "my.py:my_flash" → the callable.

The file is imported anew each time, under a module name of its own, with its folder
first on `sys.path` as when Python runs it, so that it can import its neighbours.
What goes wrong is said in terms of that file: its own line, not ours.

See also:
    `mlsys.contracts.isolate` (loads in a process that can be killed: importing a file runs it).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from mlsys.catalog import nearest


def load_function(spec: str) -> Callable[..., Any]:
    """The callable that "FILE.py:FUNCTION" names.

    ValueError if that is not its form or FILE is not a Python file; FileNotFoundError if there is no
    such file; ImportError if it cannot be imported; LookupError if it has no such name; TypeError if
    what has that name cannot be called.
    """
    found = load_object(spec)
    if not callable(found):
        raise TypeError(f"{spec} is not a function but {_article(type(found).__name__)}")
    return found


def load_object(spec: str) -> Any:
    """Whatever "FILE.py:NAME" names; errors as for `load_function`."""
    path, name = split(spec)
    module = import_file(path)
    if name in vars(module):
        return vars(module)[name]
    own = [
        n
        for n, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__
    ]
    near = nearest(name, own)
    if near:
        remedy = f"did you mean {' or '.join(near)}?"
    else:
        remedy = f"it defines {', '.join(own[:10])}" if own else "it defines no function"
    raise LookupError(f"{path.name} has no {name!r}; {remedy}")


def split(spec: str) -> tuple[Path, str]:
    """Take "my.py:my_flash" apart: the file, which must exist, and the name."""
    file, colon, name = spec.rpartition(":")
    if not colon or not file or not name.isidentifier():
        raise ValueError(f"expected FILE.py:FUNCTION, got {spec!r}")
    path = Path(file).expanduser()
    if path.suffix != ".py":
        raise ValueError(f"expected a Python file before the colon, got {file!r}")
    if not path.is_file():
        siblings = [other.name for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = nearest(path.name, siblings)
        raise FileNotFoundError(f"no file {file!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    return path.resolve(), name


def import_file(path: Path) -> ModuleType:
    """The module that this file defines; ImportError with the file's own line if running it fails."""
    name = f"mlsys_loaded_{hashlib.sha1(os.fsencode(path)).hexdigest()[:8]}_{path.stem}"
    loader = _FromSource(name, str(path))
    module = importlib.util.module_from_spec(ModuleSpec(name, loader, origin=str(path)))
    module.__file__ = str(path)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # stays: the function may import a neighbour when it is called
    sys.modules[name] = module  # dataclasses, pickling and typing look a class's module up here
    try:
        with _no_bytecode():
            loader.exec_module(module)
    except SystemExit as stop:
        del sys.modules[name]
        where = raised_at(stop, path) or path.name
        remedy = 'keep what only a script does under `if __name__ == "__main__":`'
        raise ImportError(f"{where}: importing it calls exit({stop.code!r}); {remedy}") from stop
    except Exception as error:
        del sys.modules[name]
        raise ImportError(f"{raised_at(error, path) or path.name}: {one_line(error)}") from error
    return module


def raised_at(error: BaseException, path: Path) -> str | None:
    """Where in this file an exception came from: "my.py:12 in my_flash: `scores = q @ k`", or None if nowhere.

    That is the innermost of the file's own lines on the way to the exception: the one that its author can change.
    """
    if isinstance(error, SyntaxError) and error.filename and _same(error.filename, path):
        text = (error.text or "").strip()
        return f"{path.name}:{error.lineno}" + (f": `{text}`" if text else "")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if _same(frame.filename, path):
            inside = "" if frame.name == "<module>" else f" in {frame.name}"
            return f"{path.name}:{frame.lineno}{inside}" + (f": `{frame.line}`" if frame.line else "")
    return None


def one_line(error: BaseException, limit: int = 400) -> str:
    """An exception as "TypeName: message", on one line, whatever its message holds."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}"
    try:
        message = " ".join(str(error).split())
    except Exception:
        message = "(its message cannot be printed)"
    name = type(error).__name__
    return f"{name}: {message[:limit] + '…' if len(message) > limit else message}" if message else name


class _FromSource(SourceFileLoader):
    """Compiles the file as it is now: a cached .pyc of the same second and size would be someone's last try."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """No `__pycache__` appears in the folder that is imported from."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _same(filename: str, path: Path) -> bool:
    return filename == str(path) or os.path.realpath(filename) == os.path.realpath(path)


def _article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
