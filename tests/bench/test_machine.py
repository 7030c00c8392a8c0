"""The fingerprint and the measured limits of this very machine are there and make sense."""

import torch

from mlsys.bench import machine


def test_fingerprint():
    here = machine.this_machine()
    assert here.cpu
    assert here.cores >= 1
    assert here.memory_gib > 0
    assert here.versions["torch"] == torch.__version__ or here.versions["torch"] in torch.__version__
    assert here.slug == here.slug.lower()
    assert " " not in here.slug
    assert here.cpu in str(here)


def test_measured_limits_are_plausible(monkeypatch, tmp_path):
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "_best", lambda run, device, budget_s=0: (run(), 0.01)[1])
    limits = machine.limits("float32", 1)
    assert limits.flops == 2 * 1536**3 / 0.01
    assert limits.bandwidth == 2 * 4 * 2**25 / 0.01
