"""`mlsys.retrieval.ivfpq` and `ivfpq_numba`: three terms make the distance to the decoded vector."""

import numpy as np
import pytest

from mlsys.contracts._retrieval_exact import distances
from mlsys.contracts.core import check
from mlsys.contracts.retrieval import CONTRACTS
from mlsys.retrieval import exact, ivfpq, ivfpq_numba, pq

CONTRACT = CONTRACTS["ivfpq"]


@pytest.fixture(params=[ivfpq.IVFPQ, ivfpq_numba.IVFPQ], ids=["ivfpq", "ivfpq_numba"], name="IVFPQ")
def implementation(request):
    return request.param


def groups(n, seed=0, d=16, far=0.0):
    rng = np.random.default_rng(seed)
    centres = 4 * np.random.default_rng(9).standard_normal((20, d))
    return (centres[rng.integers(0, 20, n)] + rng.standard_normal((n, d)) + far).astype(np.float32)


def equal(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize(("m", "bits", "opq"), [(4, 5, False), (8, 3, True)])
def test_distances_are_those_of_the_decoded_vectors(IVFPQ, metric, m, bits, opq):
    x, queries = groups(600), groups(20, 1)
    index = IVFPQ(metric, n_lists=10, m=m, bits=bits, opq=opq, n_probe=10).fit(x)
    near = index.reconstruct()
    if metric == "cosine":
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        true = 1 + distances("ip", queries, near)
    else:
        true = distances(metric, queries, near)
    found, ids = index.search(queries, 600)
    limit = 1e-6 * np.abs(true).max() + 1e-6
    np.testing.assert_allclose(found, np.take_along_axis(true, ids, axis=1), rtol=0, atol=limit)
    np.testing.assert_allclose(found, np.sort(true, axis=1), rtol=0, atol=limit)


def test_far_from_the_origin_the_terms_do_not_cancel(IVFPQ):
    far = 1000.0
    x, queries = groups(600, far=far), groups(20, 1, far=far)
    index = IVFPQ(n_lists=10, m=8, bits=4, n_probe=10).fit(x)
    found, ids = index.search(queries, 10)
    true = np.take_along_axis(distances("l2", queries, index.reconstruct()), ids, axis=1)
    np.testing.assert_allclose(found, true, atol=0.02)  # x̂ itself is rounded to 6e-5 in each coordinate


@pytest.mark.parametrize("m", [4, 8])
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_compiled_equals_readable(metric, m):
    x, queries = groups(1500), groups(30, 1)
    plain, fast = (
        module.IVFPQ(metric, n_lists=30, m=m, bits=4, opq=m == 8, n_probe=5).fit(x) for module in (ivfpq, ivfpq_numba)
    )
    for index in (plain, fast):
        index.remove(np.arange(0, 1500, 7))
        index.add(groups(40, 2))
    mask = np.random.default_rng(0).random(len(plain)) < 0.5
    few = np.arange(len(plain)) % 40 == 0
    for k in (1, 10, 2000):
        equal(plain.search(queries, k), fast.search(queries, k))
        equal(plain.search(queries, k, filter=mask), fast.search(queries, k, filter=mask))
        equal(plain.search(queries, k, filter=few), fast.search(queries, k, filter=few))
    assert (fast.search(queries, 10, filter=few)[1] >= 0).all()  # few are looked for in all lists


def test_residuals_are_coded_finer_than_vectors():
    x = groups(2000)
    lists, alone = ivfpq.IVFPQ(n_lists=20, m=4, bits=4, n_probe=4).fit(x), pq.PQ(m=4, bits=4).fit(x)
    fine, coarse = (((x - near) ** 2).sum(1).mean() for near in (lists.reconstruct(), alone.decode(alone.codes_)))
    assert fine < 0.6 * coarse
    want = exact.Exact().fit(x).search(x[:100] + 0.1, 1)[1]
    found = [(index.search(x[:100] + 0.1, 1)[1] == want).mean() for index in (lists, alone)]
    assert found[0] > found[1] + 0.2


def test_counts_what_is_compared(IVFPQ):
    x = groups(500)
    index = IVFPQ(n_lists=20, m=4, bits=3, n_probe=3).fit(x)
    assert index.distances_per_query(x[:9], n_probe=20) == 520
    assert index.code_bytes == 4


def test_bad_settings_are_refused(IVFPQ):
    with pytest.raises(ValueError, match="n_probe must be at least 1 and at most 4"):
        IVFPQ(n_lists=4, n_probe=5)
    with pytest.raises(ValueError, match="bits must be at least 1 and at most 8"):
        IVFPQ(bits=9)
    for settings, message in (
        ({"m": 5}, "m = 5 must divide"), ({"m": 4}, "bits = 8 needs"), ({"m": 4, "bits": 2}, "n_lists = 128 needs"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            IVFPQ(**settings).fit(groups(100))


@pytest.mark.parametrize("name", ["ivfpq", "ivfpq_numba"])
@pytest.mark.parametrize("seed", range(2))
def test_contract_accepts_the_reference(name, seed):
    verdict = check(CONTRACTS[name], CONTRACTS[name].reference, seed=seed)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("wrong", sorted(CONTRACT.wrong))
def test_contract_names_the_wrong_variant(wrong):
    failure = check(CONTRACT, CONTRACT.wrong[wrong].impl, seed=1).failure
    assert failure is not None
    assert failure.like == wrong
