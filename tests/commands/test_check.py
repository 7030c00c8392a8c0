"""`mlsys check`: what it says of right and wrong implementations, and of what it cannot check."""

import argparse
import importlib
import json
from pathlib import Path

import pytest

from mlsys import catalog, cli
from mlsys.commands import UsageError

TOY = f"{Path(__file__).parents[1] / 'contracts' / 'toy.py'}:SOFTMAX"
RIGHT = "import numpy as np\ndef f(x, *, temperature=1.0):\n    z = x / temperature\n"
RIGHT += "    e = np.exp(z - z.max(-1, keepdims=True))\n    return e / e.sum(-1, keepdims=True)\n"
FLASH = """
from mlsys.attention.flash import attention

def right(q, k, v, **settings):
    return attention(q, k, v, **settings)

def unscaled(q, k, v, **settings):
    return attention(q * q.shape[-1] ** 0.5, k, v, **settings)
"""


@pytest.fixture
def mine(tmp_path):
    def write(source, name="f"):
        (tmp_path / "mine.py").write_text(source)
        return f"{tmp_path / 'mine.py'}:{name}"

    return write


def test_check_passes(capsys, mine):
    assert cli.main(["check", TOY, mine(RIGHT)]) == 0
    assert "mine.py:f against toy.softmax: pass (5 cases in " in capsys.readouterr().out


def test_check_fails_with_case_shapes_error_and_hint(capsys, mine):
    assert cli.main(["check", TOY, mine(RIGHT.replace("/ temperature", "/ 1"))]) == 1
    text = capsys.readouterr().out
    assert "against toy.softmax: FAIL" in text
    assert "rows=2, columns=5, temperature=0.5" in text
    assert "x (2, 5) float32" in text
    assert "largest error" in text
    assert "behaves like the wrong variant `no_temperature`: divide by the temperature" in text


def test_check_reports_an_endless_loop(capsys, mine):
    assert cli.main(["check", TOY, mine("def f(x, **_):\n    while True: pass\n"), "--limit", "1"]) == 1
    assert "no answer within 1 s at mine.py:2 in f: `while True: pass`; an endless loop?" in capsys.readouterr().out


def test_check_json(capsys, mine):
    assert cli.main(["check", TOY, mine("def f(x, **_):\n    print('x')\n    return 1 / 0\n"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False
    assert found["contract"] == "toy.softmax"
    assert found["failure"]["case"] == {"rows": 1, "columns": 1}
    assert "ZeroDivisionError: division by zero, at mine.py:3 in f: `return 1 / 0`" in found["failure"]["message"]


def test_check_that_cannot_be_made_is_two(fails, mine):
    assert fails("check", TOY, mine("def f(:\n")).startswith("mine.py:1: `def f(:`: SyntaxError")
    assert fails("check", TOY, mine("def g(): pass\n")) == "mine.py has no 'f'; it defines g"
    assert fails("check", TOY, "mine.py").startswith("expected FILE.py:FUNCTION, got 'mine.py'")
    assert fails("check", "attention.flsh").startswith("no technique 'attention.flsh'; did you mean")


def test_check_on_cuda_without_it(fails, monkeypatch):
    monkeypatch.setattr(catalog, "devices", lambda backend: {"cpu": None, "cuda": "no NVIDIA driver found"})
    assert fails("check", TOY, "--device", "cuda") == "--device cuda: no NVIDIA driver found"


def test_check_of_a_technique_without_a_contract(monkeypatch):
    only = catalog.Backend("torch", Path("bare.py"), {"cpu": None})
    bare = catalog.Technique("attention.bare", "", "", (), (only,), Path("bare.py"), *[None] * 4)
    monkeypatch.setattr(catalog, "techniques", lambda package_root=None: [bare])
    check = importlib.import_module("mlsys.commands.check")
    with pytest.raises(UsageError, match=r"attention\.bare has no contract; these have: none"):
        check.run(argparse.Namespace(name="bare", target=None, device="cpu"))


def test_check_of_attention(capsys, mine):
    assert cli.main(["check", "flash", mine(FLASH, "right")]) == 0
    assert "against attention.flash: pass" in capsys.readouterr().out
    assert cli.main(["check", "attention.flash", mine(FLASH, "unscaled")]) == 1
    text = capsys.readouterr().out
    assert "largest error" in text
    assert "hint    behaves like the wrong variant" in text


@pytest.mark.parametrize("name", ["attention.flash", "retrieval.bm25"])
def test_check_of_the_librarys_own(capsys, name):
    assert cli.main(["check", name]) == 0
    assert f"the reference against {name}: pass" in capsys.readouterr().out
