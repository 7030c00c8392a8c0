"""`mlsys tune`: what it lists and says where there is no GPU; nothing is timed here."""

import argparse
import json

import pytest

from mlsys import catalog
from mlsys.commands import UsageError, tune
from mlsys.kernels import _triton_tune


def run(*words):
    parser = argparse.ArgumentParser()
    tune.configure(parser)
    return tune.run(parser.parse_args(words))


def test_list_shows_configs_and_what_is_remembered(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path))
    assert run("softmax", "--list") == 0
    printed = capsys.readouterr().out
    assert "kernels.softmax\n" in printed
    assert "softmax.forward bf16 columns=4096\n    ROWS=1 BLOCK=4096 warps=8 stages=1\n" in printed
    assert f"nothing is remembered in {tmp_path / 'triton'}" in printed
    folder = tmp_path / "triton" / "Some_GPU"
    folder.mkdir(parents=True)
    entry = {"kernel": "k", "key": "n<=8", "device": "Some GPU", "chosen": "A=1", "refused": []}
    (folder / "k.1.json").write_text(json.dumps(entry | {"milliseconds": {"A=1": 0.5, "A=2": 1.25}}))
    assert run("softmax", "--list") == 0
    assert "Some GPU: k n<=8: A=1, 0.5000 ms (slowest 1.2500 ms)" in capsys.readouterr().out
    assert len(_triton_tune.remembered()) == 1


def test_every_module_is_known_by_its_technique():
    known = tune.modules()
    assert known["kernels.softmax"] == "mlsys.kernels.softmax_triton"
    assert {"kernels.norm", "kernels.cross_entropy"} <= set(known)


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(catalog, "devices", lambda backend: {"cpu": None, "cuda": "no NVIDIA driver found"})
    with pytest.raises(UsageError, match="tuning needs an NVIDIA GPU: no NVIDIA driver found; `mlsys tune --list`"):
        run()


@pytest.mark.parametrize(
    ("words", "error", "named"),
    [
        (["sofmax"], LookupError, "no Triton kernel 'sofmax'; did you mean kernels.softmax"),
        (["softmax", "--shape", "4096"], UsageError, "tuning needs an NVIDIA GPU"),
        (["softmax", "--shape", "4096xx"], UsageError, "--shape must be whole numbers .* got '4096xx'"),
        (["softmax", "--shape", "0x4"], UsageError, "--shape must be whole numbers"),
        (["--shape", "8x8"], UsageError, "--shape 8x8 needs one NAME"),
    ],
)
def test_bad_requests_are_named(words, error, named, monkeypatch):
    monkeypatch.setattr(catalog, "devices", lambda backend: {"cpu": None, "cuda": "no NVIDIA driver found"})
    with pytest.raises(error, match=named):
        run(*words)
