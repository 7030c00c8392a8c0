"""`mlsys.retrieval.pq` and `pq_numba`: distances are those of decoded vectors; a rotation helps."""

import numpy as np
import pytest

from mlsys.contracts._retrieval_exact import distances
from mlsys.contracts.core import check
from mlsys.contracts.retrieval import CONTRACTS
from mlsys.retrieval import exact, pq, pq_numba

CONTRACT = CONTRACTS["pq"]


@pytest.fixture(params=[pq.PQ, pq_numba.PQ], ids=["pq", "pq_numba"], name="PQ")
def implementation(request):
    return request.param


def mixed(n, seed=0, d=16):
    """Gaussian vectors with correlated coordinates of unequal spread."""
    axes = np.linalg.qr(np.random.default_rng(9).standard_normal((d, d)))[0] * np.exp(-np.arange(d) / 4)[:, None]
    return (np.random.default_rng(seed).standard_normal((n, d)) @ axes).astype(np.float32)


def equal(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize(("m", "bits", "opq"), [(4, 5, False), (8, 3, True), (16, 1, False)])
def test_distances_are_those_of_the_decoded_vectors(PQ, metric, m, bits, opq):
    x, queries = mixed(500), mixed(20, 1)
    index = PQ(metric, m, bits, opq).fit(x)
    near = index.decode(index.codes_)
    if metric == "cosine":
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        true = 1 + distances("ip", queries, near)
    else:
        true = distances(metric, queries, near)
    found, ids = index.search(queries, 500)
    np.testing.assert_allclose(found, np.take_along_axis(true, ids, axis=1), atol=1e-5)
    np.testing.assert_allclose(found, np.sort(true, axis=1), atol=1e-5)


@pytest.mark.parametrize("m", [2, 8, 16])  # 8 and 16 codes are read as words
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_compiled_equals_readable(metric, m):
    x, queries = mixed(1111), mixed(30, 1)
    plain, fast = (module.PQ(metric, m, 4, m == 8).fit(x, np.arange(1111)[::-1]) for module in (pq, pq_numba))
    mask = np.random.default_rng(0).random(len(x)) < 0.3
    for k in (1, 10, 2000):
        equal(plain.search(queries, k), fast.search(queries, k))
        equal(plain.search(queries, k, filter=mask), fast.search(queries, k, filter=mask))


def test_codes_are_the_nearest_centroids():
    index = pq.PQ(m=4, bits=4).fit(mixed(300))
    parts = mixed(300).reshape(300, 4, 4)
    true = ((parts[:, :, None] - index.quantizer_.codebooks) ** 2).sum(3)
    np.testing.assert_allclose(
        np.take_along_axis(true, index.codes_[:, :, None].astype(int), 2)[..., 0], true.min(2), atol=1e-5
    )
    np.testing.assert_array_equal(index.encode(index.decode(index.codes_)), index.codes_)


def test_more_parts_find_more():
    x, queries = mixed(2000), mixed(100, 1)
    want = exact.Exact().fit(x).search(queries, 1)[1]
    found = [(pq.PQ(m=m, bits=4).fit(x).search(queries, 10)[1] == want).any(axis=1).mean() for m in (1, 4, 16)]
    assert found[0] < found[1] < found[2]
    assert found[2] > 0.95


def test_a_learned_rotation_is_a_rotation_and_lowers_the_distortion():
    x = mixed(2000)
    plain, turned = pq.PQ(m=4, bits=5).fit(x), pq.PQ(m=4, bits=5, opq=True).fit(x)
    rotation = turned.quantizer_.rotation
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(16), atol=1e-5)
    worse, better = (((x - i.decode(i.codes_)) ** 2).sum(1).mean() for i in (plain, turned))
    assert better < 0.8 * worse


def test_balanced_axes_vary_alike_in_all_parts():
    x = mixed(3000)
    axes = pq.balanced_axes(x, 4)
    np.testing.assert_allclose(axes.T @ axes, np.eye(16), atol=1e-5)
    products = np.log((x @ axes).var(axis=0)).reshape(4, 4).sum(axis=1)
    assert np.ptp(products) < 1.5
    assert np.ptp(np.sort(np.log((x @ axes).var(axis=0)))[::-1].reshape(4, 4).sum(axis=1)) > 5


def test_a_vector_takes_its_code(PQ):
    index = PQ(m=8, bits=4).fit(mixed(100))
    before = index.nbytes
    index.add(mixed(50, 1))  # the room for codes and ids gets half as large again
    assert index.nbytes - before == 50 * (index.code_bytes + 8)
    assert index.codes_.shape == (150, 8)


def test_bad_settings_and_codes_are_refused(PQ):
    for settings, error, message in (
        ({"bits": 9}, ValueError, "bits must be at least 1 and at most 8, got 9"),
        ({"m": 0}, ValueError, "m must be"),
        ({"opq": 1}, TypeError, "opq must be True or False"),
    ):
        with pytest.raises(error, match=message):
            PQ(**settings)
    with pytest.raises(ValueError, match="m = 5 must divide"):
        PQ(m=5).fit(mixed(300))
    with pytest.raises(ValueError, match="bits = 8 needs at least 256"):
        PQ(m=4).fit(mixed(255))
    with pytest.raises(ValueError, match="no vectors yet"):
        PQ(m=4).encode(mixed(2))
    index = PQ(m=4, bits=3).fit(mixed(100))
    with pytest.raises(ValueError, match="codes hold 8, but with bits = 3"):
        index.decode(np.full((1, 4), 8, np.uint8))
    with pytest.raises(ValueError, match=r"codes must be uint8 \(n, 4\)"):
        index.decode(np.zeros((1, 3), np.uint8))
    with pytest.raises(ValueError, match="numbers up to"):
        index.search(np.full((1, 16), 1e20))


@pytest.mark.parametrize("name", ["pq", "pq_numba"])
@pytest.mark.parametrize("seed", range(2))
def test_contract_accepts_the_reference(name, seed):
    verdict = check(CONTRACTS[name], CONTRACTS[name].reference, seed=seed)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("wrong", sorted(CONTRACT.wrong))
def test_contract_names_the_wrong_variant(wrong):
    failure = check(CONTRACT, CONTRACT.wrong[wrong].impl, seed=1).failure
    assert failure is not None
    assert failure.like == wrong
