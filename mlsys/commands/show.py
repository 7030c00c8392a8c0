"""`mlsys show NAME`: a technique's idea, contract, files and backends."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlsys import catalog

EXAMPLES = """examples:
  mlsys show attention.flash             idea, contract, files, backends
  mlsys show flash --source | less       the module itself
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = "What a technique is: its idea (the module's docstring), contract, files and backends."
    parser.epilog = EXAMPLES
    parser.add_argument("name", metavar="NAME", help="a technique's name from `mlsys list`, e.g. attention.flash")
    parser.add_argument("--source", action="store_true", help="print the module's source instead")


def run(args: argparse.Namespace) -> int:
    """Print it."""
    technique = catalog.find(args.name)
    if args.source:
        module = args.name.rpartition(".")[2]  # "flash_triton" asks for that backend's source
        source = next((b.source for b in technique.backends if b.module == module), technique.source)
        print(source.read_text(encoding="utf-8"), end="")
    else:
        print(page(technique))
    return 0


def page(technique: catalog.Technique) -> str:
    """The whole answer."""
    lines = [technique.name, "=" * len(technique.name), "", technique.doc, ""]
    lines += heading("contract", contract(technique))
    files = {"source": technique.source, "test": technique.test, "benchmark": technique.benchmark}
    files |= {"contract": technique.contract, "docs": technique.docs}
    lines += heading("files", [f"{name:<10} {relative(path) if path else 'none here'}" for name, path in files.items()])
    lines += heading("backends", [str(backend) for backend in technique.backends])
    return "\n".join(lines).rstrip()


def heading(title: str, lines: list[str]) -> list[str]:
    """A titled block."""
    return [f"{title}:", *(f"  {line}" for line in lines), ""]


def contract(technique: catalog.Technique) -> list[str]:
    """What the contract says; its hints stay unsaid, since they give the mistakes away."""
    if technique.contract is None:
        return ["none"]
    from mlsys.contracts import find  # imports torch

    found = find(technique.name)
    return [
        f"signature  {found.signature}",
        f"cases      {len(found.cases)}",
        f"rejects    {', '.join(found.wrong)}",
        f"try yours  mlsys check {technique.name} my.py:my_function",
    ]


def relative(path: Path) -> str:
    """The path from the current folder if it is below it, else in full."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
