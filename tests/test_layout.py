"""The folders keep their promises: imports go one way, nothing is undocumented, untested, unmeasured or unchecked.

Each rule is a function from a tree of files to a list of problems. It is run on the library, where
the list must be empty, and on a small tree with planted faults, where it must name each of them.
"""

import ast
import importlib
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mlsys import catalog
from mlsys.contracts import check
from mlsys.contracts.core import Contract
from mlsys.loading import import_file

SECTIONS = (("Cost",), ("Memory", "Communication"), ("Papers",), ("See also",))  # one of each

# What each package may import of `mlsys` beside itself. The technique packages: those below them, and
# `files` and `compiled`. Those of the last row are peers and do not import each other.
ROWS = (("perf",), ("kernels",), ("attention",), ("models",), catalog.PACKAGES[4:])
MAY_IMPORT = {
    package: {below for lower in ROWS[:row] for below in lower} | {"files", "compiled"}
    for row, packages in enumerate(ROWS)
    for package in packages
} | {
    "files": set(),
    "compiled": set(),
    "catalog": set(),
    "loading": {"catalog"},
    "data": {"files", "perf", "attention", "models", "retrieval"},
    "contracts": {*catalog.PACKAGES, "files", "loading"},
}


# --- the rules --------------------------------------------------------------------------------------------------------


def import_problems(root):
    """Imports that go up, or sideways."""
    problems = []
    for path in sorted(root.rglob("*.py")):
        own, *_ = path.relative_to(root).with_suffix("").parts
        if own not in MAY_IMPORT:
            continue
        allowed = MAY_IMPORT[own] | {own}
        for name in sorted(imported(path, root)):
            parts = name.split(".")
            if parts[0] == root.name and parts[1:] and parts[1] not in allowed:
                problems.append(f"{path.relative_to(root)} imports {name}")
    return problems


def imported(path, root):
    """The modules that a file imports, by absolute name; `from a import b` is `a.b` if that is a module, else `a`."""
    here = path.relative_to(root.parent).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            found |= {
                f"{module}.{alias.name}" if is_module(f"{module}.{alias.name}", root) else module
                for alias in node.names
            }
    return found


def is_module(name, root):
    path = root.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def public_modules(root):
    """The modules of the technique packages that are not private: techniques, their backends, and helpers."""
    return [path for path in catalog.modules(root) if not path.stem.startswith("_")]


def docstring_problems(root):
    """Public modules whose docstring lacks a section, public functions without a docstring."""
    problems = []
    for path in public_modules(root):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        where = path.relative_to(root)
        sections = catalog.sections(ast.get_docstring(tree) or "")
        missing = [choice for choice in SECTIONS if not any(sections.get(name) for name in choice)]
        problems += [f"{where} has no section {' or '.join(choice)!r}" for choice in missing]
        problems += [f"{where}: {name} has no docstring" for name in undocumented(tree)]
    return problems


def undocumented(node, prefix=""):
    """Public functions, classes and methods without a docstring, at any depth of classes."""
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or child.name.startswith("_"):
            continue
        if ast.get_docstring(child) is None and not overridden(child):
            yield prefix + child.name
        if isinstance(child, ast.ClassDef):
            yield from undocumented(child, f"{prefix}{child.name}.")


def overridden(node):
    """Whether its meaning is said elsewhere: by a base class (`autograd.Function`, `nn.Module`), or after overloads."""
    typed_only = any(isinstance(by, ast.Name) and by.id == "overload" for by in node.decorator_list)
    return typed_only or node.name in ("forward", "backward", "setup_context")


def coverage_problems(root):
    """Public modules that no test of their package has by name, or that no benchmark of their package imports.

    `perf` is arithmetic, which takes no time worth measuring: what it says is compared with what is measured by the
    benchmarks of the other packages, and of its own modules only those that measure need one.
    """
    problems = []
    for path in public_modules(root):
        package, module = path.parent.name, path.stem
        readable = catalog.base(path) or path
        tests = [root.parent / "tests" / package / f"test_{name}.py" for name in {module, readable.stem}]
        if not any(test.is_file() and re.search(rf"\b{module}\b", test.read_text(encoding="utf-8")) for test in tests):
            problems.append(f"{path.relative_to(root)} has no test in tests/{package}/test_{readable.stem}.py")
        benchmarks = (root.parent / "benchmarks" / package).glob("*.py")
        name = catalog.dotted(path, root)
        if package != "perf" and not any(name in imported(benchmark, root) for benchmark in benchmarks):
            problems.append(f"{path.relative_to(root)} is imported by no benchmark in benchmarks/{package}/")
    return problems


def contract_problems(contract: Contract):
    """A reference that is refused, wrong variants that are not or are mistaken for another, hints that are missing."""
    problems = []
    verdict = check(contract, contract.reference)
    if not verdict.passed:
        problems.append(f"{contract.name} refuses its reference: {verdict}")
    for name, wrong in contract.wrong.items():
        failure = check(contract, wrong.impl).failure
        if failure is None:
            problems.append(f"{contract.name} accepts its wrong variant {name}")
        elif failure.like not in (name, None):  # None: it raised, so there is nothing to compare
            problems.append(f"{contract.name} takes its wrong variant {name} for {failure.like}")
        if not wrong.hint.strip():
            problems.append(f"{contract.name} has no hint for {name}")
    if not contract.wrong:
        problems.append(f"{contract.name} has no wrong variant, so nothing shows that it can fail")
    return problems


def catalogue_problems(root, contracts):
    """Contracts that belong to no technique or that the catalogue misses, measured techniques without one.

    A technique that is a folder is a tool, `kernels.cuda`, which no student writes anew: its planted mistakes stand in
    for wrong variants (tests/kernels/cuda/test_check.py).
    """
    known = catalog.checkable(root)
    problems = [f"contract {name} is not in the catalogue" for name in contracts if name not in known]
    problems += [f"contract {name} is in the catalogue only" for name in known if name not in contracts]
    for technique in catalog.techniques(root):
        if technique.source.stem == "__init__":
            continue
        names = [f"{technique.package}.{backend.module}" for backend in technique.backends]
        problems += [
            f"{name} is measured, but has no contract"
            for name in names
            if technique.benchmark and name not in contracts
        ]
    return problems


def reference_problems(root):
    """`mlsys.package.module` or `mlsys.package.module.name` in a docstring or a page, where there is no such thing."""
    problems = []
    for path in sorted([*root.rglob("*.py"), *(root.parent / "docs").rglob("*.md")]):
        for dotted in sorted(set(re.findall(r"`(mlsys(?:\.\w+)+)[`(]", path.read_text(encoding="utf-8")))):
            parts = dotted.split(".")
            source = root / "__init__.py"
            for n in range(len(parts), 0, -1):
                place = root.parent.joinpath(*parts[:n])
                found = [file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]
                if found:
                    source, parts = found[0], parts[n:]
                    break
            if parts and not re.search(rf"\b{parts[0]}\b", source.read_text(encoding="utf-8")):
                problems.append(f"{path.relative_to(root.parent)} speaks of {dotted}, which is not there")
    return problems


# --- the library ------------------------------------------------------------------------------------------------------


def all_contracts():
    """Every contract of the library, by name."""
    found = {}
    for package in catalog.PACKAGES:
        if (catalog.PACKAGE / "contracts" / f"{package}.py").is_file():
            module = importlib.import_module(f"mlsys.contracts.{package}")
            for key, contract in module.CONTRACTS.items():
                assert contract.name == f"{package}.{key}"
                found[contract.name] = contract
    return found


CONTRACTS = all_contracts()


def test_imports_go_one_way():
    assert import_problems(catalog.PACKAGE) == []


def test_every_public_module_is_documented():
    assert docstring_problems(catalog.PACKAGE) == []


def test_every_public_module_has_its_test_and_a_benchmark():
    assert coverage_problems(catalog.PACKAGE) == []


def test_every_technique_has_a_page():
    assert [technique.name for technique in catalog.techniques() if technique.docs is None] == []


def test_what_is_referred_to_is_there():
    assert reference_problems(catalog.PACKAGE) == []


def test_catalogue_and_contracts_agree():
    assert catalogue_problems(catalog.PACKAGE, CONTRACTS) == []


@pytest.mark.parametrize("name", CONTRACTS)
def test_contract_accepts_its_reference_and_rejects_every_wrong_variant(name):
    assert contract_problems(CONTRACTS[name]) == []


@pytest.mark.parametrize(("name", "least"), [("attention.flash", 6), ("attention.naive", 6), ("retrieval.bm25", 4)])
def test_contract_has_enough_wrong_variants(name, least):
    assert len(CONTRACTS[name].wrong) >= least


# --- the rules can fail -----------------------------------------------------------------------------------------------

GOOD = '"""Idea.\n\nCost:\n    1.\n\nMemory:\n    1.\n\nPapers:\n    A 2000.\n\nSee also:\n    `b`.\n"""\n'


@pytest.fixture
def plant(tmp_path):
    """Write files into a tree with one faultless technique; returns the folder of its package."""

    def write(**files):
        good = {
            "mlsys/attention/flash.py": GOOD + 'def f():\n    """Does f."""\n',
            "tests/attention/test_flash.py": "from mlsys.attention import flash",
            "benchmarks/attention/flash.py": "from mlsys.attention import flash",
            "mlsys/contracts/attention.py": "names = ['attention.flash']",
        }
        for name, text in (good | files).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        catalog.contracted.cache_clear()
        return tmp_path / "mlsys"

    return write


def test_faultless_tree_has_no_problems(plant):
    root = plant(
        **{
            "mlsys/retrieval/_helper.py": "from mlsys.attention.flash import f\nimport mlsys.files\nfrom . import x",
            "mlsys/retrieval/__init__.py": "",
            "mlsys/data/__init__.py": "import mlsys.retrieval",
            "mlsys/contracts/retrieval.py": "import mlsys.retrieval",
        }
    )
    assert import_problems(root) == []
    assert docstring_problems(root) == []
    assert coverage_problems(root) == []
    assert catalogue_problems(root, {"attention.flash": None}) == []


@pytest.mark.parametrize(
    ("file", "line", "named"),
    [
        ("mlsys/attention/up.py", "from mlsys.retrieval import bm25", "mlsys.retrieval"),
        ("mlsys/attention/up.py", "def f():\n    import mlsys.models.gpt", "mlsys.models.gpt"),
        ("mlsys/attention/up.py", "from ..contracts import check", "mlsys.contracts"),
        ("mlsys/attention/up.py", "from .. import contracts", "mlsys.contracts"),
        ("mlsys/attention/up.py", "from mlsys import contracts", "mlsys.contracts"),
        ("mlsys/attention/up.py", "import mlsys.cli", "mlsys.cli"),
        ("mlsys/attention/up.py", "import mlsys.data", "mlsys.data"),
        ("mlsys/retrieval/side.py", "from mlsys.quant import gptq", "mlsys.quant"),
        ("mlsys/quant/side.py", "import mlsys.parallel", "mlsys.parallel"),
        ("mlsys/files.py", "import mlsys.attention", "mlsys.attention"),
        ("mlsys/contracts/x.py", "import mlsys.bench", "mlsys.bench"),
    ],
)
def test_import_that_goes_up_or_sideways_is_named(plant, file, line, named):
    problems = import_problems(plant(**{file: line}))
    assert problems == [f"{file.removeprefix('mlsys/')} imports {named}"]


@pytest.mark.parametrize("section", ["Cost", "Memory", "Papers", "See also"])
def test_missing_and_empty_sections_are_named(plant, section):
    without = GOOD.replace(f"{section}:\n", "Other:\n")
    empty = re.sub(rf"{section}:\n.*\n", f"{section}:\n", GOOD)
    for text in (without, empty):
        problems = docstring_problems(plant(**{"mlsys/attention/flash.py": text}))
        assert len(problems) == 1
        assert section in problems[0]


def test_communication_stands_for_memory(plant):
    assert docstring_problems(plant(**{"mlsys/attention/flash.py": GOOD.replace("Memory", "Communication")})) == []


def test_undocumented_function_and_method_are_named(plant):
    source = GOOD + (
        "def f(): pass\n"
        "def _private(): pass\n"
        "class C:\n"
        '    """Documented."""\n'
        "    def method(self): pass\n"
        "    def __init__(self): pass\n"
        "    def forward(self): pass\n"
    )
    assert docstring_problems(plant(**{"mlsys/attention/flash.py": source})) == [
        "attention/flash.py: f has no docstring",
        "attention/flash.py: C.method has no docstring",
    ]


def test_module_without_test_or_benchmark_is_named(plant):
    root = plant(**{"mlsys/attention/linear.py": GOOD, "mlsys/attention/flash_triton.py": GOOD})
    assert coverage_problems(root) == [
        "attention/flash_triton.py has no test in tests/attention/test_flash.py",
        "attention/flash_triton.py is imported by no benchmark in benchmarks/attention/",
        "attention/linear.py has no test in tests/attention/test_linear.py",
        "attention/linear.py is imported by no benchmark in benchmarks/attention/",
    ]
    both = "from mlsys.attention import flash, flash_triton"
    root = plant(**{"tests/attention/test_flash.py": both, "benchmarks/attention/flash.py": both})
    assert not any("flash" in problem for problem in coverage_problems(root))


def test_reference_to_what_is_not_there_is_named(plant):
    text = GOOD.replace("`b`", "`mlsys.attention.flash`, `mlsys.attention.flash.f(x)`, `mlsys.attention`, `{}`")
    there, gone, nobody = (text.format(name) for name in ("mlsys.files", "mlsys.models.gpt", "mlsys.attention.flash.g"))
    files = {"mlsys/__init__.py": "", "mlsys/files.py": "", "mlsys/attention/__init__.py": ""}
    assert reference_problems(plant(**files, **{"mlsys/attention/up.py": there})) == []
    assert reference_problems(plant(**files, **{"mlsys/attention/up.py": gone, "docs/page.md": nobody})) == [
        "docs/page.md speaks of mlsys.attention.flash.g, which is not there",
        "mlsys/attention/up.py speaks of mlsys.models.gpt, which is not there",
    ]


def test_contract_without_technique_and_technique_without_contract_are_named(plant):
    root = plant()
    assert catalogue_problems(root, {"attention.flash": None, "attention.gone": None}) == [
        "contract attention.gone is not in the catalogue"
    ]
    assert catalogue_problems(root, {}) == [
        "contract attention.flash is in the catalogue only",
        "attention.flash is measured, but has no contract",
    ]


def test_contract_that_is_too_strict_too_lax_or_empty_is_named():
    toy = import_file(Path(__file__).parent / "contracts" / "toy.py").SOFTMAX
    assert contract_problems(toy) == []
    strict = replace(toy, tolerance=lambda given, name, want: 1e-30)
    assert any("refuses its reference" in problem for problem in contract_problems(strict))
    lax = replace(toy, cases=toy.cases[:1])
    assert [problem for problem in contract_problems(lax) if "accepts" in problem] == [
        "toy.softmax accepts its wrong variant overflows",
        "toy.softmax accepts its wrong variant first_axis",
        "toy.softmax accepts its wrong variant no_temperature",
        "toy.softmax accepts its wrong variant unnormalised",
    ]
    assert "has no wrong variant" in contract_problems(replace(toy, wrong={}))[0]
    twice = {"one": toy.wrong["overflows"], "two": replace(toy.wrong["overflows"], hint=" ")}
    assert contract_problems(replace(toy, wrong=twice)) == [
        "toy.softmax takes its wrong variant two for one",
        "toy.softmax has no hint for two",
    ]


# --- the tests themselves ---------------------------------------------------------------------------------------------


def test_shapes_are_checked_in_tests():
    import torch
    from jaxtyping import TypeCheckError

    from mlsys.attention import naive

    with pytest.raises(TypeCheckError):
        naive.attention(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))


def test_unchecked_types_lets_the_functions_speak(unchecked_types):
    import torch

    from mlsys.attention import naive

    with pytest.raises(ValueError):
        naive.attention(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))
    assert torch.get_num_threads() == 1
