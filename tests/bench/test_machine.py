"""The fingerprint of this very machine is there and makes sense; its limits are those that perf measures."""

import dataclasses

import torch

from mlsys.bench import machine
from mlsys.perf import _measure


def test_fingerprint():
    here = machine.this_machine()
    assert here.cpu
    assert here.cores >= 1
    assert here.memory_gib > 0
    assert here.versions["torch"] == torch.__version__ or here.versions["torch"] in torch.__version__
    assert here.slug == here.slug.lower()
    assert " " not in here.slug
    assert here.cpu in str(here)


def test_a_gpu_names_the_machine():
    here = dataclasses.replace(machine.this_machine(), gpu="NVIDIA Toy(TM) 80GB", cores=4)
    assert here.slug == "nvidia-toy-80gb-4-cores"
    assert "NVIDIA Toy" in str(here)


def test_limits_are_measured_below_the_techniques():
    assert machine.limits is _measure.limits
    assert machine.threads is _measure.threads


def test_load_is_a_share_of_the_cores():
    assert 0 <= machine.load() < 1000
