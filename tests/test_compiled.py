"""What is compiled without counting references: it computes, counts nothing, and may not allocate."""

import numpy as np
import pytest
from numba import njit
from numba.core.errors import TypingError

from mlsys.compiled import prefetch, prefetch_second, uncounted


def total(x):
    found = 0.0
    for i in range(len(x)):
        row = x[i]
        for value in row:
            found += value
    return found


def with_scratch(x):
    room = np.empty(len(x), np.float32)
    for i in range(len(x)):
        room[i] = x[i].sum()
    return room.max()


def test_views_are_not_counted():
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    compiled = uncounted(cache=False)(total)  # of cached code there is nothing to look at
    assert compiled(x) == 66
    (code,) = compiled.inspect_llvm().values()
    assert "call void @NRT_incref" not in code


def test_an_allocation_is_refused():
    x = np.ones((3, 4), np.float32)
    assert njit(with_scratch)(x) == 4
    with pytest.raises(TypingError, match="Only accept returning of array passed into the function as argument"):
        uncounted()(with_scratch)(x)


@pytest.mark.parametrize("request_line", [prefetch, prefetch_second])
def test_a_request_changes_nothing_and_takes_numbers_of_any_width(request_line):
    @njit
    def asked(x, row, column):
        request_line(x, (row, column))
        return x[row, column]

    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert asked(x, np.int32(2), 1) == 9
    assert asked(x, 1, np.int32(3)) == 7
    (code, *_) = asked.inspect_llvm().values()
    assert "call void @llvm.prefetch" in code
