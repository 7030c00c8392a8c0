"""`mlsys check NAME FILE.py:FUNCTION`: does this implementation compute what the technique must?"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from mlsys import catalog
from mlsys.commands import UsageError

EXAMPLES = """examples:
  mlsys check attention.flash my.py:my_flash               yours
  mlsys check attention.flash my.py:my_flash --limit 10    ... that may loop for ever
  mlsys check attention.flash                              the library's own
  mlsys check my_contract.py:SOFTMAX my.py:softmax         against a contract of your own

exit status: 0 it passes, 1 it fails, 2 there is nothing to check (wrong name, file that cannot be imported)
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = (
        "Run a technique's contract on an implementation: pass, or the first failing case with what is wrong "
        "and, if a known mistake behaves alike, a hint. It runs in a process of its own, with a time limit."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("name", metavar="NAME", help="a technique's name from `mlsys list`, or FILE.py:CONTRACT")
    parser.add_argument("target", nargs="?", metavar="FILE.py:FUNCTION", help="what to check (the library's own)")
    parser.add_argument("--limit", type=seconds, default=60.0, metavar="S", help="seconds it may take (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run it (cpu)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def seconds(text: str) -> float:
    """A positive number of seconds."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Check it and print the verdict."""
    name = args.name if ".py:" in args.name else full_name(args.name)
    if args.device == "cuda" and (missing := catalog.devices("torch")["cuda"]):
        raise UsageError(f"--device cuda: {missing}")
    from mlsys.contracts.isolate import check_isolated

    try:
        verdict = check_isolated(name, args.target, seed=args.seed, limit_s=args.limit, device=args.device)
    except RuntimeError as broken:  # the check could not be made: neither a pass nor a fail
        raise UsageError(str(broken)) from broken
    if args.json:
        print(json.dumps({"target": args.target, "passed": verdict.passed, **asdict(verdict)}, indent=2))
    else:
        print(f"{args.target or 'the reference'} against {verdict}")
    return 0 if verdict.passed else 1


def full_name(name: str) -> str:
    """The technique, or backend of one, of this name that has a contract."""
    names = catalog.checkable()
    try:
        return catalog.resolve(name, names)
    except LookupError:
        found = catalog.find(name).name  # raises what to say if there is no such technique either
    raise UsageError(f"{found} has no contract; these have: {', '.join(names) or 'none'}")
