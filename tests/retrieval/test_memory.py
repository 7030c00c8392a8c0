"""Where arrays begin: at a cache line, whatever they were made of."""

import numpy as np
import pytest

from mlsys.retrieval import _memory, exact, exact_numba, hnsw_numba, ivf, ivf_numba


def begins(a):
    return a.ctypes.data % _memory.LINE == 0


@pytest.mark.parametrize("shape", [(0,), (3,), (0, 5), (7, 3), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int64])
def test_a_copy_begins_at_a_line(shape, dtype):
    a = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
    copy = _memory.copy(a)
    assert begins(copy) or not copy.size  # where nothing is, NumPy says what it likes
    assert copy.flags.c_contiguous
    assert copy.flags.writeable
    assert not np.shares_memory(a, copy)
    assert copy.dtype == a.dtype
    np.testing.assert_array_equal(copy, a)


def test_what_begins_at_a_line_is_not_copied():
    a = _memory.empty((10, 16), np.float32)
    a[:] = 1
    assert _memory.aligned(a) is a
    for other in (a[:, 1:], a[:, ::2], a.T, a.ravel()[1:]):
        moved = _memory.aligned(other)
        assert begins(moved)
        assert moved.flags.c_contiguous
        np.testing.assert_array_equal(moved, other)


def test_rows_are_those_that_were_asked_for():
    a = np.arange(12.0).reshape(4, 3)
    which = np.array([3, 0, 3])
    np.testing.assert_array_equal(_memory.rows(a, which), a[which])
    assert begins(_memory.rows(a, which))
    assert _memory.rows(a, which[:0]).shape == (0, 3)


@pytest.mark.parametrize("make", [exact.Exact, exact_numba.Exact, hnsw_numba.HNSW, ivf.IVF, ivf_numba.IVF])
def test_vectors_of_an_index_begin_at_a_line(make, tmp_path):
    rng = np.random.default_rng(0)
    x, queries = (rng.standard_normal((n, 16)).astype(np.float32) for n in (300, 7))
    small = {"n_lists": 4, "n_probe": 2} if make in (ivf.IVF, ivf_numba.IVF) else {}

    def vectors(index):
        if small:
            return index._lists.arrays["vectors"]
        return index.graph.vectors if make is hnsw_numba.HNSW else index._vectors.view

    index = make(**small).fit(x)
    assert begins(vectors(index))
    index.add(x[:200] + 1)
    assert begins(vectors(index))
    index.remove(np.arange(100, 150))
    assert begins(vectors(index))
    index.save(tmp_path / "index")
    loaded = make.load(tmp_path / "index")
    assert begins(vectors(loaded))
    wide = np.zeros((7, 17), np.float32)
    wide[:, 1:] = queries
    for asked in (queries, wide[:, 1:], np.asfortranarray(queries)):
        for a, b in zip(index.search(queries, 5), loaded.search(asked, 5), strict=True):
            np.testing.assert_array_equal(a, b)
