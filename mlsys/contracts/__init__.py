"""Contracts: what a technique must compute, for any implementation of it.

`mlsys.contracts.<package>` holds the contracts of `mlsys.<package>` in a dict `CONTRACTS`.
"""

from __future__ import annotations

import importlib
import importlib.util

from mlsys.contracts.core import Contract, Failure, Mismatch, Verdict, Wrong, check

__all__ = ["Contract", "Failure", "Mismatch", "Verdict", "Wrong", "check", "find"]


def find(name: str) -> Contract:
    """The contract of a technique: `find("attention.flash")`. LookupError if it has none."""
    package, _, technique = name.partition(".")
    module = f"mlsys.contracts.{package}"
    if not package.isidentifier() or importlib.util.find_spec(module) is None:
        raise LookupError(f"no contracts for package {package!r}")
    contracts: dict[str, Contract] = importlib.import_module(module).CONTRACTS
    if technique not in contracts:
        raise LookupError(f"no contract named {name!r}; {package} has {', '.join(f'{package}.{t}' for t in contracts)}")
    return contracts[technique]
