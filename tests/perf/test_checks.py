"""`mlsys.perf._checks`: which numbers the public doors let in."""

import math

import numpy as np
import pytest

from mlsys.perf._checks import amount, known, whole


@pytest.mark.parametrize("value", [8, np.int64(8), np.int8(8), np.uint16(8)])
def test_whole_gives_an_int_of_pythons(value):
    got = whole("n", value)
    assert got == 8
    assert type(got) is int
    assert got**30 == 8**30  # NumPy's would have wrapped around


@pytest.mark.parametrize("value", [True, np.True_, 8.0, np.float64(8), "8", None, 8j])
def test_what_is_not_a_whole_number_is_refused(value):
    with pytest.raises(TypeError, match="n must be a whole number, got "):
        whole("n", value)


def test_whole_numbers_below_the_least_are_refused():
    assert whole("n", np.int64(0), at_least=0) == 0
    with pytest.raises(ValueError, match=r"n must be at least 1, got 0$"):
        whole("n", np.int64(0))


def test_amounts():
    assert amount("x", 0) == 0
    assert amount("x", 2.5, positive=True) == 2.5
    assert amount("x", np.float32(2.5)) == 2.5
    for value in (-1, math.nan, math.inf, np.int64(-3)):
        with pytest.raises(ValueError, match="x must be at least 0 and finite, got"):
            amount("x", value)
    with pytest.raises(ValueError, match="x must be positive and finite, got 0"):
        amount("x", 0, positive=True)
    with pytest.raises(TypeError, match="x must be a number, got '3'"):
        amount("x", "3")


def test_a_number_too_large_for_a_float_is_a_value_error():
    with pytest.raises(ValueError, match="x must be finite, got a whole number beyond the largest float"):
        amount("x", 10**400)


def test_known_names_the_nearest():
    assert known("kind", "ring", ["ring", "tree"]) == "ring"
    with pytest.raises(ValueError, match="kind='rnig' is not known; did you mean 'ring'"):
        known("kind", "rnig", ["ring", "tree"])
