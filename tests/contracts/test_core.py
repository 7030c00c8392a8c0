"""The contract machinery: what passes, what fails, and whether it says why."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mlsys.contracts import Contract, Mismatch, Wrong, check, core, find
from mlsys.loading import import_file

toy = import_file(Path(__file__).with_name("toy.py"))


def constant(reference, *, call=lambda impl, given: {"out": impl()}, tolerance=1e-9, wrong=None, **settings):
    """A contract of one case without inputs, whose oracle is `reference()`."""
    return Contract(
        name="toy.constant",
        signature="f()",
        reference=reference,
        cases=[{}],
        inputs=lambda case, seed, device: {},
        call=call,
        oracle=lambda given: {"out": reference()},
        tolerance=lambda given, name, want: tolerance,
        wrong=wrong or {},
        **settings,
    )


def verdict_on(result, want):
    failure = check(constant(lambda: want), lambda: result).failure
    return None if failure is None else failure.message


def test_reference_passes_every_case():
    verdict = check(toy.SOFTMAX, toy.softmax)
    assert verdict.passed
    assert verdict.cases == len(toy.SOFTMAX.cases)
    assert "pass (5 cases in" in str(verdict)


@pytest.mark.parametrize("name", toy.SOFTMAX.wrong)
def test_wrong_variant_fails_and_is_recognised(name):
    verdict = check(toy.SOFTMAX, toy.SOFTMAX.wrong[name].impl)
    assert not verdict.passed
    assert verdict.failure.like == name
    assert toy.SOFTMAX.wrong[name].hint in str(verdict)


def test_failure_names_case_shapes_error_and_place():
    failure = check(toy.SOFTMAX, toy.first_axis).failure
    assert failure.case == {"rows": 3, "columns": 3}
    assert failure.shapes == {"x": "(3, 3) float32", "temperature": "1.0"}
    assert failure.message.startswith("out: largest error ")
    assert " at [" in failure.message
    assert "9 of 9 elements are off" in failure.message


def test_mistake_unlike_any_variant_has_no_hint():
    failure = check(toy.SOFTMAX, lambda x, temperature: toy.softmax(x, temperature=temperature) + 0.1).failure
    assert failure.like is None
    assert failure.hint is None


def test_hint_prefers_the_variant_that_agrees_on_more_cases():
    def double(x):
        return x * 2

    contract = Contract(
        name="toy.double",
        signature="double(x)",
        reference=double,
        cases=[{"n": n} for n in (1, 2, 3)],
        inputs=lambda case, seed, device: {"x": np.full(case["n"], float(case["n"]))},
        call=lambda impl, given: {"out": impl(given["x"])},
        oracle=lambda given: {"out": double(given["x"])},
        tolerance=lambda given, name, want: 1e-9,
        # all three agree at n = 1; the order is such that neither the first nor the last is right
        wrong={
            "cubed": Wrong(lambda x: x**3, "cubed"),
            "identity": Wrong(lambda x: x, "not doubled"),
            "squared": Wrong(lambda x: x**2, "squared"),
        },
    )
    assert check(contract, lambda x: x + 0.0).failure.like == "identity"
    assert check(contract, lambda x: x * x).failure.like == "squared"
    assert check(contract, lambda x: x * x * x).failure.like == "cubed"


def wide(wrong):
    """A contract with a tolerance of 1 around 0, in which a wrong variant is within reach of much that is not it."""
    return Contract(
        name="toy.wide",
        signature="f(x)",
        reference=lambda x: np.zeros(1),
        cases=[{}],
        inputs=lambda case, seed, device: {"x": np.ones(1)},
        call=lambda impl, given: {"out": impl(given["x"])},
        oracle=lambda given: {"out": np.zeros(1)},
        tolerance=lambda given, name, want: 1.0,
        wrong={"only": Wrong(wrong, "the hint")},
    )


@pytest.mark.parametrize(("value", "like"), [(3.0, "only"), (2.0, "only"), (1.6, None), (1.1, None), (-1.1, None)])
def test_a_hint_must_explain_at_least_half_of_the_error(value, like):
    contract = wide(lambda x: np.array([2.5]))
    assert check(contract, lambda x: np.array([value])).failure.like == like


def test_a_variant_that_modifies_its_argument_explains_no_wrong_number():
    def greedy(x):
        x[:] = 0
        return np.zeros(1)

    contract = wide(greedy)
    assert check(contract, lambda x: np.array([1.1])).failure.like is None
    assert check(contract, greedy).failure.like == "only"


def sorting(incidental, **wrong):
    """A contract about sorting, which also asks for at most ten comparisons; `comparisons` may differ widely."""
    return Contract(
        name="toy.sorted",
        signature="f(x) -> sorted, comparisons",
        reference=lambda x: (np.sort(x), 3.0),
        cases=[{"x": [2.0, 1.0]}, {"x": [3.0, 1.0, 2.0]}],
        inputs=lambda case, seed, device: {"x": np.array(case["x"])},
        call=lambda impl, given: dict(zip(("out", "comparisons"), impl(given["x"]), strict=True)),
        oracle=lambda given: {"out": np.sort(given["x"]), "comparisons": np.array(10.0)},
        tolerance=lambda given, name, want: {"out": 1e-9, "comparisons": 0.5}[name],
        compare={"comparisons": lambda given, got, want, tolerance: f"{got:g}" if got > want else None},
        wrong={name: Wrong(impl, "the hint") for name, impl in wrong.items()},
        incidental=incidental,
    )


def descending(comparisons):
    return lambda x: (-np.sort(-x), comparisons)


def unsorted(comparisons):
    return lambda x: (x, comparisons)


def right(comparisons):
    return lambda x: (np.sort(x), comparisons)


def test_an_incidental_result_does_not_count_for_the_likeness():
    assert check(sorting([], descending=descending(3.0)), descending(7.0)).failure.like is None
    assert check(sorting(["comparisons"], descending=descending(3.0)), descending(7.0)).failure.like == "descending"


def test_an_incidental_result_counts_for_the_verdict():
    contract = sorting(["comparisons"], descending=descending(3.0))
    assert check(contract, right(7.0)).passed
    failure = check(contract, right(11.0)).failure
    assert (failure.message, failure.like) == ("comparisons: 11", None)


def test_an_incidental_result_does_not_count_on_the_other_cases_either():
    """Of two variants that are alike on the case that failed, the other one tells."""
    wrong = {"unsorted": unsorted(3.0), "descending": descending(3.0)}
    contract = sorting(["comparisons"], **wrong)
    assert check(contract, descending(7.0)).failure.like == "descending"
    assert check(contract, unsorted(7.0)).failure.like == "unsorted"


def test_an_incidental_result_explains_no_error_of_another():
    """Far from what the oracle has, as it may be, it does not widen what a wrong variant has to explain."""
    contract = replace(
        wide(None),
        oracle=lambda given: {"out": np.zeros(1), "aside": np.zeros(1)},
        call=lambda impl, given: {"out": impl(given["x"]), "aside": np.array([1e9])},
        compare={"aside": lambda given, got, want, tolerance: None},
        wrong={"only": Wrong(lambda x: np.array([2.5]), "the hint")},
        incidental=["aside"],
    )
    assert check(contract, lambda x: np.array([2.0])).failure.like == "only"
    assert check(contract, lambda x: np.array([1.6])).failure.like is None


def test_what_is_wrong_counts_for_the_likeness_even_if_it_is_incidental():
    contract = sorting(["comparisons"], wasteful=right(1000.0))
    assert check(contract, right(1000.0)).failure.like == "wasteful"
    assert check(contract, right(20.0)).failure.like is None


def test_on_case_and_on_failure_are_told_in_order():
    heard = []
    check(
        toy.SOFTMAX,
        toy.first_axis,
        on_case=lambda index, case: heard.append(index),
        on_failure=lambda failure: heard.append(failure.message.split(":")[0]),
    )
    assert heard == [0, 1, "out"]


def test_same_seed_same_verdict_other_seed_other_inputs():
    messages = [check(toy.SOFTMAX, toy.unnormalised, seed=seed).failure.message for seed in (0, 0, 1)]
    assert messages[0] == messages[1] != messages[2]


# --- numbers ---


@pytest.mark.parametrize(
    ("result", "want"),
    [
        (np.array([np.nan, np.inf, -np.inf, 1.0]), np.array([np.nan, np.inf, -np.inf, 1.0])),
        (np.zeros((0, 3)), np.zeros((0, 3))),
        (np.float32(2), np.array(2.0)),
        (3, np.array(3)),
        ([[1, 2], [3, 4]], np.array([[1.0, 2.0], [3.0, 4.0]])),
        (torch.tensor([1.5], dtype=torch.bfloat16, requires_grad=True), np.array([1.5])),
        (torch.tensor([True, False]), np.array([True, False])),
        (np.array([1 + 2j]), np.array([1 + 2j])),
    ],
    ids=["nan and infinities", "empty", "0-d", "python int", "nested list", "bfloat16", "bool", "complex"],
)
def test_equal_results_pass(result, want):
    assert verdict_on(result, want) is None


@pytest.mark.parametrize(
    ("result", "want", "says"),
    [
        (np.array([1.0, np.nan]), np.array([1.0, 2.0]), "largest error inf at [1]: nan, expected 2"),
        (np.array([1.0, 2.0]), np.array([1.0, np.nan]), "largest error inf at [1]: 2, expected nan"),
        (np.array([np.inf]), np.array([-np.inf]), "largest error inf at [0]: inf, expected -inf"),
        (np.array([1e300]), np.array([np.inf]), "largest error inf at [0]"),
        (np.array(2.0), np.array(3.0), "largest error 1: 2, expected 3"),
        (np.array([True, True]), np.array([True, False]), "largest error 1 at [1]"),
        (np.array([0], dtype=np.uint8), np.array([1], dtype=np.uint8), "largest error 1 at [0]"),
        (np.zeros((2, 3)), np.zeros((3, 2)), "shape (2, 3), expected (3, 2)"),
        (np.zeros((0, 3)), np.zeros((0, 2)), "shape (0, 3), expected (0, 2)"),
        (np.zeros(1), np.zeros(()), "shape (1,), expected ()"),
        (None, np.zeros(1), "None is not a rectangular array of numbers"),
        ([[1], [1, 2]], np.zeros((2, 2)), "list [[1], [1, 2]] is not a rectangular array of numbers"),
        ("text", np.zeros(1), "str 'text' is not a rectangular array of numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_different_results_fail(result, want, says):
    assert says in verdict_on(result, want)


def test_a_tolerance_that_is_nan_accepts_nothing():
    assert core.numeric({}, np.array([1.0]), np.array([1.0]), float("nan")) is not None


def test_hints_survive_booleans_and_infinities():
    want = np.array([True, False])
    flipped = constant(lambda: want, wrong={"flipped": Wrong(lambda: ~want, "the other way round")})
    assert check(flipped, lambda: ~want).failure.like == "flipped"
    infinite = constant(lambda: np.array([1.0]), wrong={"overflow": Wrong(lambda: np.array([np.inf]), "too large")})
    assert check(infinite, lambda: np.array([np.inf])).failure.like == "overflow"
    assert check(infinite, lambda: np.array([-np.inf])).failure.like is None


# --- conduct ---


def test_missing_result_is_named():
    contract = constant(lambda: 1.0, call=lambda impl, given: {"other": impl()})
    assert check(contract, lambda: 1.0).failure.message == "no result 'out'"


def test_mismatch_is_the_message():
    def call(impl, given):
        raise Mismatch("returned two values, expected one")

    assert check(constant(lambda: 1.0, call=call), lambda: 1.0).failure.message == "returned two values, expected one"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("two\nlines"), "raised ValueError: two lines"),
        (RecursionError(), "raised RecursionError"),
        (SystemExit(3), "raised SystemExit: 3"),
        (MemoryError(), "raised MemoryError"),
    ],
)
def test_exception_is_a_failure_with_its_place(error, says):
    def broken():
        raise error

    message = check(constant(lambda: 1.0), broken).failure.message
    assert message.startswith(says)
    assert "test_core.py:" in message
    assert "in broken: `raise error`" in message


def test_place_is_in_the_implementations_file_even_if_numpy_raised():
    def broken():
        return np.zeros(3).reshape(2, 2)

    assert "in broken: `return np.zeros(3).reshape(2, 2)`" in check(constant(lambda: 1.0), broken).failure.message


def test_exception_whose_message_cannot_be_printed():
    class Awkward(Exception):
        def __str__(self):
            raise RuntimeError

    def broken():
        raise Awkward

    assert "Awkward: (its message cannot be printed)" in check(constant(lambda: 1.0), broken).failure.message


def test_keyboard_interrupt_passes_through():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(constant(lambda: 1.0), interrupted)


def test_a_buffer_that_is_used_again_is_told():
    buffer = {}

    def cached(a, b):
        return torch.matmul(a, b, out=buffer.setdefault((a.dtype, a.shape[0], b.shape[1]), a.new_empty(0)))

    verdict = check(find("kernels.matmul"), cached)
    assert verdict.cases == 1
    assert "a second call changes what the first returned (c): return new memory each time" in str(verdict.failure)


def test_wrong_number_of_arguments_is_told_with_the_signature():
    verdict = check(toy.SOFTMAX, lambda x: x)
    assert "unexpected keyword argument 'temperature'; it is called as softmax(x, *, temp" in verdict.failure.message


def test_modified_argument_is_named():
    def greedy(x, *, temperature):
        out = toy.softmax(x, temperature=temperature)
        x[:] = 0
        return out

    assert check(toy.SOFTMAX, greedy).failure.message == "modified its argument x in place"


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        (np.array([np.nan]), np.array([np.nan]), True),
        (torch.zeros(2), torch.ones(2), False),
        ([np.zeros(2), 1], [np.zeros(2), 1], True),
        ([np.zeros(2)], [np.ones(2)], False),
        ({"a": np.zeros(2)}, {"a": np.zeros(2)}, True),
        ({"a": np.zeros(2)}, {}, False),
        ("text", "text", True),
        (1, 2, False),
        (float("nan"), float("nan"), True),
        (np.random.default_rng(0), np.random.default_rng(0), True),
    ],
)
def test_unchanged(before, after, same):
    assert core.unchanged(before, after) is same


def test_find_says_what_there_is():
    with pytest.raises(LookupError, match="no contracts for package 'nothing'"):
        find("nothing.at_all")
    with pytest.raises(LookupError, match="no contracts for package 'not a name'"):
        find("not a name.x")


def test_verdicts_compare_without_their_time():
    verdict = check(toy.SOFTMAX, toy.softmax)
    assert verdict == replace(verdict, seconds=99.0)
