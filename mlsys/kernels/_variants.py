"""The variants of a kernel family: which there are, which take given tensors, and which is the fastest here.

A family, such as `matmul`, is one function that is written several times: torch's own, the readable version of its
module, and a ladder of CUDA kernels. Which of them a call takes is data, so that it can be asked as well as obeyed:

    list_variants("matmul")          ['torch', 'tiled', 'cuda.naive', …]
    select("matmul", a, b)           Chosen(name='torch', why='on a CPU …')

On a GPU "auto" is the fastest of what was measured there: `mlsys bench kernels.matmul --device cuda --save` leaves
records, each of a variant that was checked before it was timed. The nearest measured size of the same dtype decides.
Without a record it is torch, which is never far from the best.

See also:
    `mlsys.kernels.matmul` (a family), `mlsys.bench.records` (what is read here).
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

HERE = Path(__file__).parent
CHECKOUT = HERE.parent.parent


class Chosen(NamedTuple):
    """Which variant a call takes, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Variant:
    """One way to compute a family's function.

    name:   "torch", "tiled", "cuda.tiled".
    idea:   what it does differently, in a line.
    run:    the family's tensors and options → its result.
    refuse: the same → why it cannot compute them, naming the remedy, or None.
    """

    name: str
    idea: str
    run: Callable[..., Any]
    refuse: Callable[..., str | None] = lambda *args, **options: None


@dataclass(frozen=True)
class Family:
    """A function and its variants; the first is torch's."""

    name: str
    variants: tuple[Variant, ...]

    def __getitem__(self, name: str) -> Variant:
        """ValueError naming the variants there are."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise ValueError(f"variant must be auto or one of {', '.join(v.name for v in self.variants)}, got {name!r}")

    def run(self, variant: str, *tensors: Tensor, **options: Any) -> Any:
        """The result by this variant, or the chosen one. ValueError if there is none of this name or it refuses."""
        if variant == "auto":
            variant = self.choose(*tensors, **options).name
        chosen = self[variant]
        if why := chosen.refuse(*tensors, **options):
            raise ValueError(f"variant {variant!r} cannot compute this: {why}")
        return chosen.run(*tensors, **options)

    def choose(self, *tensors: Tensor, folders: tuple[Path, ...] | None = None, **options: Any) -> Chosen:
        """What "auto" takes; `folders` hold the records, by default ./results and the checkout's."""
        torch_name = self.variants[0].name
        if all(x.device.type != "cuda" for x in tensors):
            return Chosen(torch_name, "on a CPU kernels run to be looked at, not to be fast")
        import torch

        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return Chosen(torch_name, "a gradient may be asked for, and not every kernel has one")
        gpu = torch.cuda.get_device_name(tensors[0].device)
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        measured = list(_measured(self.name, gpu, dtype, folders or (Path("results"), CHECKOUT / "results")))
        if not measured:
            remedy = f"`mlsys bench kernels.{self.name} --device cuda --save` makes one"
            return Chosen(torch_name, f"no record of kernels.{self.name} in {dtype} on {gpu} is saved; {remedy}")
        size = sum(x.numel() * x.element_size() for x in tensors)
        nearest = min((m.bytes for m in measured), key=lambda b: abs(math.log(b / max(size, 1))))
        known = {v.name: v for v in self.variants}
        able = [
            m
            for m in measured
            if m.bytes == nearest and m.variant in known and not known[m.variant].refuse(*tensors, **options)
        ]
        if not able:
            return Chosen(torch_name, f"of the variants measured on {gpu} none takes these tensors")
        best = min(able, key=lambda m: m.seconds)
        return Chosen(best.variant, f"the fastest of {len(able)} measured on {gpu} at the nearest size: {best.case}")


@dataclass(frozen=True)
class _Measured:
    variant: str
    seconds: float
    bytes: float
    case: str


def _measured(family: str, gpu: str, dtype: str, folders: tuple[Path, ...]) -> Iterator[_Measured]:
    """What saved records say of this family on this GPU. A case's "rung" names its CUDA kernel, the peer is torch."""
    seen = set()
    for path in (p for folder in folders for p in sorted(folder.glob(f"*/kernels.{family}.jsonl"))):
        if path.resolve() in seen:
            continue
        seen.add(path.resolve())
        for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            case = record["case"]
            same = record["device"] == "cuda" and record["machine"].get("gpu") == gpu and case.get("dtype") == dtype
            if not same or record["status"] not in ("ok", "noisy") or not record["seconds"]:
                continue
            if case.get("epilogue", "none") != "none" or case.get("backward"):
                continue  # more than the product, which the variants are compared by
            variant = _variant(record["impl"], case.get("rung"))
            rest = " ".join(f"{k}={v}" for k, v in case.items() if k != "rung")
            yield _Measured(variant, record["seconds"], record["bytes"], rest)


def _variant(impl: str, rung: str | None) -> str:
    if impl == "torch":
        return "torch"
    if impl.startswith("triton "):
        return impl.replace(" ", ".")
    return rung if rung == "triton" else f"cuda.{rung}"


class CallableModule(ModuleType):
    """A family's module can be called: `mlsys.kernels.matmul(a, b)` is `mlsys.kernels.matmul.matmul(a, b)`.

    A module and the function of its name would otherwise contend for one name in their package.
    """

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The function of the module's name."""
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **options)


def families() -> list[str]:
    """The names of all families: the public modules of this package that have a ladder of CUDA kernels."""
    return sorted(p.stem.removesuffix("_cuda") for p in HERE.glob("*_cuda.py"))


def family(name: str) -> Family:
    """A family by name. ValueError naming those there are."""
    if name not in families():
        raise ValueError(f"family must be one of {', '.join(families())}, got {name!r}")
    found: Family = importlib.import_module(f"mlsys.kernels.{name}").FAMILY
    return found


def list_variants(name: str) -> list[str]:
    """The variants of a family, torch's first, then in the order of the ladder: `list_variants("matmul")`."""
    return [variant.name for variant in family(name).variants]


def select(name: str, *tensors: Tensor, **options: Any) -> Chosen:
    """Which variant of a family "auto" takes for these tensors, and why.

    `name, why = select("matmul", a, b)`. ValueError if there is no such family.
    """
    return family(name).choose(*tensors, **options)
