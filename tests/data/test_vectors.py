"""`mlsys.data.vectors`: the bundled sets, true neighbours and recall, and files of every kind, whole or not."""

import builtins
import logging
import re

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys.data import _vector_files, vectors
from mlsys.data.vectors import VectorData
from mlsys.retrieval import _index_file


def small(n=50, m=8, d=6, metric="l2", seed=0):
    rng = np.random.default_rng(seed)
    return VectorData(
        "small", rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(m, d)).astype(np.float32), metric
    )


def all_distances(data):
    """By three plain loops, float64."""
    found = np.empty((len(data.queries), len(data.base)))
    for i, q in enumerate(data.queries.astype(np.float64)):
        for j, x in enumerate(data.base.astype(np.float64)):
            dot = sum(a * b for a, b in zip(q, x, strict=True))
            norms = np.sqrt(sum(a * a for a in q) * sum(b * b for b in x))
            squared = sum((a - b) ** 2 for a, b in zip(q, x, strict=True))
            found[i, j] = {"l2": squared, "ip": -dot, "cosine": 1 - dot / norms}[data.metric]
    return found


# --- neighbours and recall --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_truth_and_distances_are_those_of_plain_loops(metric):
    data = small(metric=metric)
    want = all_distances(data)
    distances, ids = data.truth(7)
    assert (ids == np.argsort(want, axis=1)[:, :7]).all()
    np.testing.assert_allclose(distances, np.sort(want, axis=1)[:, :7], rtol=1e-5, atol=1e-6)
    everything = np.tile(np.arange(50), (8, 1))
    np.testing.assert_allclose(data.distances(everything), want, rtol=1e-12, atol=1e-12)


def test_distances_are_the_same_in_blocks_of_queries(monkeypatch):
    data = small(m=30)
    ids = np.random.default_rng(1).integers(-1, 50, size=(30, 5))
    whole = data.distances(ids)
    assert (np.isinf(whole) == (ids < 0)).all()
    wide = VectorData("wide", np.repeat(data.base, 40_000, axis=1), np.repeat(data.queries, 40_000, axis=1))
    np.testing.assert_allclose(wide.distances(ids), whole * 40_000, rtol=1e-12)  # four queries a block


def test_truth_comes_from_the_file_as_far_as_that_goes():
    data = small()
    ids = np.argsort(all_distances(data), axis=1)[:, :5].astype(np.int32)
    said = VectorData("said", data.base, data.queries, "l2", ids)
    assert said.truth(5)[1].dtype == np.int64
    assert (said.truth(5)[1] == ids).all()
    assert (said.truth(8)[1][:, :5] == ids).all()  # more than it has: searched for
    assert (said.truth(5)[0] == data.truth(5)[0]).all()
    assert said.first(40).neighbours is None  # of other vectors
    assert (said.first(queries=3).truth(5)[1] == ids[:3]).all()


def test_truth_is_searched_for_once(monkeypatch):
    from mlsys.retrieval import exact

    data = small()
    first = data.truth(3)
    monkeypatch.setattr(exact, "Exact", None)
    assert data.truth(3) is first


def test_recall_counts_by_distance_and_an_id_once():
    base = np.array([[0, 0], [1, 0], [1, 0], [0, 1], [5, 5]], np.float32)
    data = VectorData("ties", base, np.zeros((1, 2), np.float32))
    assert data.recall(np.array([[0, 1]])) == 1.0
    assert data.recall(np.array([[0, 3]])) == 1.0  # another id at the same distance
    assert data.recall(np.array([[0, 4]])) == 0.5
    assert data.recall(np.array([[0, 0]])) == 0.5
    assert data.recall(np.array([[-1, -1]])) == 0.0
    assert data.recall(np.array([[0, 4, 4]]), true=np.array([[0.0, 1.0, 1.0]])) == pytest.approx(1 / 3)
    assert data.recall(np.array([[0, 4, 1]]), 2) == 0.5  # only the first two are looked at
    assert data.recall(np.array([[4, 3]]), true=np.array([[60.0, 70.0]])) == 1.0


def test_recall_allows_a_thousandth_on_the_distance_not_on_its_square():
    base = np.array([[100.0], [100.0009], [100.01]], np.float32)
    data = VectorData("near", base, np.zeros((1, 1), np.float32))
    assert data.recall(np.array([[1]])) == 1.0
    assert data.recall(np.array([[2]])) == 0.0


def test_recall_of_fewer_vectors_than_asked_for():
    data = VectorData("few", np.eye(2, dtype=np.float32), np.ones((1, 2), np.float32))
    assert data.recall(np.array([[0, 1, -1]])) == 1.0
    assert data.recall(np.array([[0, -1, -1]])) == 0.5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"metric": "hamming"}, "metric must be one of"),
        ({"queries": np.zeros((3, 5), np.float32)}, "same d"),
        ({"queries": np.zeros((0, 6), np.float32)}, "there must be vectors and queries"),
        ({"neighbours": np.zeros((3, 2), np.int64)}, "one row for each query"),
        ({"neighbours": np.zeros((8, 2))}, "whole numbers"),
        ({"neighbours": np.full((8, 2), 50)}, "rows of the base, 0 to 49"),
        ({"neighbours": np.full((8, 2), -1)}, "rows of the base"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, match):
    data = small()
    fields = {"base": data.base, "queries": data.queries, "metric": "l2", "neighbours": None} | change
    with pytest.raises(ValueError, match=match):
        VectorData("odd", **fields)


def test_neighbours_of_other_vectors_are_refused():
    data = small()
    ids = np.argsort(all_distances(data), axis=1)[:, :5]
    VectorData("right", data.base, data.queries, "l2", ids)
    with pytest.raises(ValueError, match="not in order of their distance by l2"):
        VectorData("wrong", data.base[::-1], data.queries, "l2", ids)
    with pytest.raises(ValueError, match="by ip"):
        VectorData("wrong", data.base, data.queries, "ip", ids)


# --- the bundled sets -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def descriptors():
    return vectors.descriptors()


def test_descriptors_are_as_sift_has_them(descriptors):
    base, queries = descriptors.base, descriptors.queries
    assert base.dtype == queries.dtype == np.float32
    assert 225_000 < len(base) < 240_000
    assert queries.shape == (2000, 128)
    assert ((base >= 0) & (base <= 255) & (base == base.round())).all()
    length = np.linalg.norm(base, axis=1)
    assert (abs(length - 512) < 8).mean() > 0.99  # unit vectors, times 512, rounded
    assert len(vectors.descriptors(100)) == 100
    assert (vectors.descriptors(100).base == base[:100]).all()


def test_no_descriptor_is_there_twice_and_no_query_is_in_the_base(descriptors):
    rows = np.concatenate([descriptors.base, descriptors.queries]).astype(np.uint8)
    assert len(np.unique(rows.view("V128"))) == len(rows)


def test_descriptors_have_near_neighbours_as_random_vectors_have_not(descriptors):
    sample = descriptors.first(5000, 100)
    near = np.sqrt(sample.truth(1)[0]).mean()
    far = np.sqrt(sample.distances(np.tile(np.arange(100), (100, 1)))).mean()
    assert near < 0.6 * far


def test_descriptor_of_a_slope_points_up_the_slope():
    ramp = np.tile(np.arange(64, dtype=np.float32), (64, 1))  # brighter to the right: direction 0, in every cell
    found = vectors._dense_sift(5 * ramp, 4)
    assert found.shape[1] == 128
    cells = found.reshape(-1, 16, 8)
    assert (cells[:, :, 0] > 100).all()
    assert not cells[:, :, 1:].any()
    down = vectors._dense_sift(-5 * ramp.T, 4).reshape(-1, 16, 8)  # darker downwards: direction 3/4 of a turn
    assert not down[:, :, [0, 1, 2, 3, 4, 5, 7]].any()
    assert not len(vectors._dense_sift(0 * ramp, 4))  # flat: nothing to describe


def test_digits():
    data = vectors.digits()
    assert data.base.shape == (1497, 64)
    assert data.queries.shape == (300, 64)
    assert data.base.max() == 16


WORDS = [
    f"{animal} {verb} {place}" for animal in ("cat", "dog", "owl") for verb in ("sits", "runs") for place in "abcd"
]


def test_latent_vectors_keep_the_cosines_of_tf_idf_when_nothing_is_cut_off():
    texts = [f"{text} " * (1 + i % 3) for i, text in enumerate(WORDS)]
    terms = sorted({term for text in texts for term in text.split() if term != "a"})  # a stop word
    counts = np.array([[text.split().count(term) for term in terms] for text in texts])
    idf = np.log((1 + len(texts)) / (1 + (counts > 0).sum(axis=0)))
    full = np.where(counts > 0, (1 + np.log(np.maximum(counts, 1))) * idf, 0)
    full /= np.linalg.norm(full, axis=1, keepdims=True)
    rank = np.linalg.matrix_rank(full)
    got = vectors._reduced(texts, int(rank))
    np.testing.assert_allclose(got @ got.T, full @ full.T, atol=1e-5)
    assert (np.diff((got**2).sum(axis=0)) <= 1e-6).all()  # the strongest direction first


def test_latent_is_by_cosine_and_has_no_zero_vector():
    data = vectors.latent(16)
    assert data.metric == "cosine"
    assert data.dim == 16
    assert len(data) > 3000
    assert len(data.queries) == 500
    assert (np.linalg.norm(data.base, axis=1) > 0).all()


@pytest.mark.parametrize("dim", [0, 24, 1000])
def test_more_dimensions_than_texts_or_words_are_refused(dim):
    with pytest.raises(ValueError, match="dim must be at least 1 and below"):
        vectors._reduced(WORDS, dim)


def test_sets_are_kept_and_a_damaged_cache_is_made_again(tmp_path, caplog):
    made = []

    def make():
        made.append(1)
        return np.arange(6, dtype=np.uint8).reshape(3, 2), np.ones((1, 2), np.uint8)

    def kept():
        base, queries = vectors._kept("toy", tmp_path, make)
        assert base.dtype == queries.dtype == np.float32
        assert base.tolist() == [[0, 1], [2, 3], [4, 5]]

    caplog.set_level(logging.WARNING)
    kept()
    kept()
    assert len(made) == 1
    (arrays,) = (tmp_path / "toy").glob("*.safetensors")
    for damage in (lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])):
        arrays.write_bytes(damage(arrays.read_bytes()))
        kept()
    assert len(made) == 3
    assert caplog.text.count("making the vectors again") == 2
    (tmp_path / "toy" / _index_file.MANIFEST).write_text("{")
    kept()
    kept()
    assert len(made) == 4


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    base, _ = vectors._kept("toy", tmp_path / "file", lambda: (np.ones((2, 2)), np.ones((1, 2))))
    assert base.shape == (2, 2)
    assert "they will be made again" in caplog.text


def test_load_knows_sets_and_files(tmp_path):
    assert vectors.load("digits").name == "digits"
    assert vectors.load("digits", metric="cosine").metric == "cosine"
    np.save(tmp_path / "x.npy", np.ones((20, 3)))
    assert vectors.load(str(tmp_path / "x.npy")).name == "x.npy"


# --- files ------------------------------------------------------------------------------------------------------------


def write_vecs(path, x, element):
    rows = [np.int32(x.shape[1]).tobytes() + row.astype(element).tobytes() for row in x]
    path.write_bytes(b"".join(rows))
    return path


@pytest.mark.parametrize(("ending", "element"), [("fvecs", "<f4"), ("ivecs", "<i4"), ("bvecs", "u1")])
@given(n=st.integers(1, 9), d=st.integers(1, 9), seed=st.integers(0, 99))
def test_vecs_give_back_what_was_written_and_any_cut_is_noticed(tmp_path_factory, ending, element, n, d, seed):
    x = np.random.default_rng(seed).integers(0, 200, size=(n, d)).astype(element)
    path = write_vecs(tmp_path_factory.mktemp("vecs") / f"x.{ending}", x, element)
    got = _vector_files.array(path)
    assert got.dtype == np.dtype(element)
    assert (got == x).all()
    whole = path.read_bytes()
    row = len(whole) // n
    for cut in {0, 1, 3, len(whole) - 1, len(whole) - row + 2} - {len(whole)}:
        if cut % row or cut == 0:
            path.write_bytes(whole[:cut])
            with pytest.raises(ValueError, match="truncated"):
                _vector_files.array(path)


def test_vecs_of_two_dimensions_are_refused(tmp_path):
    path = tmp_path / "x.bvecs"
    path.write_bytes(b"\x02\0\0\0ab" + b"\x03\0\0\0cd")
    with pytest.raises(ValueError, match="vector 0 has dimension 2, vector 1 has 3"):
        vectors.read(path)


@pytest.mark.parametrize("dim", [0, -5, 1 << 30])
def test_vecs_of_no_sensible_dimension_are_refused(tmp_path, dim):
    path = tmp_path / "x.fvecs"
    path.write_bytes(np.int32(dim).tobytes() * 4)
    with pytest.raises(ValueError, match=f"first vector would have dimension {dim}"):
        vectors.read(path)


def test_texmex_files_lie_beside_each_other(tmp_path):
    data = small()
    base = write_vecs(tmp_path / "sift_base.fvecs", data.base, "<f4")
    write_vecs(tmp_path / "sift_query.fvecs", data.queries, "<f4")
    got = vectors.read(base)
    assert (got.base == data.base).all()
    assert (got.queries == data.queries).all()
    assert got.neighbours is None
    write_vecs(tmp_path / "sift_groundtruth.ivecs", data.truth(5)[1], "<i4")
    got = vectors.read(base)
    assert (got.neighbours == data.truth(5)[1]).all()
    assert got.name == "sift_base.fvecs"
    assert vectors.read(base, metric="ip").neighbours is None
    write_vecs(tmp_path / "sift_groundtruth.ivecs", data.truth(5)[1] + 40, "<i4")
    with pytest.raises(ValueError, match=r"sift_base\.fvecs: neighbours must be rows of the base"):
        vectors.read(base)


def test_a_file_without_queries_gives_some_up(tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 3))
    np.save(tmp_path / "x.npy", x)
    data = vectors.read(tmp_path / "x.npy", metric="cosine")
    assert data.base.shape == (36, 3)
    assert data.queries.shape == (4, 3)
    assert data.metric == "cosine"
    together = np.concatenate([data.base, data.queries])
    assert sorted(map(tuple, together)) == sorted(map(tuple, x.astype(np.float32)))
    assert (vectors.read(tmp_path / "x.npy").base == data.base).all()  # the same each time
    np.save(tmp_path / "one.npy", x[:1])
    with pytest.raises(ValueError, match="one vector is too few"):
        vectors.read(tmp_path / "one.npy")


@pytest.mark.parametrize(
    "x", [np.ones(3), np.ones((0, 3)), np.ones((2, 2, 2)), np.array([["a"]]), np.ones((2, 2), complex)]
)
def test_npy_of_other_things_is_refused(tmp_path, x):
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match=r"must hold numbers \(n, d\)"):
        vectors.read(tmp_path / "x.npy")


def test_npy_that_is_damaged_truncated_or_a_pickle_is_refused(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.ones((20, 3)))
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:40], b"", b"nonsense" * 20):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="damaged or truncated"):
            vectors.read(path)
    np.save(path, np.array([{"a": 1}], object))
    with pytest.raises(ValueError, match="damaged or truncated"):
        vectors.read(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39])
def test_vectors_that_are_not_finite_are_refused(tmp_path, bad):
    x = np.ones((20, 3))
    x[7, 1] = bad
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match=r"x\.npy: vector 7 holds NaN or infinity"):
        vectors.read(tmp_path / "x.npy")


def write_hdf5(path, data, distance="euclidean", **others):
    arrays = {"train": data.base, "test": data.queries} | others
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            if array is not None:
                file[name] = array
        if distance is not None:
            file.attrs["distance"] = distance
    return path


@pytest.mark.parametrize(("said", "metric"), [("euclidean", "l2"), ("angular", "cosine"), ("ip", "ip"), (None, "l2")])
def test_hdf5_of_ann_benchmarks(tmp_path, said, metric):
    data = small(metric=metric)
    path = write_hdf5(tmp_path / "x.hdf5", data, said, neighbors=data.truth(5)[1], distances=data.truth(5)[0])
    got = vectors.read(path)
    assert got.metric == metric
    assert (got.base == data.base).all()
    assert (got.queries == data.queries).all()
    assert (got.neighbours == data.truth(5)[1]).all()
    other = "ip" if metric != "ip" else "l2"
    assert vectors.read(path, metric=other).neighbours is None
    assert vectors.read(path, metric=metric).neighbours is not None


def test_hdf5_with_its_metric_as_bytes_under_another_name(tmp_path):
    path = write_hdf5(tmp_path / "x.h5", small(), None)
    with h5py.File(path, "a") as file:
        file.attrs["metric"] = np.bytes_(b"angular")
    assert vectors.read(path).metric == "cosine"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"train": None}, "has no array 'train'"),
        ({"test": None}, "has no array 'test'"),
        ({"distance": "jaccard"}, "its distance is 'jaccard'; known are euclidean"),
        ({"train": np.ones(9)}, r"train must hold numbers \(n, d\), got float64 \(9,\)"),
        ({"test": np.ones((3, 5))}, "same d"),
        ({"neighbors": np.full((8, 3), 77)}, "neighbours must be rows of the base"),
        ({"neighbors": np.zeros((2, 3), int)}, "one row for each query"),
    ],
)
def test_hdf5_that_is_none_of_theirs_is_refused(tmp_path, change, match):
    path = write_hdf5(tmp_path / "x.hdf5", small(), **change)
    with pytest.raises(ValueError, match=match):
        vectors.read(path)


def test_hdf5_that_is_truncated_or_something_else_is_refused(tmp_path):
    path = write_hdf5(tmp_path / "x.hdf5", small(n=500))
    whole = path.read_bytes()
    for data in (whole[:-1], whole[: len(whole) // 2], whole[:100], b"", b"nonsense" * 50):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="damaged or truncated"):
            vectors.read(path)
    with h5py.File(path, "w") as file:
        file.create_group("train")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        vectors.read(path)


def test_hdf5_without_h5py_names_the_remedy(tmp_path, monkeypatch):
    path = write_hdf5(tmp_path / "x.hdf5", small())
    real = builtins.__import__

    def without(name, *rest):
        if name == "h5py":
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mlsys-reference\[bench\]'"):
        vectors.read(path)


def test_files_that_are_not_there_or_of_another_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        vectors.read(tmp_path / "x.fvecs")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(FileNotFoundError, match="is a folder"):
        vectors.read(tmp_path / "folder.npy")
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"end in \.hdf5, \.h5, \.fvecs, \.ivecs, \.bvecs, \.npy"):
        vectors.read(tmp_path / "x.csv")
