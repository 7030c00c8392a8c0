"""What is compiled without counting references: it computes, counts nothing, and may not allocate."""

import numpy as np
import pytest
from numba import njit
from numba.core.errors import TypingError

from mlsys.compiled import uncounted


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
