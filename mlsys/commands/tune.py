"""`mlsys tune`: find the fastest settings of the Triton kernels on this GPU, once, and remember them."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlsys import catalog
from mlsys.commands import UsageError

EXAMPLES = """examples:
  mlsys tune                                  all kernels, at usual sizes
  mlsys tune softmax --shape 8192x4096        one, at the size that you need
  mlsys tune --list                           their configs, and what is remembered

A call that nothing is remembered for is tuned when it is first made. This command only does it beforehand.
"""
DTYPES = ("bfloat16", "float32")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = (
        "Time every config of the Triton kernels on this GPU and remember the fastest, for each kind of call."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("names", nargs="*", metavar="NAME", help="kernels, such as softmax (default: all)")
    parser.add_argument("--shape", metavar="AxB", help="sizes of the call, such as 8192x4096; for one NAME")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of its tensors (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="show the configs and what is remembered; no GPU needed")


def run(args: argparse.Namespace) -> int:
    """Tune, or list."""
    known = modules()
    chosen = {(name := catalog.resolve(given, known, "Triton kernel")): known[name] for given in args.names} or known
    shape = sizes(args.shape)
    if shape and len(args.names) != 1:
        raise UsageError(
            f"--shape {args.shape} needs one NAME, whose call it is: mlsys tune softmax --shape {args.shape}"
        )
    if args.list:
        show(chosen)
        return 0
    why = catalog.devices("torch")["cuda"]
    if why is not None:
        raise UsageError(f"tuning needs an NVIDIA GPU: {why}; `mlsys tune --list` shows configs and what is remembered")
    tune(chosen, args.dtype, shape)
    return 0


def modules() -> dict[str, str]:
    """The modules with Triton kernels, by the name of their technique: "kernels.softmax"."""
    found = {}
    for path in catalog.modules():
        if catalog.base(path) is not None and path.stem.endswith("_triton"):
            module = catalog.dotted(path)
            found[module.removeprefix("mlsys.").removesuffix("_triton")] = module
    return found


def sizes(text: str | None) -> tuple[int, ...] | None:
    """The numbers of "8192x4096", or None."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--shape must be whole numbers with x between them, such as 8192x4096, got {text!r}")
    return tuple(map(int, parts))


def tune(chosen: dict[str, str], dtype: str, shape: Sequence[int] | None) -> None:
    """Make each module's typical calls, which are tuned by being made, and print what is remembered of them."""
    import torch

    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name(device)}, {dtype}")
    for name, module in chosen.items():
        typical = getattr(importlib.import_module(module), "typical", None)
        if typical is None:
            print(f"{name}: no typical calls are known; it is tuned when it is first called")
            continue
        try:
            calls = list(typical(device, getattr(torch, dtype), shape))
        except ValueError as error:
            if shape is None:
                raise
            raise UsageError(f"--shape {'x'.join(map(str, shape))} is not a shape of {name}: {error}") from error
        for label, call in calls:
            call()
            torch.cuda.synchronize(device)
            print(f"{name}: {label}")
    show_remembered()


def show(chosen: dict[str, str]) -> None:
    """The configs of each kernel, and then what is remembered."""
    for name, module in chosen.items():
        print(name)
        by_call: dict[str, list[Any]] = {}
        for specimen in importlib.import_module(module).specimens():
            by_call.setdefault(specimen.name, []).append(specimen.config)
        for call, configs in by_call.items():
            print(f"  {call}")
            for config in configs:
                print(f"    {config}")
    show_remembered()


def show_remembered() -> None:
    """The choices on disk, with the times that decided."""
    from mlsys.files import cache_folder
    from mlsys.kernels._triton_tune import remembered

    folder = Path(cache_folder()) / "triton"
    entries = remembered()
    if not entries:
        print(f"nothing is remembered in {folder}")
        return
    print(f"remembered in {folder}:")
    for entry in entries:
        times = entry.milliseconds
        slowest = max(times.values())
        best = times[entry.chosen]
        print(f"  {entry.device}: {entry.kernel} {entry.key}: {entry.chosen}, {best:.4f} ms (slowest {slowest:.4f} ms)")
