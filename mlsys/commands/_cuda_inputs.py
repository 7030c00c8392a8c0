"""What `mlsys cuda` launches a kernel with: a driver's arguments, or inputs made up from the kernel's signature.

Made-up sizes are odd and differ, so that a mistake in a stride or in a bound shows. How long a tensor must be, a
signature does not say: for one size n it is n; a, b and c beside m, n and k are the matrices of a product; every other
tensor is as long as the product of all sizes, long enough for most. Since a tensor that is too long hides what goes
beyond its end, the sizes are printed, and can be given.
"""

from __future__ import annotations

import argparse
import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlsys.commands import UsageError
from mlsys.loading import import_file, one_line, raised_at

if TYPE_CHECKING:
    from mlsys.kernels.cuda import Kernel

SIZES = (67, 45, 29, 13, 7, 5)  # of the first int parameter, the second …
FLOATS = (1.5, 0.5, 0.25)
MOST = 1 << 24  # elements
PRODUCT = {"a": ("m", "k"), "b": ("k", "n"), "c": ("m", "n"), "d": ("m", "n")}
DTYPES = {
    "f4": torch.float32, "f8": torch.float64, "h2": torch.float16, "b2": torch.bfloat16, "?1": torch.bool,
    "i1": torch.int8, "u1": torch.uint8, "i2": torch.int16, "u2": torch.int16, "i4": torch.int32, "u4": torch.int32,
    "i8": torch.int64, "u8": torch.int64,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A launch: where, with what, what it should write if that is known, and what was made up for it."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    args: tuple[Any, ...]
    shared: int
    expected: Callable[..., Any] | None = None
    notes: tuple[str, ...] = ()
    driver: Path | None = None


@dataclass(frozen=True)
class Result:
    """What a kernel wrote to a tensor; `right`: whether that is what the driver expects, None if it expects nothing."""

    name: str
    shape: tuple[int, ...]
    changed: int
    text: str
    right: bool | None = None

    def __str__(self) -> str:
        """One line."""
        return f"{self.name} [{' × '.join(map(str, self.shape))}]: {self.text}"


# --- a driver ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Driver:
    """A driver's file."""

    path: Path
    module: ModuleType

    @property
    def kernel(self) -> str | None:
        """The kernel that it names."""
        return getattr(self.module, "KERNEL", None)

    def launch(self, args: argparse.Namespace) -> Launch:
        """What its `arguments()` returns; --grid, --block and --shared come first."""
        made = call(self.path, self.module.arguments)
        if not isinstance(made, tuple) or len(made) not in (3, 4) or not isinstance(made[2], tuple | list):
            raise UsageError(
                f"{self.path.name}: arguments() must return grid, block, (the kernel's arguments, …) and, if need be, "
                f"bytes of shared memory; it returned {type(made).__name__} "
                + (f"of {len(made)}" if isinstance(made, tuple) else repr(made)[:80])
            )
        grid, block, given, shared = (*made, 0)[:4]
        return Launch(
            sizes("--grid", args.grid, {}) if args.grid else _tuple(grid),
            sizes("--block", args.block, {}) if args.block else _tuple(block),
            tuple(given),
            sizes("--shared", args.shared, {})[0] if args.shared else shared,
            getattr(self.module, "expected", None),
            driver=self.path,
        )


def from_driver(path: Path) -> Driver:
    """Load a driver. UsageError if it is none."""
    if not path.is_file():
        raise UsageError(f"--driver {path}: there is no such file")
    module = import_file(path.resolve())
    if not callable(getattr(module, "arguments", None)):
        raise UsageError(f"--driver {path}: it has no function arguments(); `mlsys cuda --help` shows one")
    return Driver(path.resolve(), module)


def call(path: Path, function: Callable[..., Any], *args: Any) -> Any:
    """A driver's function; what goes wrong in it is said in terms of its file."""
    try:
        return function(*args)
    except Exception as error:
        raise UsageError(f"{raised_at(error, path) or path.name}: {one_line(error)}") from error


def _tuple(value: Any) -> Any:
    return (value,) if isinstance(value, int) else value


# --- results ----------------------------------------------------------------------------------------------------------


def copies(args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments as they were."""
    return tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)


def results(kernel: Kernel, before: Sequence[Any], launch: Launch) -> list[Result]:
    """Of each tensor that the kernel wrote, or had to."""
    names = [p.name or f"argument {i}" for i, p in enumerate(kernel.declared.parameters)]
    wanted = _expected(names, before, launch)
    found = []
    for name, was, now in zip(names, before, launch.args, strict=True):
        if not isinstance(now, Tensor):
            continue
        changed = int((~same(was, now)).sum())
        if name in wanted:
            right, text = compare(now, wanted[name])
            found.append(Result(name, tuple(now.shape), changed, text, right))
        elif changed:
            found.append(Result(name, tuple(now.shape), changed, summary(now, changed)))
    return found


def _expected(names: Sequence[str], before: Sequence[Any], launch: Launch) -> dict[str, Tensor]:
    if launch.expected is None:
        return {}
    path = launch.driver
    assert path is not None
    wanted = call(path, launch.expected, *copies(before))
    tensors = [name for name, arg in zip(names, before, strict=True) if isinstance(arg, Tensor)]
    if not isinstance(wanted, dict) or not all(isinstance(value, Tensor) for value in wanted.values()):
        example = f'{{"{tensors[-1] if tensors else "c"}": …}}'
        raise UsageError(
            f"{path.name}: expected() must return tensors by the names of parameters, {example}; "
            f"it returned {type(wanted).__name__}"
        )
    for name, value in wanted.items():
        if name not in tensors:
            raise UsageError(f"{path.name}: expected() names {name!r}; the kernel's tensors are {', '.join(tensors)}")
        given = before[names.index(name)]
        if value.shape != given.shape:
            raise UsageError(
                f"{path.name}: expected() gives {name} the shape {tuple(value.shape)}, arguments() {tuple(given.shape)}"
            )
    return wanted


def compare(got: Tensor, wanted: Tensor) -> tuple[bool, str]:
    """Whether these agree to the precision of what was computed, and where they do not."""
    if not got.dtype.is_floating_point:
        bad = ~same(got, wanted.to(got.dtype))
        largest = 0.0
    else:
        eps = torch.finfo(got.dtype).eps
        x, y = got.double(), wanted.double()
        scale = float(y[y.isfinite()].abs().max()) if bool(y.isfinite().any()) else 0.0
        off = torch.where(same(x, y), 0.0, (x - y).abs()).nan_to_num(nan=math.inf)
        bad = off > 64 * eps * max(scale, 1e-30)
        largest = float(off.max()) if off.numel() else 0.0
    if not bad.any():
        return True, "as expected" + (f", largest difference {largest:.2g}" if got.dtype.is_floating_point else "")
    at = tuple(torch.nonzero(bad)[0].tolist())
    element = f"[{', '.join(map(str, at))}]"
    return False, (
        f"wrong in {int(bad.sum()):,} of {bad.numel():,} elements, first at {element}: "
        f"{got[at].item():.6g}, expected {wanted[at].item():.6g}"
    )


def summary(tensor: Tensor, changed: int) -> str:
    """What was written, in a line."""
    plain = tensor.double()
    finite = plain[plain.isfinite()]
    text = f"{changed:,} of {tensor.numel():,} elements changed"
    if finite.numel():
        text += f"; from {finite.min().item():.6g} to {finite.max().item():.6g}, mean {finite.mean().item():.6g}"
    odd = plain.numel() - finite.numel()
    return text + (f"; {odd:,} not finite" if odd else "")


def same(x: Tensor, y: Tensor) -> Tensor:
    """Equal elements; a NaN is equal to a NaN."""
    return (x == y) | ((x != x) & (y != y))


# --- made up ----------------------------------------------------------------------------------------------------------


def made_up(kernel: Kernel, args: argparse.Namespace) -> Launch:
    """Inputs from the kernel's signature, and what was chosen, in words."""
    if not args.grid or not args.block:
        raise UsageError("say how the kernel is launched: --grid and --block, or a --driver")
    codes = kernel.codes
    names = [p.name or f"argument{i}" for i, p in enumerate(kernel.declared.parameters)]
    given = _given(args.size, names)
    notes: list[str] = []
    values = _numbers(names, codes, given, notes)
    generator = torch.Generator().manual_seed(args.seed)
    ints = {name: value for name, value in values.items() if isinstance(value, int) and not isinstance(value, bool)}
    written = _written(names, codes)
    for name, code in zip(names, codes, strict=True):
        if code.startswith("*"):
            shape, why = _shape(name, ints, given)
            values[name], what = _tensor(name, code, shape, min(ints.values(), default=8), name in written, generator)
            notes.append(f"{name} = {what}, {' × '.join(map(str, values[name].shape))}{why}")
    grid, block = sizes("--grid", args.grid, ints), sizes("--block", args.block, ints)
    shared = sizes("--shared", args.shared, ints)[0] if args.shared else 0
    return Launch(grid, block, tuple(values[name] for name in names), shared, notes=tuple(notes))


def _given(texts: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    given = {}
    for item in (item for text in texts for item in text.split(",") if item):
        name, equals, value = item.partition("=")
        if not equals or not value:
            raise UsageError(f"--size {item}: expected NAME=NUMBER, or NAME=64x32 for a tensor")
        if name not in names:
            near = [n for n in names if n.lower() == name.lower()]
            if len(near) != 1:
                raise UsageError(f"--size {item}: the kernel's parameters are {', '.join(names)}")
            name = near[0]
        given[name] = value
    return given


def _numbers(names: Sequence[str], codes: Sequence[str], given: Mapping[str, str], notes: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    whole, real = iter(SIZES), iter(FLOATS)
    for name, code in zip(names, codes, strict=True):
        if code.startswith("*"):
            continue
        if code.startswith("s"):
            raise UsageError(f"{name} is a structure: a --driver has to make it")
        is_float = code in ("f4", "f8", "h2", "b2")
        if name in given:
            try:
                values[name] = float(given[name]) if is_float else int(given[name])
            except ValueError:
                kind = "a number" if is_float else "a whole number"
                raise UsageError(f"--size {name}={given[name]}: {name} is {kind}") from None
        else:
            values[name] = True if code == "?1" else next(real, 1.0) if is_float else next(whole, 3)
            notes.append(f"{name} = {values[name]}")
    return values


def _written(names: Sequence[str], codes: Sequence[str]) -> set[str]:
    """The tensors that the kernel writes: those that are not const. If none is const, the last."""
    tensors = [(name, code) for name, code in zip(names, codes, strict=True) if code.startswith("*")]
    if any(code.startswith("*c") for _, code in tensors):
        return {name for name, code in tensors if not code.startswith("*c")}
    return {name for name, _ in tensors[-1:]}


def _shape(name: str, ints: Mapping[str, int], given: Mapping[str, str]) -> tuple[tuple[int, ...], str]:
    if name in given:
        try:
            return tuple(int(size) for size in given[name].lower().split("x")), ""
        except ValueError:
            raise UsageError(f"--size {name}={given[name]}: {name} is a tensor: give its shape, {name}=64x32") from None
    by_letter = {key.lower(): key for key in ints}
    factors = PRODUCT.get(name.lower())
    if factors and {"m", "n", "k"} <= by_letter.keys():
        keys = [by_letter[factor] for factor in factors]
        return tuple(ints[key] for key in keys), f" ({' · '.join(keys)})"
    count = math.prod(ints.values()) if ints else SIZES[0]
    if count > MOST:
        raise UsageError(f"{name} would have {count:,} elements, the product of all sizes: give --size {name}=…")
    why = (
        f" ({' · '.join(ints)}; --size {name}=… if it is shorter)"
        if len(ints) > 1
        else f" ({', '.join(ints)})"
        if ints
        else ""
    )
    return (count,), why


def _tensor(
    name: str, code: str, shape: tuple[int, ...], most: int, written: bool, generator: torch.Generator
) -> tuple[Tensor, str]:
    """Zeros for what is written; else random numbers, or integers below the smallest size, which may be indices."""
    element = code.removeprefix("*").removeprefix("c")
    if element == "void":
        element = "u1"
    elif element.startswith("v"):  # float4 and its like: a row of four for each
        shape, element = (*shape, int(element[1])), element[2:]
    if element not in DTYPES:
        raise UsageError(f"{name} points to what no tensor holds: a --driver has to make it")
    dtype = DTYPES[element]
    kind = str(dtype).removeprefix("torch.")
    if written:
        return torch.zeros(shape, dtype=dtype), f"zeros, {kind}"
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype), f"random numbers, {kind}"
    high = 2 if dtype is torch.bool else max(1, min(most, 127))
    return torch.randint(0, high, shape, generator=generator).to(dtype), f"random integers below {high}, {kind}"


# --- numbers on the command line --------------------------------------------------------------------------------------


def sizes(option: str, text: str, names: Mapping[str, int]) -> tuple[int, ...]:
    """One to three whole numbers, each a formula of the kernel's sizes: "(n+31)/32,(m+31)/32", divided as in C."""
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        raise UsageError(f"{option} {text}: expected whole numbers such as 8,8") from None
    parts = tree.elts if isinstance(tree, ast.Tuple) else [tree]
    return tuple(_number(option, text, part, names) for part in parts)


def _number(option: str, text: str, node: ast.expr, names: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        if node.id in names:
            return names[node.id]
        raise UsageError(f"{option} {text}: there is no size {node.id}; there are {', '.join(names) or 'none'}")
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = (_number(option, text, side, names) for side in (node.left, node.right))
        if right == 0 and isinstance(node.op, ast.Div | ast.FloorDiv | ast.Mod):
            raise UsageError(f"{option} {text}: it divides by zero")
        return OPERATORS[type(node.op)](left, right)
    raise UsageError(f"{option} {text}: expected whole numbers, sizes and + - * / %")
