"""`load_function`: the function, or an error that names the line of the user's own file."""

import sys
import textwrap

import pytest

from mlsys import loading
from mlsys.loading import load_function


@pytest.fixture(autouse=True)
def same_path_and_modules_afterwards(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))


@pytest.fixture
def write(tmp_path):
    def create(source, name="mine.py"):
        (tmp_path / name).write_text(textwrap.dedent(source))
        return str(tmp_path / name)

    return create


def test_loads_function_class_and_anything_callable(write):
    path = write("""
        from functools import partial
        def double(x): return 2 * x
        class Triple:
            def __call__(self, x): return 3 * x
        triple = Triple()
        quadruple = partial(lambda n, x: n * x, 4)
    """)
    assert load_function(f"{path}:double")(2) == 4
    assert load_function(f"{path}:Triple")()(2) == 6
    assert load_function(f"{path}:triple")(2) == 6
    assert load_function(f"{path}:quadruple")(2) == 8


def test_neighbours_can_be_imported_at_once_and_later(write):
    write("def one(): return 1\n", "neighbour_of_mine.py")
    write("def two(): return 2\n", "later_neighbour_of_mine.py")
    path = write("""
        from neighbour_of_mine import one
        def three():
            from later_neighbour_of_mine import two
            return one() + two()
    """)
    assert load_function(f"{path}:three")() == 3


def test_module_is_registered_so_that_dataclasses_work(write):
    path = write("""
        from __future__ import annotations
        from dataclasses import dataclass
        @dataclass
        class Point:
            x: int
        def point(): return Point(1)
    """)
    made = load_function(f"{path}:point")()
    assert made.x == 1
    assert sys.modules[type(made).__module__].Point is type(made)


def test_two_files_of_one_name_do_not_meet(write, tmp_path):
    (tmp_path / "other").mkdir()
    first, second = write("def f(): return 1"), write("def f(): return 2", "other/mine.py")
    one, two = load_function(f"{first}:f"), load_function(f"{second}:f")
    assert (one(), two()) == (1, 2)
    assert one.__module__ != two.__module__


def test_a_changed_file_is_read_again(write):
    assert load_function(f"{write('def f(): return 1')}:f")() == 1
    assert load_function(f"{write('def f(): return 2')}:f")() == 2  # same size, same second


def test_no_bytecode_is_written(write, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    write("", "another_neighbour.py")
    load_function(f"{write('import another_neighbour' + chr(10) + 'def f(): pass')}:f")
    assert not list(tmp_path.rglob("*.pyc"))
    assert sys.dont_write_bytecode is False


@pytest.mark.parametrize("spec", ["mine.py", "mine.py:", ":f", "", "mine.py:1f", "mine.py:a b"])
def test_form(spec):
    with pytest.raises(ValueError, match=r"expected FILE\.py:FUNCTION, got "):
        load_function(spec)


def test_wrong_file(write, tmp_path):
    path = write("")
    with pytest.raises(FileNotFoundError, match=r"no file '.*mien\.py'; did you mean mine\.py\?"):
        load_function(f"{tmp_path / 'mien.py'}:f")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_function(f"{tmp_path / 'nowhere' / 'mine.py'}:f")
    with pytest.raises(ValueError, match="expected a Python file before the colon"):
        load_function(f"{path[:-3]}.txt:f")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("x = 1\ndef f(:\n", r"mine\.py:2: `def f\(:`: SyntaxError: "),
        ("def f():\n\n  pass\n bad\n", r"mine\.py:4: `bad`: IndentationError"),
        ("def g():\n    return [][0]\n\ng()\n", r"mine\.py:2 in g: `return \[\]\[0\]`: IndexError: list index"),
        ("import json\njson.loads('{')\n", r"mine\.py:2: `json\.loads\('\{'\)`: JSONDecodeError: "),
        ("import no_such_module\n", r"mine\.py:1: `import no_such_module`: ModuleNotFoundError: No module named"),
        ("import sys\nsys.exit(1)\n", r"mine\.py:2: `sys.exit\(1\)`: importing it calls exit\(1\); keep .*__main__"),
        ("# coding: no-such\n", r"mine\.py.*: SyntaxError: "),
        ("x = '\0'\n", r"mine\.py.*: SyntaxError|ValueError"),
    ],
    ids=["syntax", "indentation", "own function", "in a library", "missing module", "exit", "encoding", "null byte"],
)
def test_file_that_fails_to_import_names_its_line(write, source, says):
    path = write(source)
    before = set(sys.modules)
    with pytest.raises(ImportError, match=says):
        load_function(f"{path}:f")
    assert not {name for name in set(sys.modules) - before if name.startswith("mlsys_loaded_")}


def test_no_such_function(write):
    path = write("""
        from math import sqrt
        def my_flash(): pass
        def other(): pass
        number = 1
    """)
    with pytest.raises(LookupError, match=r"mine\.py has no 'my_flsh'; did you mean my_flash\?"):
        load_function(f"{path}:my_flsh")
    with pytest.raises(LookupError, match=r"no 'zzz'; it defines my_flash, other$"):
        load_function(f"{path}:zzz")
    with pytest.raises(LookupError, match="it defines no function"):
        load_function(f"{write('x = 1')}:f")


def test_not_callable(write):
    with pytest.raises(TypeError, match=r"mine\.py:number is not a function but an int"):
        load_function(f"{write('number = 1')}:number")


def test_raised_at_is_the_innermost_own_line(write, tmp_path):
    function = load_function(f"{write('def f(x):' + chr(10) + '    return int(x)')}:f")
    with pytest.raises(ValueError) as caught:
        function("no")
    assert loading.raised_at(caught.value, tmp_path / "mine.py") == "mine.py:2 in f: `return int(x)`"
    assert loading.raised_at(caught.value, tmp_path / "other.py") is None


def test_one_line_shortens():
    assert loading.one_line(ValueError("a\n  b")) == "ValueError: a b"
    assert loading.one_line(ValueError()) == "ValueError"
    assert len(loading.one_line(ValueError("x" * 10_000))) < 500
