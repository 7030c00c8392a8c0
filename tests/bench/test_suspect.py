"""Inputs are watched, changed and put back in place; unfinished results show; shared settings are put back."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from mlsys.bench.suspect import Snapshot, Surroundings, finished, unfinished


@dataclass
class Inputs:
    words: list[list[str]]
    weights: dict[str, torch.Tensor]
    ids: np.ndarray
    labels: tuple[list[int], int]
    built: dict[Any, Any] = field(default_factory=dict)


class Index:
    pass


@pytest.fixture
def inputs():
    words = [["to", "be", "or"], [], ["not"], ["to", "be"]]
    weights = {"w": torch.arange(6.0).view(2, 3).requires_grad_(), "nan": torch.tensor([1.0, float("nan")])}
    return Inputs(words, weights, np.arange(5), ([3, 1, 2], 7), {"naive": Index()})


def scale(inputs):
    with torch.no_grad():
        inputs.weights["w"].mul_(1.01)


CHANGES = {
    "a word": lambda i: i.words[0].__setitem__(1, "bee"),
    "the order of words": lambda i: i.words[0].sort(),
    "the order of documents": lambda i: i.words.reverse(),
    "an empty document": lambda i: i.words[1].append("x"),
    "one document fewer": lambda i: i.words.pop(),
    "a tensor": scale,
    "a tensor's shape": lambda i: i.weights["nan"].resize_(1),
    "another weight": lambda i: i.weights.update(cached=torch.zeros(1)),
    "an array": lambda i: i.ids.__setitem__(0, 9),
    "a label in a tuple": lambda i: i.labels[0].append(4),
}


@pytest.mark.parametrize("what", CHANGES)
def test_every_change_shows_and_is_put_back(inputs, what):
    snapshot = Snapshot(inputs)
    held = [inputs.words, inputs.words[0], inputs.weights["w"], inputs.ids]
    assert not snapshot.changed()
    CHANGES[what](inputs)
    assert snapshot.changed()
    snapshot.restore()
    assert not snapshot.changed()
    assert inputs.words == [["to", "be", "or"], [], ["not"], ["to", "be"]]
    assert inputs.weights["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert inputs.weights["w"].requires_grad
    assert inputs.labels == ([3, 1, 2], 7)
    assert all(a is b for a, b in zip(held, [inputs.words, inputs.words[0], inputs.weights["w"], inputs.ids]))


def test_equal_values_and_what_the_benchmark_keeps_are_no_change(inputs):
    snapshot = Snapshot(inputs)
    inputs.words[0][0] = "".join(["t", "o"])  # another object of the same value
    inputs.built["flash"] = Index()
    assert not snapshot.changed()
    snapshot.restore()
    assert set(inputs.built) == {"naive", "flash"}


def test_shifted_values_are_others_of_the_same_kind_in_the_same_place(inputs):
    snapshot = Snapshot(inputs)
    address = inputs.weights["w"].data_ptr()
    snapshot.shift()
    assert inputs.words == [["be", "to", "be"], [], ["or"], ["not", "to"]]
    assert inputs.weights["w"].tolist() == [[6.25, 0, 1.25], [2.5, 3.75, 5]]
    assert inputs.weights["w"].data_ptr() == address
    assert inputs.ids.tolist() == [4, 0, 1, 2, 3]
    assert inputs.labels == ([2, 3, 1], 7)
    snapshot.restore()
    assert not snapshot.changed()


@pytest.mark.parametrize("inputs", [[torch.ones(3), 1], (np.ones(3),), list("abc"), torch.ones(2), {"x": [1, 2]}])
def test_inputs_need_not_be_a_dataclass(inputs):
    snapshot = Snapshot(inputs)
    snapshot.shift()
    assert snapshot.changed()
    snapshot.restore()
    assert not snapshot.changed()


def test_read_only_arrays_are_left_alone():
    fixed = np.arange(3)
    fixed.flags.writeable = False
    snapshot = Snapshot([fixed])
    snapshot.shift()
    snapshot.restore()
    assert fixed.tolist() == [0, 1, 2]


def test_a_finished_result_is_a_copy():
    tensor, array = torch.ones(2), np.ones(2)
    copy = finished([tensor, (array, {"a": tensor}), 3])
    tensor.zero_()
    array[:] = 0
    assert copy[0].tolist() == copy[1][1]["a"].tolist() == copy[1][0].tolist() == [1, 1]
    assert copy[2] == 3
    index = Index()
    assert finished(index) is index


class Lazy(torch.Tensor):
    pass


def test_what_may_still_have_to_be_computed_is_no_result():
    want = [torch.ones(2)]
    for fine in ([torch.ones(2)], (np.ones(2), [1.0, 2]), {"out": torch.nn.Parameter(torch.ones(1))}, 3, None):
        assert unfinished(fine, want) is None
    assert unfinished([torch.ones(2).as_subclass(Lazy)], want).startswith("returned a Lazy, expected plain")
    assert unfinished([Index()], want).startswith("returned an Index")
    assert unfinished(Index(), Index()) is None  # an index is what this benchmark asks for


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda: torch.set_num_threads(2), "torch's number of threads"),
        (lambda: torch.set_default_dtype(torch.float64), "torch's default dtype"),
        (lambda: torch.set_grad_enabled(False), "whether torch records gradients"),
    ],
)
def test_shared_settings_are_put_back(change, says):
    before = Surroundings.now()
    assert before.changed() is None
    try:
        change()
        assert before.changed() == says
    finally:
        before.restore()
    assert before.changed() is None
