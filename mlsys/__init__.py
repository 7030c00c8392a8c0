"""mlsys: readable reference implementations of machine-learning systems techniques.

Each technique is one short module that explains itself, is checked against an
oracle by its contract, and is measured beside the production library for the
same work. `mlsys list` names them; `from mlsys.attention import flash` uses one.

Nothing is imported here: `import mlsys` costs a student's program nothing.
"""

from __future__ import annotations

__version__: str  # read from the installed distribution when it is asked for


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("mlsys-reference")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
