"""What every test runs under: shapes checked, one thread, repeatable examples.

The technique packages name their shapes with jaxtyping; the import hook below makes each call
in the tests check them, through beartype. It must be installed before those packages are imported.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch and numpy when they start; children inherit it
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a script: tests of Ctrl-C would hang
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import jaxtyping
import pytest

from mlsys import catalog, cli

hypothesis.settings.register_profile("mlsys", deadline=None, derandomize=True, database=None, print_blob=False)
hypothesis.settings.load_profile("mlsys")


def with_shapes(package_root: Path) -> list[str]:
    """The technique modules that use jaxtyping, by dotted name.

    Not those that import numba or triton: their compilers read the function itself, and cannot see
    through a checking wrapper.
    """
    names = []
    for path in catalog.modules(package_root):
        imported = catalog.imports(ast.parse(path.read_text(encoding="utf-8")))
        roots = {name.partition(".")[0] for name in imported}
        if "jaxtyping" in roots and not roots & {"numba", "triton"}:
            names.append(catalog.dotted(path, package_root))
    return names


HOOKED = with_shapes(catalog.PACKAGE)
_early = [name for name in HOOKED if name in sys.modules]
if _early:
    raise RuntimeError(f"imported before the shape checks were installed: {', '.join(_early)}")
if HOOKED:
    jaxtyping.install_import_hook(HOOKED, "beartype.beartype")
WITHOUT_GPU = catalog.devices("torch")["cuda"] is not None
if WITHOUT_GPU:  # Triton reads this when it is imported, once for all tests
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """No shape checks in this test: what a function itself says about bad arguments is what is tested."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A test may change torch's thread count; the next one starts with one thread again."""
    yield
    torch = sys.modules.get("torch")  # not imported for tests that do without it
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(autouse=not WITHOUT_GPU)
def first_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a GPU no test tunes: a Triton kernel takes its first config, whatever the user's cache says, and writes none.

    Tests of tuning put a `time_all` of their own in place.
    """
    if importlib.util.find_spec("triton") is not None:
        tune = importlib.import_module("mlsys.kernels._triton_tune")
        monkeypatch.setattr(tune, "time_all", lambda kernel, key, configs, run, device: configs[0])
        monkeypatch.setattr(tune, "_folder", lambda: tmp_path / "triton")


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line of complaint about a bad request."""

    def run(*words: str) -> str:
        assert cli.main(words) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("mlsys: ")
        assert printed.err.count("\n") == 1
        return printed.err.removeprefix("mlsys: ").strip()

    return run
