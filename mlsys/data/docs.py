"""A search corpus that every machine has: the docstrings of its own Python installation.

The standard library's source holds 6,000 to 7,000 public docstrings, written by
people for people, each with a name, a one-line summary and often a body. They
are read with `ast`, so nothing is imported or run; installed packages can be
added (`load(["numpy", "torch"])` gives tens of thousands).

Known-item search needs no human judges: take a docstring's summary line as the
query, and ask at which rank its own body comes back among all bodies.

    >>> documents = load()
    >>> queries, relevant = known_items(documents, 1000, seed=0)
    >>> corpus = [document.body for document in documents]   # ids in `relevant` count in here

Cost:
    About 2 MB of source a second, once: the result is kept as JSON lines in the
    user's cache folder (environment variable MLSYS_CACHE, else the platform's),
    keyed by the versions of Python, of the package and of this extractor.

Memory:
    A few MB for the standard library.

Papers:
    Azzopardi, de Rijke & Balog 2007, "Building Simulated Queries for Known-Item Topics", SIGIR (known-item search).

See also:
    `mlsys.retrieval.bm25` (which searches it), `mlsys search` (which prints what it found).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import random
import sys
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from mlsys.files import cache_folder, write_atomic

log = logging.getLogger(__name__)

EXTRACTOR = 1  # raise when the documents drawn from the same source change: old caches are then not read
STDLIB = "stdlib"
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})

# Modules that hold the source of another, public one.
PUBLIC_NAMES = {
    "_collections_abc": "collections.abc",
    "_py_abc": "abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "_strptime": "time",
    "genericpath": "os.path",
    "posixpath": "os.path",
}

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Document:
    """One docstring, and where it is from.

    name:      "email.utils.parsedate", as one would import it where that is known.
    kind:      "module", "class", "function" or "method".
    signature: "(data)" for functions and classes, "" for modules.
    summary:   the docstring's first line.
    body:      the rest of the docstring; often empty.
    path:      source file, relative to its library's folder ("email/_parseaddr.py").
    line:      line of the definition, from 1.
    package:   "stdlib", or the installed package.
    """

    name: str
    kind: str
    signature: str
    summary: str
    body: str
    path: str
    line: int
    package: str


def load(packages: Iterable[str] = (), *, cache_dir: str | os.PathLike[str] | None = None) -> list[Document]:
    """Public docstrings of the standard library, then of each of `packages` (import names), in a fixed order.

    A package of the standard library adds nothing, and `logging` says so.

    The first call for a package takes seconds and says so through `logging`; the next ones read the cache.
    A damaged cache file is read as none: it is built again, with a warning.

    Raises ValueError for a package that is not installed or not an import name, TypeError if `packages` is a string.
    """
    if isinstance(packages, str):
        raise TypeError(f"packages must be a list of import names, got the string {packages!r}: use [{packages!r}]")
    names = [name for name in dict.fromkeys(packages) if name != STDLIB]
    for name in names:
        if name in sys.stdlib_module_names:
            log.info("%s is in the standard library, whose documents are read anyway", name)
    others = [_package_source(name) for name in names if name not in sys.stdlib_module_names]
    sources = [_stdlib_source(), *others]
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    return [document for source in sources for document in _cached(source, folder)]


def default_cache_dir() -> Path:
    """Where `load` keeps what it read: in MLSYS_CACHE if that is set, else in the platform's user cache folder."""
    return cache_folder() / "docs"


def known_items(
    documents: Sequence[Document], n: int, seed: int, *, min_query_words: int = 3, min_body_words: int = 20
) -> tuple[list[str], list[int]]:
    """Known-item queries: up to `n` summary lines, and for each the index in `documents` of the one it belongs to.

    The text to search is the bodies alone, `[document.body for document in documents]`: they hold neither the name
    nor the summary. A document serves if its summary and its body are long enough, no other has the same summary or
    the same body, and the body does not repeat the summary.

    Raises ValueError if n < 1 or no document serves.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    summaries = Counter(document.summary for document in documents)
    bodies = Counter(document.body for document in documents)
    usable = [
        index
        for index, document in enumerate(documents)
        if summaries[document.summary] == 1
        and bodies[document.body] == 1
        and len(document.summary.split()) >= min_query_words
        and len(document.body.split()) >= min_body_words
        and document.summary not in document.body
    ]
    if not usable:
        raise ValueError(
            f"none of the {len(documents)} documents has a summary of its own of at least {min_query_words} words "
            f"and a body of at least {min_body_words}"
        )
    chosen = random.Random(seed).sample(usable, min(n, len(usable)))
    return [documents[index].summary for index in chosen], chosen


def extract(source: str, module: str, *, path: str = "<string>", package: str = "") -> list[Document]:
    """Public docstrings in the text of one module. SyntaxError or ValueError if it is not Python.

    Definitions inside functions are left out (nobody can call them), and names that start with an underscore.
    """
    return _documents(_tree(source), module, path, package)


def _tree(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        return ast.parse(source)


def _documents(tree: ast.Module, module: str, path: str, package: str) -> list[Document]:
    found = []
    if docstring := ast.get_docstring(tree):
        found.append(_document(docstring, module, "module", "", path, 1, package))
    for node, name, in_class in _definitions(tree.body, module, in_class=False):
        docstring = ast.get_docstring(node)
        if docstring:
            kind = "class" if isinstance(node, ast.ClassDef) else "method" if in_class else "function"
            found.append(_document(docstring, name, kind, _signature(node, in_class), path, node.lineno, package))
    return found


def _document(docstring: str, name: str, kind: str, signature: str, path: str, line: int, package: str) -> Document:
    summary, _, body = docstring.strip().partition("\n")
    return Document(name, kind, signature, summary.strip(), body.strip("\n").rstrip(), path, line, package)


def _definitions(body: Sequence[ast.stmt], prefix: str, *, in_class: bool) -> Iterator[tuple[Definition, str, bool]]:
    """Public classes and functions in `body`, under `if` and `try` too; and what public classes hold."""
    for node in body:
        if isinstance(node, Definition):
            if not node.name.startswith("_"):
                name = f"{prefix}.{node.name}"
                yield node, name, in_class
                if isinstance(node, ast.ClassDef):
                    yield from _definitions(node.body, name, in_class=True)
        else:
            for block in ("body", "handlers", "orelse", "finalbody"):
                for inner in getattr(node, block, ()):
                    nested = inner.body if isinstance(inner, ast.ExceptHandler) else [inner]
                    yield from _definitions(nested, prefix, in_class=in_class)


def _signature(node: Definition, in_class: bool) -> str:
    """As in "(data, *, strict=False) -> tuple"; a class has its constructor's; `self` and `cls` are not shown."""
    if isinstance(node, ast.ClassDef):
        made_by = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        return _signature(made_by[-1], True).partition(" -> ")[0] if made_by else ""
    decorators = {item.id for item in node.decorator_list if isinstance(item, ast.Name)}
    if "property" in decorators:
        return ""
    arguments = node.args
    if in_class and "staticmethod" not in decorators:
        del (arguments.posonlyargs or arguments.args)[:1]
        positional = len(arguments.posonlyargs) + len(arguments.args)
        arguments.defaults = arguments.defaults[max(len(arguments.defaults) - positional, 0) :]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(arguments)}){returns}"


# Where the source is


@dataclass(frozen=True)
class _Source:
    """A package to read: its files lie in `folder`; `files` is one module if the package is a single file."""

    package: str
    version: str
    folder: Path
    prefix: str
    file: Path | None = None

    def modules(self) -> Iterator[tuple[Path, str]]:
        """Each source file and the public name of its module, in sorted order."""
        for path in [self.file] if self.file else sorted(self.folder.rglob("*.py")):
            relative = path.relative_to(self.folder)
            parts = relative.with_suffix("").parts
            if SKIPPED_FOLDERS.isdisjoint(parts[:-1]) and not any("-" in part for part in parts):
                yield path, ".".join((*([self.prefix] if self.prefix else []), *parts)).removesuffix(".__init__")


def _stdlib_source() -> _Source:
    return _Source(STDLIB, platform.python_version(), Path(sysconfig.get_path("stdlib")), "")


def _package_source(name: str) -> _Source:
    """Where an installed package's source is, found without importing it."""
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(
            f"packages: {name!r} is not the import name of a top-level package; give the name that `import` uses "
            "(scikit-learn is imported as sklearn)"
        )
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module that was put into sys.modules by hand
        spec = None
    places = list(spec.submodule_search_locations or ()) if spec else []
    if spec and places:
        return _Source(name, _version(name, Path(places[0])), Path(places[0]), name)
    if spec and spec.origin and spec.origin.endswith(".py"):
        file = Path(spec.origin)
        return _Source(name, _version(name, file), file.parent, "", file)
    raise ValueError(
        f"packages: no Python source is installed under the import name {name!r} in {sys.prefix}; "
        f"install it there, or give the name that `import` uses (scikit-learn is imported as sklearn)"
    )


def _version(name: str, place: Path) -> str:
    """The version of the distribution that `name` is imported from; the newest change if there is none."""
    for distribution in importlib.metadata.packages_distributions().get(name, []):
        return importlib.metadata.version(distribution)
    files = place.rglob("*.py") if place.is_dir() else [place]
    return f"changed-{max((file.stat().st_mtime_ns for file in files), default=0)}"


def _read(source: _Source) -> list[Document]:
    """Read every module of a source; a file that is not valid Python, or too much for its parser, is skipped."""
    documents: dict[tuple[str, str], Document] = {}
    imports: dict[str, list[ast.ImportFrom]] = {}
    for path, module in source.modules():
        first, _, rest = module.partition(".")
        module = PUBLIC_NAMES.get(first, first) + (f".{rest}" if rest else "")
        try:
            with tokenize.open(path) as file:  # honours the file's coding line
                tree = _tree(file.read())
            shown = path.relative_to(source.folder.parent if source.prefix else source.folder).as_posix()
            found = _documents(tree, module, shown, source.package)
        except (SyntaxError, ValueError, OSError) as error:  # templates, old Python, odd encodings
            log.debug("skipped %s: %s", path, error)
            continue
        except (MemoryError, RecursionError) as error:  # the parser's stack is limited: which one depends on the Python
            log.warning("skipped %s: it is nested too deeply to be parsed (%s)", path, type(error).__name__)
            continue
        for document in found:  # the same text under the same name, as in the two branches of an `if`, counts once
            documents.setdefault((document.name, document.summary + document.body), document)
        imports[module] = _absolute_imports(tree, module, is_package=path.name == "__init__.py")
    public = _reexports(imports)
    return [replace(document, name=_renamed(document.name, public)) for document in documents.values()]


def _absolute_imports(tree: ast.Module, module: str, *, is_package: bool) -> list[ast.ImportFrom]:
    """The module's own `from … import …` statements, with relative ones made absolute."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + is_package]
                origin = ".".join([*above, *([origin] if origin else [])])
            found.append(ast.ImportFrom(origin, node.names, 0))
    return found


def _reexports(imports: dict[str, list[ast.ImportFrom]]) -> dict[str, str]:
    """Names in private modules → the public name they are imported under: email._parseaddr.parsedate → email.utils…

    The shortest public name is taken, and the first of equally short ones. `import *` is not followed.
    """
    public: dict[str, str] = {}
    for module in sorted(imports, key=lambda name: (name.count("."), name)):
        if not _is_private(module):
            for node in imports[module]:
                for alias in node.names:
                    name = alias.asname or alias.name
                    if node.module and _is_private(node.module) and not name.startswith("_") and name != "*":
                        public.setdefault(f"{node.module}.{alias.name}", f"{module}.{name}")
    return public


def _is_private(name: str) -> bool:
    return name.startswith("_") or "._" in name


def _renamed(name: str, public: dict[str, str]) -> str:
    """The public name of a definition, or of the class that it stands in; its own name if there is none."""
    if not _is_private(name):
        return name
    head, tail = name, ""
    while head and head not in public:
        head, _, last = head.rpartition(".")
        tail = f".{last}{tail}"
    return public[head] + tail if head else name


# The cache: a header line with a checksum, then one document a line


def _cached(source: _Source, folder: Path) -> list[Document]:
    key = [source.package, source.version, platform.python_version(), str(source.folder), EXTRACTOR]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = folder / f"{source.package}-{digest}.jsonl"
    try:
        return _parse(path.read_bytes())
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the cache file %s cannot be read (%s); building it again", path, error)
    log.info("reading the docstrings of %s %s (once; kept in %s)", source.package, source.version, folder)
    documents = _read(source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, _serialize(documents))
    except OSError as error:
        log.warning("cannot keep the documents in %s (%s); they will be read again next time", folder, error)
    return documents


def _serialize(documents: Sequence[Document]) -> bytes:
    rows = "".join(json.dumps(astuple(document)) + "\n" for document in documents).encode()
    header = {
        "fields": [field.name for field in fields(Document)],
        "count": len(documents),
        "sha256": hashlib.sha256(rows).hexdigest(),
    }
    return json.dumps(header).encode() + b"\n" + rows


def _parse(data: bytes) -> list[Document]:
    """The documents in a cache file. ValueError if it is not whole."""
    first, _, rows = data.partition(b"\n")
    header = json.loads(first)
    if not isinstance(header, dict) or header.get("sha256") != hashlib.sha256(rows).hexdigest():
        raise ValueError("its checksum is wrong")
    return [Document(*json.loads(row)) for row in rows.splitlines()]
