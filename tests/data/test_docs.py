"""`mlsys.data.docs`: what is drawn from source, the cache that survives damage, queries with a known answer."""

import logging
import os
import sys
import textwrap

import pytest

from mlsys.data import docs
from mlsys.data.docs import Document

SOURCE = '''
"""A module.

More of it.
"""
import os

class Box:
    """A box."""

    def __init__(self, size, *, lid=None):
        """Not shown: private."""

    def open(self, how: str = "wide", /, *rest) -> bool:
        """Open it.

        With care.
        """
        def inner():
            """Cannot be called from outside."""

    @staticmethod
    def make(a, b=1): "Make one."

    @classmethod
    def empty(cls): "An empty one."

    @property
    def volume(self): "Its volume."

    class Lid:
        "Closes it."

try:
    fast
except ImportError:
    def fallback(x, /): "Slow."
else:
    async def fast_one(): "Fast."

if os.name == "nt":
    def twice(): "The same."
else:
    def twice(): "The same."

def silent(): pass
def _hidden(): "Hidden."
def empty_docstring(): ""
'''


def by_name(documents):
    return {document.name: document for document in documents}


def test_extract():
    found = by_name(docs.extract(SOURCE, "m", path="m.py", package="p"))
    assert set(found) == {
        "m", "m.Box", "m.Box.open", "m.Box.make", "m.Box.empty", "m.Box.volume", "m.Box.Lid", "m.fallback",
        "m.fast_one", "m.twice",
    }  # fmt: skip
    assert found["m"] == Document("m", "module", "", "A module.", "More of it.", "m.py", 1, "p")
    assert found["m.Box.open"] == Document(
        "m.Box.open", "method", "(how: str='wide', /, *rest) -> bool", "Open it.", "With care.", "m.py", 14, "p"
    )
    signatures = {name: document.signature for name, document in found.items()}
    assert signatures["m.Box"] == "(size, *, lid=None)"
    assert signatures["m.Box.make"] == "(a, b=1)"
    assert signatures["m.Box.empty"] == "()"
    assert signatures["m.Box.volume"] == ""
    assert signatures["m.Box.Lid"] == ""
    assert signatures["m.fallback"] == "(x, /)"
    assert found["m.fast_one"].kind == "function"
    assert found["m.Box.Lid"].kind == "class"


def test_extract_refuses_what_is_not_python():
    with pytest.raises(SyntaxError):
        docs.extract("def", "m")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with the oddities of real ones."""
    root = tmp_path / "site" / "oddpack"
    files = {
        "__init__.py": '"""The package."""\nfrom ._impl import hidden_here as shown, Tool\nfrom .mod import f\n',
        "_impl.py": 'def hidden_here():\n    "Shown elsewhere."\n'
        'class Tool:\n    "A tool."\n    def use(self): "Use it."\n',
        "mod.py": 'def f(a):\n    "Does f."\nraise RuntimeError("imported!")\n',
        "broken.py": "def broken(:\n",
        "tests/test_mod.py": '"""Not wanted."""\n',
        "with-dash.py": '"""Not importable."""\n',
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "latin.py").write_bytes('"""Größe."""'.encode("latin-1"))
    (root / "cookie.py").write_bytes('# -*- coding: latin-1 -*-\n"""Größe."""'.encode("latin-1"))
    (root / "nul.py").write_bytes(b'"""x"""\0')
    (tmp_path / "site" / "oddmodule.py").write_text('"""One file."""\ndef g(): "Does g."\n')
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(docs, "_stdlib_source", lambda: docs._package_source("oddmodule"))  # the real one takes seconds
    return root


def test_packages_are_read_without_importing(package, tmp_path):
    found = docs.load(["oddpack"], cache_dir=tmp_path / "cache")
    names = by_name(found)
    assert list(names) == [
        "oddmodule", "oddmodule.g", "oddpack", "oddpack.shown", "oddpack.Tool", "oddpack.Tool.use", "oddpack.cookie",
        "oddpack.mod.f",
    ]  # fmt: skip
    assert names["oddpack.cookie"].summary == "Größe."
    assert names["oddpack.shown"].path == "oddpack/_impl.py"
    assert names["oddmodule.g"].path == "oddmodule.py"
    assert {document.package for document in found} == {"oddmodule", "oddpack"}
    assert not {"oddpack", "oddmodule"} & set(sys.modules)


def test_packages_of_the_standard_library_are_not_read_twice(package, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="mlsys.data.docs")
    found = docs.load(["email", "oddpack", "stdlib", "json"], cache_dir=tmp_path / "cache")
    assert found == docs.load(["oddpack"], cache_dir=tmp_path / "cache")
    assert "email is in the standard library" in caplog.text
    assert "json is in the standard library" in caplog.text
    assert "oddpack is in" not in caplog.text


NESTED = {"sum": "x = " + "-" * 100_000 + "1\n", "attributes": "x = a" + ".b" * 100_000 + "\n"}


@pytest.mark.parametrize("source", NESTED.values(), ids=NESTED)
def test_a_file_too_deep_for_the_parser_is_skipped_with_a_warning(package, tmp_path, caplog, source):
    want = docs.load(["oddpack"], cache_dir=tmp_path / "first")
    (package / "deep.py").write_text(f'"""Too deep."""\n{source}')
    assert docs.load(["oddpack"], cache_dir=tmp_path / "second") == want
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "deep.py: it is nested too deeply" in record.getMessage()


@pytest.mark.parametrize("error", [MemoryError, RecursionError])
def test_whatever_the_parser_raises_for_deep_nesting_is_caught(package, tmp_path, caplog, monkeypatch, error):
    tree = docs._tree

    def fails(source):
        if "Does f." in source:
            raise error
        return tree(source)

    monkeypatch.setattr(docs, "_tree", fails)
    found = by_name(docs.load(["oddpack"], cache_dir=tmp_path / "cache"))
    assert "oddpack.Tool" in found
    assert "oddpack.mod.f" not in found
    assert f"mod.py: it is nested too deeply to be parsed ({error.__name__})" in caplog.text


def test_unknown_packages_are_refused(package, tmp_path):
    with pytest.raises(ValueError, match=r"'no_such_package'.*install it there"):
        docs.load(["no_such_package"], cache_dir=tmp_path)
    with pytest.raises(ValueError, match="'scikit-learn' is not the import name"):
        docs.load(["scikit-learn"], cache_dir=tmp_path)
    with pytest.raises(TypeError, match=r"use \['numpy'\]"):
        docs.load("numpy", cache_dir=tmp_path)


def test_cache_is_used_and_follows_the_source(package, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="mlsys.data.docs")
    first = docs.load(["oddpack"], cache_dir=tmp_path / "cache")
    assert "reading the docstrings of oddpack" in caplog.text
    caplog.clear()
    assert docs.load(["oddpack", "oddpack"], cache_dir=tmp_path / "cache") == first
    assert not caplog.text
    (package / "more.py").write_text('"""More."""')
    os.utime(package / "more.py", (2e9, 2e9))
    assert "oddpack.more" in by_name(docs.load(["oddpack"], cache_dir=tmp_path / "cache"))
    monkeypatch.setattr(docs, "EXTRACTOR", -1)
    caplog.clear()
    docs.load(cache_dir=tmp_path / "cache")
    assert "reading the docstrings of oddmodule" in caplog.text


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b"", lambda b: b"\xff" + b, lambda b: b"[]\n" + b])
def test_damaged_cache_is_built_again_and_says_so(package, tmp_path, caplog, damage):
    want = docs.load(cache_dir=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert docs.load(cache_dir=tmp_path / "cache") == want
    assert "building it again" in caplog.text
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(package, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert docs.load(cache_dir=tmp_path / "cache")
    assert "cannot keep the documents" in caplog.text


def test_cache_dir_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path))
    assert docs.default_cache_dir() == tmp_path / "docs"


def test_the_real_standard_library(tmp_path_factory):
    """Read from the machine's own cache if there is one: seconds the first time."""
    found = docs.load()
    assert 4000 < len(found) < 15000
    names = by_name(found)
    for name in ("email.utils.parsedate", "shutil.rmtree", "datetime.datetime.strptime", "os.path.join", "gzip"):
        assert name in names
    parsedate = names["email.utils.parsedate"]
    assert (parsedate.signature, parsedate.path) == ("(data)", "email/_parseaddr.py")
    assert not any("test" in document.path.split("/")[:-1] for document in found)
    queries, relevant = docs.known_items(found, 200, seed=0)
    assert len(queries) == len(relevant) == 200


def document(name, summary, body):
    return Document(name, "function", "()", summary, textwrap.dedent(body), "f.py", 1, "p")


def test_known_items():
    long = "word " * 25
    documents = [
        document("a", "A summary of a", long + "a"),
        document("b", "Too short", long + "b"),
        document("c", "Said twice by two", long + "c"),
        document("d", "Said twice by two", long + "d"),
        document("e", "Its body is empty", ""),
        document("f", "The body repeats it", "The body repeats it " + long),
        document("g", "One more that serves", long + "g"),
        document("h", "A body that another has", long + "h"),
        document("i", "The other with that body", long + "h"),
    ]
    queries, relevant = docs.known_items(documents, 10, seed=0)
    assert sorted(relevant) == [0, 6]
    assert queries == [documents[i].summary for i in relevant]
    assert docs.known_items(documents, 1, seed=5) == docs.known_items(documents, 1, seed=5)
    assert len({docs.known_items(documents, 1, seed=s)[1][0] for s in range(9)}) == 2
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        docs.known_items(documents, 0, seed=0)
    with pytest.raises(ValueError, match="none of the 1 documents"):
        docs.known_items(documents[1:2], 5, seed=0)
