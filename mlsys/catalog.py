"""The techniques of the library, found by reading source and importing nothing.

A technique is a public module of a technique package (`mlsys/attention/flash.py`),
or a folder of modules (`mlsys/kernels/cuda/`), that has a contract or a benchmark of
its name; the others serve techniques.
`flash_numba.py`, `flash_triton.py` and `flash_cuda.py` beside `flash.py` are
further backends of the same technique. Everything else is found by its place: the
test in `tests/attention/test_flash.py`, the benchmark in
`benchmarks/attention/flash.py`, the contract in `mlsys/contracts/attention.py`.

So there is nothing to register, and `mlsys list` answers without importing torch.

See also:
    `mlsys.commands.list`, `mlsys.commands.show` (what prints it).
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent  # the folder of `mlsys` itself

# In the order of the imports between them: a package may import those before it, and none after it.
PACKAGES = (
    "perf",
    "kernels",
    "attention",
    "models",
    "quant",
    "retrieval",
    "parallel",
    "serving",
    "moe",
    "optim",
    "compiler",
    "cluster",
)
SUFFIXES = ("numba", "triton", "cuda")  # `<technique>_<suffix>.py` is a backend of `<technique>.py`


@dataclass(frozen=True)
class Backend:
    """One implementation of a technique, and what it takes to run it here.

    `unusable` is why it cannot run on this machine, or None. `devices` has the same for each device
    that it could run on.
    """

    name: str
    source: Path
    devices: dict[str, str | None]

    @property
    def module(self) -> str:
        """The name of its module, or of the folder that is one."""
        return self.source.parent.name if self.source.stem == "__init__" else self.source.stem

    @property
    def unusable(self) -> str | None:
        """Why no device of this machine can run it, or None if one can."""
        reasons = list(self.devices.values())
        return None if None in reasons else "; ".join(dict.fromkeys(filter(None, reasons)))

    def __str__(self) -> str:
        parts = [f"{device} yes" if why is None else f"{device} no ({why})" for device, why in self.devices.items()]
        return f"{self.name}: {'; '.join(parts)}"


@dataclass(frozen=True)
class Technique:
    """What can be said of a technique without importing it; paths are None where there is no such file."""

    name: str
    idea: str
    doc: str
    papers: tuple[str, ...]
    backends: tuple[Backend, ...]
    source: Path
    test: Path | None
    benchmark: Path | None
    contract: Path | None
    docs: Path | None

    @property
    def package(self) -> str:
        """The package it is in: "attention" of "attention.flash"."""
        return self.name.partition(".")[0]

    @property
    def paper(self) -> str:
        """Authors and year of its first paper: "Dao et al. 2022"."""
        return short(self.papers[0]) if self.papers else ""


def techniques(package_root: Path = PACKAGE) -> list[Technique]:
    """Every technique of the package in this folder, in the order of `PACKAGES`."""
    found = []
    for path in modules(package_root):
        technique = read(path, package_root)
        if technique:
            found.append(technique)
    return found


def find(name: str, package_root: Path = PACKAGE) -> Technique:
    """The technique of this name, or of this last part ("flash") if only one has it; LookupError otherwise.

    The name of a faster backend's module ("attention.flash_triton") stands for its technique.
    """
    everything = {}
    for technique in techniques(package_root):
        for backend in technique.backends:
            everything[f"{technique.package}.{backend.module}"] = technique
    return everything[resolve(name, everything)]


def checkable(package_root: Path = PACKAGE) -> list[str]:
    """The names that have a contract: techniques, and faster backends of them ("attention.flash_triton")."""
    return [
        f"{technique.package}.{backend.module}"
        for technique in techniques(package_root)
        for backend in technique.backends
        if backend.module in contracted(technique.package, package_root)
    ]


def resolve(name: str, names: Iterable[str], kind: str = "technique") -> str:
    """The full name that `name` stands for; LookupError, with the nearest ones, if there is none or several."""
    names = list(names)
    if name in names:
        return name
    short_for = [full for full in names if full.partition(".")[2] == name]
    if len(short_for) == 1:
        return short_for[0]
    if short_for:
        raise LookupError(f"{name!r} is short for several: {', '.join(short_for)}")
    suggestions = nearest(name, names)
    remedy = f"did you mean {' or '.join(suggestions)}?" if suggestions else "`mlsys list` shows them all"
    raise LookupError(f"no {kind} {name!r}; {remedy}")


def nearest(name: str, names: Iterable[str], limit: int = 3) -> list[str]:
    """Up to `limit` of `names` that look like `name`, best first; their last part alone counts too."""
    scores = {}
    for full in names:
        forms = (full.lower(), full.rpartition(".")[2].lower())
        scores[full] = max(difflib.SequenceMatcher(None, name.lower(), form).ratio() for form in forms)
    likely = sorted((full for full in scores if scores[full] >= 0.6), key=lambda full: (-scores[full], full))
    return [full for full in likely if scores[full] >= scores[likely[0]] - 0.1][:limit]


def modules(package_root: Path = PACKAGE) -> list[Path]:
    """Every Python file of the technique packages that exist."""
    return [path for package in PACKAGES for path in sorted((package_root / package).rglob("*.py"))]


def dotted(path: Path, package_root: Path = PACKAGE) -> str:
    """The dotted name by which a file of the package is imported."""
    parts = [package_root.name, *path.relative_to(package_root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read(path: Path, package_root: Path = PACKAGE) -> Technique | None:
    """The technique whose readable version is this file, or None: a helper, a backend, or a private module."""
    place = path.parent if path.stem == "__init__" else path.with_suffix("")  # a technique may be a folder
    package, technique = place.parent.name, place.name
    if technique.startswith("_") or place.parent.parent != package_root or base(path):
        return None
    tree = head(path)
    doc = ast.get_docstring(tree) or ""
    papers = entries(sections(doc).get("Papers", ""))
    if not papers:
        return None
    checkout = package_root.parent
    shipped = package_root / "_benchmarks"  # where a wheel carries what a checkout has in `benchmarks/`
    backends = [Backend(*_backend(path, tree))]
    for suffix in SUFFIXES:
        fast = path.with_name(f"{technique}_{suffix}.py")
        if fast.is_file():
            backends.append(Backend(suffix, fast, devices(suffix)))
    found = Technique(
        name=f"{package}.{technique}",
        idea=idea(doc),
        doc=doc,
        papers=tuple(papers),
        backends=tuple(backends),
        source=path,
        test=_existing(checkout / "tests" / package / f"test_{technique}.py", checkout / "tests" / package / technique),
        benchmark=_existing(
            checkout / "benchmarks" / package / f"{technique}.py", shipped / package / f"{technique}.py"
        ),
        contract=package_root / "contracts" / f"{package}.py"
        if technique in contracted(package, package_root)
        else None,
        docs=_page(checkout / "docs" / package, technique),
    )
    return found if found.benchmark or found.contract else None  # what only serves another technique is not listed


def base(path: Path) -> Path | None:
    """The readable module that this file is a faster backend of, if it is one."""
    technique, _, suffix = path.stem.rpartition("_")
    readable = path.with_name(f"{technique}.py")
    return readable if technique and suffix in SUFFIXES and readable.is_file() else None


def _page(folder: Path, technique: str) -> Path | None:
    """The page of the technique's name, or else the first page of its package that links to its source."""
    own = _existing(folder / f"{technique}.md")
    if own:
        return own
    link = f"/{folder.name}/{technique}.py)"
    return next((page for page in sorted(folder.glob("*.md")) if link in page.read_text(encoding="utf-8")), None)


def _existing(*paths: Path) -> Path | None:
    return next((path for path in paths if path.exists()), None)


def _backend(path: Path, tree: ast.Module) -> tuple[str, Path, dict[str, str | None]]:
    """What the readable version of a technique is written in: torch if it imports it, else NumPy or plain Python."""
    trees = [head(part) for part in path.parent.glob("*.py")] if path.stem == "__init__" else [tree]
    roots = {name.partition(".")[0] for each in trees for name in imports(each)}
    name = next((name for name in ("torch", "numpy") if name in roots), "python")
    return name, path, devices(name)


# --- docstrings -------------------------------------------------------------------------------------------------------


def head(path: Path) -> ast.Module:
    """The module up to its first function or class: all that the catalogue needs, and quick to parse."""
    text = path.read_text(encoding="utf-8")
    first = re.search(r"^(?:def|class|async def|@)\b", text, re.MULTILINE)
    try:
        return ast.parse(text[: first.start()] if first else text, str(path))
    except SyntaxError:  # a line of the docstring begins with "class"; or the file itself is broken, and says so
        return ast.parse(text, str(path))


def imports(tree: ast.Module) -> list[str]:
    """The absolute dotted names that a module imports, anywhere in it; `from a import b` counts as `a` and `a.b`."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def idea(doc: str) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join(doc.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.?!]) (?=[A-Z`\"(])", paragraph, maxsplit=1)[0]
    return sentence.removesuffix(".")


def sections(doc: str) -> dict[str, str]:
    """The headed parts of a docstring: "Cost:" alone on its line, then what is indented under it."""
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in doc.splitlines():
        heading = re.fullmatch(r"([A-Z][A-Za-z -]*):\s*", line)
        if heading:
            current = found.setdefault(heading[1], [])
        elif line and not line[0].isspace():
            current = None
        elif current is not None:
            current.append(line)
    return {name: textwrap.dedent("\n".join(lines)).strip() for name, lines in found.items()}


def entries(section: str) -> list[str]:
    """The entries of a section, one paper each: an entry ends where a line ends with a full stop."""
    return [" ".join(entry.split()) for entry in re.split(r"(?<=\.)\n", section) if entry.strip()]


def short(paper: str) -> str:
    """Authors and year of a paper's entry: "Dao et al. 2022" of "Dao et al. 2022, arXiv:2205.14135 (…)."."""
    match = re.match(r".*?\b(?:1[89]|20)\d\d[a-z]?\b", paper)
    return match[0] if match else textwrap.shorten(paper, 32, placeholder="…")


@cache
def contracted(package: str, package_root: Path = PACKAGE) -> frozenset[str]:
    """The modules of a package that have a contract: the names "package.module" that its contracts file holds."""
    path = package_root / "contracts" / f"{package}.py"
    if not path.is_file():
        return frozenset()
    names = re.findall(rf"""["']{package}\.(\w+)["']""", path.read_text(encoding="utf-8"))
    return frozenset(names)


# --- this machine -----------------------------------------------------------------------------------------------------


@cache
def devices(backend: str) -> dict[str, str | None]:
    """Each device that a backend is for, with why it cannot be used on this machine, or None if it can."""
    if backend == "torch":
        missing = _missing("torch")
        return {"cpu": missing, "cuda": missing or no_nvidia_driver() or _torch_without_cuda()}
    if backend in ("numpy", "numba"):
        return {"cpu": _missing(backend)}
    if backend == "triton":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return {"cpu": _missing("triton")}
        return {"cuda": _missing("triton") or no_nvidia_driver()}
    if backend == "cuda":
        missing = _missing("torch")
        return {"cpu": missing or _no_compiler(), "cuda": missing or no_nvidia_driver() or _torch_without_cuda()}
    return {"cpu": None}


def _missing(module: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"{module} is not installed"


def _no_compiler() -> str | None:
    """Why CUDA kernels cannot run on the processor here (`mlsys.kernels.cuda`)."""
    if not sys.platform.startswith("linux"):
        return "under Linux only"
    wanted = os.environ.get("CXX")
    found = any(shutil.which(name) for name in ([wanted] if wanted else ["g++", "clang++"]))
    return None if found else "no C++ compiler found"


def no_nvidia_driver() -> str | None:
    """Why there is no NVIDIA GPU to use here, or None if its driver is present; asks no library."""
    marks = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"), Path("/usr/lib/wsl/lib/libcuda.so.1"))
    present = any(mark.exists() for mark in marks) or shutil.which("nvidia-smi") is not None
    return None if present else "no NVIDIA driver found"


def _torch_without_cuda() -> str | None:
    """Why this torch cannot use a GPU that is there: its `version.py` says `cuda = None`."""
    spec = importlib.util.find_spec("torch")
    version = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    if version and version.is_file() and re.search(r"^cuda\b[^=\n]*= *None", version.read_text(), re.MULTILINE):
        return "this torch is built without CUDA"
    return None
