"""The catalogue: techniques found by reading files, what they say of themselves, and what this machine can run."""

import shutil
from pathlib import Path

import pytest

from mlsys import catalog

FLASH = '''"""Exact attention in tiles: the online
softmax. It never holds the scores, e.g. not all of them.

class after class of text that looks like code.

Cost:
    4·b·h·t·s·d FLOPs.

Papers:
    Milakov & Gimelshein 2018, arXiv:1805.02867
    (the recurrence).
    Dao et al. 2022, arXiv:2205.14135, Algorithm 1.

See also:
    `naive`.
"""
import torch

def attention(): pass
'''


@pytest.fixture
def tree(tmp_path):
    """A checkout with two packages: a technique with two backends, a second one, and files that are none."""
    files = {
        "mlsys/attention/__init__.py": '"""Papers:\n    None.\n"""',
        "mlsys/attention/flash.py": FLASH,
        "mlsys/attention/flash_triton.py": FLASH,
        "mlsys/attention/flash_cuda.py": FLASH,
        "mlsys/attention/_masks.py": FLASH,
        "mlsys/attention/shapes.py": '"""A helper without papers."""\n',
        "mlsys/retrieval/rank_numba.py": '"""Ranks.\n\nPapers:\n    Someone 1999.\n"""\nfrom numpy import sort\n',
        "mlsys/commands/list.py": FLASH,
        "mlsys/contracts/attention.py": "import torch\nCONTRACTS = {'flash': Contract(name='attention.flash')}",
        "tests/attention/test_flash.py": "",
        "benchmarks/attention/flash.py": "",
        "benchmarks/retrieval/rank_numba.py": "",
        "docs/attention/other.md": "",
        "docs/attention/tiles.md": "Read [`flash.py`](../../mlsys/attention/flash.py).",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_finds_the_techniques_and_nothing_else(tree):
    found = catalog.techniques(tree / "mlsys")
    assert [technique.name for technique in found] == ["attention.flash", "retrieval.rank_numba"]


def test_a_technique_may_be_a_folder(tree):
    folder = tree / "mlsys/attention/ring"
    folder.mkdir()
    (folder / "__init__.py").write_text(FLASH.replace("import torch", ""))
    (folder / "_steps.py").write_text("import torch\n")
    (tree / "benchmarks/attention/ring.py").write_text("")
    (tree / "tests/attention/ring").mkdir()
    ring = catalog.find("ring", tree / "mlsys")
    assert ring.name == "attention.ring"
    assert ring.source == folder / "__init__.py"
    assert ring.test == tree / "tests/attention/ring"
    assert [backend.name for backend in ring.backends] == ["torch"]


def test_what_a_docstring_says(tree):
    flash = catalog.find("flash", tree / "mlsys")
    assert flash.idea == "Exact attention in tiles: the online softmax"
    assert flash.papers == (
        "Milakov & Gimelshein 2018, arXiv:1805.02867 (the recurrence).",
        "Dao et al. 2022, arXiv:2205.14135, Algorithm 1.",
    )
    assert flash.paper == "Milakov & Gimelshein 2018"
    assert catalog.sections(flash.doc)["Cost"] == "4·b·h·t·s·d FLOPs."


def test_backends_stand_beside_the_readable_module(tree):
    flash, rank = catalog.techniques(tree / "mlsys")
    assert [backend.name for backend in flash.backends] == ["torch", "triton", "cuda"]
    assert [backend.source.name for backend in flash.backends] == ["flash.py", "flash_triton.py", "flash_cuda.py"]
    assert [backend.name for backend in rank.backends] == ["numpy"]  # `rank_numba` has no `rank.py` beside it


def test_a_page_of_its_own_name_comes_first(tree):
    (tree / "docs/attention/flash.md").write_text("")
    assert catalog.find("flash", tree / "mlsys").docs == tree / "docs/attention/flash.md"


def test_a_backends_name_stands_for_its_technique(tree):
    assert catalog.find("flash_triton", tree / "mlsys").name == "attention.flash"
    assert catalog.checkable(tree / "mlsys") == ["attention.flash"]
    (tree / "mlsys/contracts/attention.py").write_text("'attention.flash', 'attention.flash_cuda', 'attention.gone'")
    catalog.contracted.cache_clear()
    assert catalog.checkable(tree / "mlsys") == ["attention.flash", "attention.flash_cuda"]


def test_paths_in_a_checkout_and_in_a_wheel(tree):
    flash, rank = catalog.techniques(tree / "mlsys")
    assert flash.source == tree / "mlsys/attention/flash.py"
    assert flash.test == tree / "tests/attention/test_flash.py"
    assert flash.benchmark == tree / "benchmarks/attention/flash.py"
    assert flash.contract == tree / "mlsys/contracts/attention.py"
    assert flash.docs == tree / "docs/attention/tiles.md"  # the page that links to its source
    assert (rank.test, rank.contract, rank.docs) == (None, None, None)

    shutil.move(tree / "benchmarks", tree / "mlsys/_benchmarks")
    assert catalog.find("attention.flash", tree / "mlsys").benchmark == tree / "mlsys/_benchmarks/attention/flash.py"


def test_broken_module_says_where(tree):
    (tree / "mlsys/attention/bad.py").write_text('"""Bad."""\nimport (\n')
    with pytest.raises(SyntaxError) as caught:
        catalog.techniques(tree / "mlsys")
    assert caught.value.filename.endswith("bad.py")


@pytest.mark.parametrize(
    ("doc", "idea"),
    [
        ("One idea.", "One idea"),
        ("BM25: rank by words, i.e. terms. Then more.", "BM25: rank by words, i.e. terms"),
        ("No stop at\nthe end\n\nSecond paragraph.", "No stop at the end"),
        ("Is it right? `check` says.", "Is it right?"),
        ("", ""),
    ],
)
def test_idea(doc, idea):
    assert catalog.idea(doc) == idea


@pytest.mark.parametrize(
    ("paper", "short"),
    [
        ("Dao et al. 2022, arXiv:2205.14135 (tiles).", "Dao et al. 2022"),
        ("Shannon 1948a, Bell.", "Shannon 1948a"),
        ("The OCP specification", "The OCP specification"),
    ],
)
def test_short(paper, short):
    assert catalog.short(paper) == short


NAMES = ["attention.flash", "attention.naive", "retrieval.bm25", "retrieval.flat", "kernels.flat"]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("flsh", "attention.flash"),
        ("attention.flahs", "attention.flash"),
        ("atention.flash", "attention.flash"),
        ("bm52", "retrieval.bm25"),
        ("BM25", "retrieval.bm25"),
    ],
)
def test_nearest_is_first(wrong, right):
    assert catalog.nearest(wrong, NAMES)[0] == right
    with pytest.raises(LookupError, match=f"no technique {wrong!r}; did you mean {right}"):
        catalog.resolve(wrong, NAMES)


def test_resolve():
    assert catalog.resolve("attention.flash", NAMES) == "attention.flash"
    assert catalog.resolve("bm25", NAMES) == "retrieval.bm25"
    with pytest.raises(LookupError, match=r"'flat' is short for several: retrieval\.flat, kernels\.flat"):
        catalog.resolve("flat", NAMES)
    with pytest.raises(LookupError, match="no technique 'qqq'; `mlsys list` shows them all"):
        catalog.resolve("qqq", NAMES)
    with pytest.raises(LookupError):
        catalog.resolve("", NAMES)


def test_imports_are_absolute_names_anywhere():
    tree = catalog.ast.parse("import a.b, c\nfrom d import e\nfrom . import f\ndef g():\n    from h.i import j\n")
    assert catalog.imports(tree) == ["a.b", "c", "d", "d.e", "h.i", "h.i.j"]


def test_backend_in_words():
    usable = catalog.Backend("torch", Path("x.py"), {"cpu": None, "cuda": "no NVIDIA driver found"})
    assert usable.unusable is None
    assert str(usable) == "torch: cpu yes; cuda no (no NVIDIA driver found)"
    unusable = catalog.Backend("triton", Path("x.py"), {"cuda": "triton is not installed"})
    assert unusable.unusable == "triton is not installed"


@pytest.fixture
def machine(monkeypatch):
    """Say what this machine has; asked afresh before and after."""
    catalog.devices.cache_clear()

    def has(*, driver, installed, built_with_cuda=True, compiler=True):
        monkeypatch.setattr(catalog, "no_nvidia_driver", lambda: None if driver else "no NVIDIA driver found")
        missing = lambda name: None if name in installed else f"{name} is not installed"  # noqa: E731
        monkeypatch.setattr(catalog, "_missing", missing)
        monkeypatch.setattr(catalog, "_torch_without_cuda", lambda: None if built_with_cuda else "built without CUDA")
        monkeypatch.setattr(catalog, "_no_compiler", lambda: None if compiler else "no C++ compiler found")

    yield has
    catalog.devices.cache_clear()


@pytest.mark.parametrize(
    ("settings", "backend", "expected"),
    [
        ({"driver": True, "installed": ["torch"]}, "torch", {"cpu": None, "cuda": None}),
        ({"driver": False, "installed": ["torch"]}, "torch", {"cpu": None, "cuda": "no NVIDIA driver found"}),
        (
            {"driver": True, "installed": ["torch"], "built_with_cuda": False},
            "torch",
            {"cpu": None, "cuda": "built without CUDA"},
        ),
        ({"driver": True, "installed": []}, "numba", {"cpu": "numba is not installed"}),
        ({"driver": False, "installed": ["triton"]}, "triton", {"cuda": "no NVIDIA driver found"}),
        ({"driver": True, "installed": []}, "triton", {"cuda": "triton is not installed"}),
        ({"driver": True, "installed": ["torch"]}, "cuda", {"cpu": None, "cuda": None}),
        (
            {"driver": True, "installed": ["torch"], "compiler": False},
            "cuda",
            {"cpu": "no C++ compiler found", "cuda": None},
        ),
        ({"driver": False, "installed": []}, "python", {"cpu": None}),
    ],
)
def test_devices(machine, monkeypatch, settings, backend, expected):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    machine(**settings)
    assert catalog.devices(backend) == expected


def test_triton_runs_on_the_cpu_when_interpreted(machine, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    machine(driver=False, installed=["triton"])
    assert catalog.devices("triton") == {"cpu": None}


def test_torch_is_usable_here_and_agrees_about_cuda():
    import torch

    catalog.devices.cache_clear()
    here = catalog.devices("torch")
    assert here["cpu"] is None
    assert (here["cuda"] is None) == torch.cuda.is_available()
    assert (catalog._torch_without_cuda() is None) == (torch.version.cuda is not None)
