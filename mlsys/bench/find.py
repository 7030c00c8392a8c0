"""Benchmarks are found, not registered: every `benchmarks/<package>/<technique>.py` that holds a `bench`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from mlsys.bench.core import Benchmark


def folder() -> Path:
    """Where the benchmarks lie: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for place in (package / "_benchmarks", package.parent / "benchmarks"):
        if place.is_dir():
            return place
    raise FileNotFoundError(f"no benchmarks in {package / '_benchmarks'} or {package.parent / 'benchmarks'}: reinstall")


def names() -> list[str]:
    """Every benchmark's name, without importing any."""
    return sorted(f"{p.parent.name}.{p.stem}" for p in folder().glob("*/*.py") if not p.stem.startswith("_"))


def path(name: str) -> Path:
    """The file of `attention.flash`."""
    package, _, technique = name.partition(".")
    return folder() / package / f"{technique}.py"


def load(name: str) -> Benchmark:
    """Import the file of `attention.flash` and return its `bench`."""
    return load_file(path(name))


def load_file(file: Path) -> Benchmark:
    """Import this file and return its `bench`."""
    bench = getattr(_imported(file), "bench", None)
    if not isinstance(bench, Benchmark):
        raise TypeError(f"{file} holds no `bench = Benchmark(...)`")
    return bench


def beside(file: str, stem: str) -> ModuleType:
    """The module `stem`.py in the folder of this file: what benchmarks of a folder, which is no package, share."""
    return _imported(Path(file).with_name(f"{stem}.py"))


def _imported(file: Path) -> ModuleType:
    """The module that this file defines, anew each time; `mlsys_benchmarks.attention.flash` is its name."""
    name = f"mlsys_benchmarks.{file.parent.name}.{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
