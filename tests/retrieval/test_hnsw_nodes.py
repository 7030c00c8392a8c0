"""Which node has this vector: against a dictionary."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys.retrieval import _hnsw_nodes
from mlsys.retrieval._hnsw_nodes import NodeTable


@pytest.mark.parametrize("clash", [False, True])
@settings(deadline=None, max_examples=60)
@given(steps=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 40), st.booleans()), min_size=1, max_size=12))
def test_against_a_dictionary(clash, steps):
    """clash: all vectors have one of three hashes."""
    with pytest.MonkeyPatch.context() as patch:
        if clash:
            patch.setattr(_hnsw_nodes, "_hashes", lambda x: (int(row.sum()) % 3 for row in x))
        table, vectors, node_of = NodeTable(), np.empty((0, 2), np.float32), {}
        for seed, n, remove in steps:
            rng = np.random.default_rng(seed)
            if remove:
                gone = rng.random(len(vectors)) < 0.4
                table.renumber(gone)
                vectors = vectors[~gone]
                node_of = {tuple(vector): node for node, vector in enumerate(vectors.tolist())}
                continue
            x = rng.integers(0, 8, (n, 2)).astype(np.float32)
            nodes, new = table.enter(x, vectors)
            assert len(new) == len({tuple(row) for row in x.tolist()} - node_of.keys())
            assert nodes.tolist() == [node_of.setdefault(tuple(row), len(node_of)) for row in x.tolist()]
            vectors = np.concatenate([vectors, x[new]])
            assert len(vectors) == len(node_of)
            assert 2 * table._taken <= len(table._places)


def test_memory_is_a_few_bytes_a_node():
    x = np.arange(3000, dtype=np.float32)[:, None]
    table = NodeTable()
    table.enter(x[:1000], x[:0])
    for row in range(1000, 3000):
        table.enter(x[row : row + 1], x[:row])
    assert 8 * 3000 <= table.nbytes <= 16 * 3000
    for row in range(0, 3000, 7):
        nodes, new = table.enter(x[row : row + 1], x)
        assert nodes.tolist() == [row]
        assert not new


def test_hashes_spread():
    """Small integers, whose last bits as floats are all 0, and vectors that differ in one place."""
    rng = np.random.default_rng(0)
    some = rng.integers(0, 4, (4000, 16)).astype(np.float32)
    one = np.zeros((4000, 16), np.float32)
    one[:, 7] = np.arange(4000)
    for x in (np.unique(some, axis=0), one):
        hashes = np.array(list(_hnsw_nodes._hashes(x)))
        for last in (255, 4095):
            _, counts = np.unique(hashes & last, return_counts=True)
            assert counts.max() < 10 + 3 * len(x) / last
        assert list(_hnsw_nodes._hashes(x[:5])) == hashes[:5].tolist()
