"""Real vectors that every machine has, and the reader for those that you bring: what nearest-neighbour search runs on.

Random vectors say little about an index: in many dimensions all of them are
nearly as far from each other. What real data have, and an index lives on, is
that neighbours are much nearer than the rest. Three sets need no download:

    descriptors   about 233,000 SIFT-style descriptors of the two photos that scikit-learn brings, 128 dimensions
    latent        the standard library's docstrings as TF-IDF, reduced to 128 dimensions by a truncated SVD
    digits        1,797 images of handwritten digits, 64 dimensions; for a first try

A descriptor says in which directions the brightness changes around a point: 4 × 4
cells of a patch, 8 directions in each, weighted by how strong the change is, then
brought to length 1, cut off at 0.2 (so that one hard edge does not decide alone),
brought to length 1 again and rounded to bytes. Here they are taken on a dense grid
at three scales, rather than at chosen points, so that two photos give enough.

Queries are held out of the same set and are not in the base. `read` takes the
field's files: HDF5 as ann-benchmarks publishes it, fvecs, ivecs, bvecs and npy.

    >>> data = descriptors(10_000)
    >>> distances, ids = data.truth(10)     # of the exact search
    >>> data.recall(ids)
    1.0

Cost:
    Descriptors take some seconds, once, and the reduced docstrings about as long: they are kept in the user's cache
    folder (as in `mlsys.data.docs`). True neighbours cost 2·n·d·q FLOPs for q queries, once for each `VectorData`.

Memory:
    4 bytes a number: 120 MB for all descriptors, which lie as bytes in the cache.

Papers:
    Lowe 2004, "Distinctive Image Features from Scale-Invariant Keypoints", section 6.1 (the descriptor).
    Deerwester et al. 1990, "Indexing by Latent Semantic Analysis" (documents in the space of a truncated SVD).
    Aumüller, Bernhardsson & Faithfull 2017, arXiv:1807.05614 (ann-benchmarks: its files, and recall by distance).

See also:
    `mlsys.retrieval.exact` (the true neighbours), `mlsys.data.docs` (the docstrings), `mlsys.bench.neighbours`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mlsys.data import _vector_files, docs
from mlsys.files import cache_folder
from mlsys.retrieval import _index_file

log = logging.getLogger(__name__)

KIND = "mlsys.vectors/1"  # raise the number when the same source gives other vectors: old caches are then not read
METRICS = ("l2", "ip", "cosine")  # as in mlsys.retrieval
HELD_OUT = 2000  # queries, of the large sets
SCALES = ((1.0, 3), (1.6, 4), (2.5, 6))  # how much a photo is blurred (σ), and the size of a cell in pixels
FLAT = 2.0  # a patch with less change than this has no direction worth describing
TOLERANCE = 1e-3  # on a distance, when recall is counted


@dataclass(frozen=True)
class VectorData:
    """Vectors to search, queries, and the metric that they are meant for.

    name:       "descriptors", or the name of the file.
    base:       (n, d) float32; the id of a vector is its row.
    queries:    (m, d) float32.
    metric:     "l2", "ip" or "cosine".
    neighbours: ids of the true neighbours (m, any), nearest first, where the file has them.
    """

    name: str
    base: np.ndarray
    queries: np.ndarray
    metric: str = "l2"
    neighbours: np.ndarray | None = None
    _truth: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check what would otherwise fail deep within a search."""
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {self.metric!r}")
        shapes = self.base.shape, self.queries.shape
        if self.base.ndim != 2 or self.queries.ndim != 2 or self.base.shape[1] != self.queries.shape[1]:
            raise ValueError(f"base and queries must be (n, d) and (m, d) with the same d, got {shapes[0]} {shapes[1]}")
        if not len(self.base) or not len(self.queries):
            raise ValueError(f"{self.name}: there must be vectors and queries, got shapes {shapes[0]} and {shapes[1]}")
        if self.neighbours is not None:
            self._check_neighbours(self.neighbours)

    def __len__(self) -> int:
        """How many vectors there are to search."""
        return len(self.base)

    @property
    def dim(self) -> int:
        """The dimension d."""
        return int(self.base.shape[1])

    def first(self, n: int | None = None, queries: int | None = None) -> VectorData:
        """Only the first `n` vectors and the first so many `queries`; all where None, or where there are no more.

        The bundled sets are in random order, so that the first of them are a sample.
        """
        base, asked = self.base[:n], self.queries[:queries]
        kept = None if self.neighbours is None or len(base) < len(self.base) else self.neighbours[: len(asked)]
        return replace(self, base=base, queries=asked, neighbours=kept, _truth={})

    def truth(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances (m, k) and ids (m, k) of the `k` true neighbours: from the file, else by exact search, once."""
        if k not in self._truth:
            if self.neighbours is not None and self.neighbours.shape[1] >= k:
                ids = self.neighbours[:, :k].astype(np.int64)
                self._truth[k] = self.distances(ids).astype(np.float32), ids
            else:
                from mlsys.retrieval.exact import Exact

                self._truth[k] = Exact(metric=self.metric).fit(self.base).search(self.queries, k)
        return self._truth[k]

    def distances(self, ids: np.ndarray) -> np.ndarray:
        """The true distances (m, k), float64, of the first m queries to these vectors; ∞ where the id is −1.

        Squared for l2, −q·x for ip, 1 − cos for cosine, as everywhere in `mlsys.retrieval`.
        """
        found = np.empty(ids.shape)
        step = max(1, (1 << 22) // max(1, ids.shape[1] * self.dim))
        for start in range(0, len(ids), step):
            q = self.queries[start : start + step][: len(ids) - start, None].astype(np.float64)
            x = self.base[ids[start : start + step]].astype(np.float64)  # row −1 is there, and is not looked at
            if self.metric == "l2":
                near = ((q - x) ** 2).sum(-1)
            else:
                near = -(q * x).sum(-1)
                if self.metric == "cosine":
                    near = 1 + near / (np.linalg.norm(q, axis=-1) * np.linalg.norm(x, axis=-1))
            found[start : start + step] = near
        found[ids < 0] = np.inf
        return found

    def recall(self, ids: np.ndarray, k: int | None = None, *, true: np.ndarray | None = None) -> float:
        """The share of the `k` true neighbours that a search found; ids: (m, ≥ k) of the first m queries; k: all.

        Counted as ann-benchmarks counts, by distance: what is found is right if it is no farther than the k-th true
        neighbour + 0.001. By id, one of two vectors at the same distance would be wrong. An id counts once.

        true: distances (m, k) of the true neighbours, in place of `truth(k)`.
        """
        k = k or ids.shape[1]
        true = (self.truth(k)[0] if true is None else true[:, :k])[: len(ids)].astype(np.float64)
        last = np.where(np.isfinite(true), true, -np.inf).max(axis=1)
        found = self.distances(ids[:, :k])
        if self.metric == "l2":
            last, found = np.sqrt(np.maximum(last, 0)), np.sqrt(found)
        right = found <= last[:, None] + TOLERANCE
        order = np.argsort(ids[:, :k], axis=1, kind="stable")
        ordered, counts = np.take_along_axis(ids[:, :k], order, axis=1), np.take_along_axis(right, order, axis=1)
        counts[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
        return float(counts.sum() / max(np.isfinite(true).sum(), 1))

    def _check_neighbours(self, ids: np.ndarray) -> None:
        if ids.ndim != 2 or len(ids) != len(self.queries) or ids.dtype.kind not in "iu":
            raise ValueError(
                f"{self.name}: neighbours must be whole numbers ({len(self.queries)}, k), one row for each query, "
                f"got {ids.dtype} {ids.shape}"
            )
        if ids.size and (ids.min() < 0 or ids.max() >= len(self.base)):
            raise ValueError(
                f"{self.name}: neighbours must be rows of the base, 0 to {len(self.base) - 1}, "
                f"got {ids.min()} to {ids.max()}"
            )
        near = self.distances(ids[:100])
        slack = 1e-4 * (1 + np.abs(near[:, :-1]))
        if not (np.diff(near, axis=1) >= -slack).all():
            raise ValueError(
                f"{self.name}: the neighbours are not in order of their distance by {self.metric}: "
                "they belong to other vectors, or to another metric"
            )


# --- the sets at hand -------------------------------------------------------------------------------------------------


def load(name: str, *, metric: str | None = None) -> VectorData:
    """The set of this name ("descriptors", "latent" or "digits"), else the file at this path; see `read`."""
    if name in SETS:
        data = SETS[name]()
        return data if metric is None else replace(data, metric=metric)
    return read(name, metric=metric)


def descriptors(n: int | None = None, *, cache_dir: str | os.PathLike[str] | None = None) -> VectorData:
    """SIFT-style descriptors of two photos, (n, 128), whole numbers from 0 to 255; by l2. Needs scikit-learn.

    n: how many of the about 233,000; 2,000 further ones are the queries. In random order, none twice.
    """
    base, queries = _kept("descriptors", cache_dir, lambda: _held_out(_of_photos(), HELD_OUT))
    return VectorData("descriptors", base[:n], queries)


def latent(
    dim: int = 128, packages: Iterable[str] = (), *, cache_dir: str | os.PathLike[str] | None = None
) -> VectorData:
    """Docstrings of the standard library, and of `packages`, as TF-IDF reduced to `dim` dimensions; by cosine.

    500 docstrings are the queries. ValueError if there are fewer docstrings, or words, than dimensions.
    """
    names = tuple(packages)
    documents = docs.load(names)
    texts = [f"{document.summary} {document.body}" for document in documents]
    digest = hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).hexdigest()
    made = "-".join(["latent", str(dim), *names, digest[:12]])
    base, queries = _kept(made, cache_dir, lambda: _held_out(_reduced(texts, dim), 500))
    return VectorData("latent", base, queries, "cosine")


def digits() -> VectorData:
    """Handwritten digits as 8 × 8 pixels, (1497, 64), whole numbers from 0 to 16; 300 queries; by l2."""
    pixels = _datasets().load_digits().data.astype(np.float32)
    return VectorData("digits", *_held_out(pixels, 300))


SETS: dict[str, Callable[[], VectorData]] = {"descriptors": descriptors, "latent": latent, "digits": digits}


def read(path: str | os.PathLike[str], *, metric: str | None = None) -> VectorData:
    """Your own vectors: HDF5 in ann-benchmarks' layout, fvecs, ivecs, bvecs or npy, by the ending of the name.

    HDF5: `train` is the base, `test` the queries, `neighbors` the truth, and the attribute `distance` ("euclidean",
    "angular", "ip", …) the metric. Of the others, `sift_base.fvecs` is read with `sift_query.fvecs` and
    `sift_groundtruth.ivecs` if they lie beside it. A file without queries gives some of its vectors up for them:
    one in ten, and 1,000 at most.

    metric: in place of what the file says; "l2" if it says nothing. Truth by another metric is not used.

    Raises FileNotFoundError; ValueError for a file that is damaged, truncated, of an unknown kind, or holds NaN;
    ModuleNotFoundError for HDF5 without h5py.
    """
    file = Path(path)
    found = _vector_files.read(file)
    said = found.metric or "l2"
    truth = found.neighbours if metric in (None, said) else None
    base = _numbers(file.name, found.base)
    if found.queries is None:
        if len(base) < 2:
            raise ValueError(f"{file}: one vector is too few: there must be one to search, and one to search with")
        base, queries = _held_out(base, min(1000, max(1, len(base) // 10)))
    else:
        queries = _numbers(f"the queries of {file.name}", found.queries)
    return VectorData(file.name, base, queries, metric or said, truth)


def _numbers(name: str, x: np.ndarray) -> np.ndarray:
    """Float32 and finite."""
    with np.errstate(over="ignore"):  # what does not fit becomes ∞, which is refused
        x = np.ascontiguousarray(x, np.float32)
    bad = ~np.isfinite(x).all(axis=1)
    if bad.any():
        raise ValueError(f"{name}: vector {int(bad.argmax())} holds NaN or infinity; {int(bad.sum())} such in all")
    return x


def _held_out(x: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The vectors in random order, and `n` of them apart."""
    order = np.random.default_rng(0).permutation(len(x))
    return x[order[n:]], x[order[:n]]


def _kept(
    name: str, cache_dir: str | os.PathLike[str] | None, make: Callable[[], tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Base and queries from the cache, else made and put there; float32."""
    folder = (Path(cache_dir) if cache_dir is not None else cache_folder() / "vectors") / name
    try:
        _, arrays = _index_file.read(folder, KIND)
        base, queries = arrays["base"], arrays["queries"]
    except (_index_file.IndexFileError, KeyError, OSError) as error:
        damaged = (folder / _index_file.MANIFEST).exists()
        if damaged:
            log.warning("%s; making the vectors again", error)
        log.info("making the vectors of %s (once; kept in %s)", name, folder)
        base, queries = make()
        try:
            if damaged:  # which would be refused as somebody else's
                (folder / _index_file.MANIFEST).unlink(missing_ok=True)
            _index_file.write(folder, KIND, {}, {"base": base, "queries": queries})
        except OSError as failure:
            log.warning("cannot keep the vectors in %s (%s); they will be made again next time", folder, failure)
    return base.astype(np.float32), queries.astype(np.float32)


# --- how they are made ------------------------------------------------------------------------------------------------


def _datasets():  # type: ignore[no-untyped-def]  # a module without types
    try:
        import sklearn.datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "descriptors and digits need scikit-learn, which is not installed: pip install 'mlsys-reference[bench]'"
        ) from error
    return sklearn.datasets


def _of_photos() -> np.ndarray:
    """The descriptors of both photos at all scales, as bytes (n, 128), in order, none twice."""
    from scipy.ndimage import gaussian_filter

    grey = [photo.mean(axis=2).astype(np.float32) for photo in _datasets().load_sample_images().images]
    found = [_dense_sift(gaussian_filter(photo, sigma), cell) for photo in grey for sigma, cell in SCALES]
    rows = np.concatenate(found)
    return np.unique(rows.view(f"V{rows.shape[1]}").ravel()).view(np.uint8).reshape(-1, rows.shape[1])


def _dense_sift(photo: np.ndarray, cell: int, step: int = 2) -> np.ndarray:
    """Descriptors at every `step`-th pixel of a grey photo (h, w), as bytes (n, 128)."""
    from scipy.ndimage import gaussian_filter

    dy, dx = np.gradient(photo)
    strength = np.hypot(dx, dy)
    direction = np.arctan2(dy, dx) % (2 * np.pi) / (2 * np.pi) * 8
    lower = np.floor(direction).astype(int)
    share = direction - lower  # of the next direction: a change between two directions counts for both
    histogram = np.zeros((*photo.shape, 8), np.float32)
    np.put_along_axis(histogram, (lower % 8)[..., None], (strength * (1 - share))[..., None], axis=2)
    np.put_along_axis(histogram, ((lower + 1) % 8)[..., None], (strength * share)[..., None], axis=2)
    histogram = gaussian_filter(histogram, (cell / 2, cell / 2, 0))  # sums over a cell, softly

    margin = 2 * cell
    ys = np.arange(margin, photo.shape[0] - margin, step)
    xs = np.arange(margin, photo.shape[1] - margin, step)
    offsets = [int(shift * cell) for shift in (-1.5, -0.5, 0.5, 1.5)]
    cells = [histogram[np.ix_(ys + dy_, xs + dx_)] for dy_ in offsets for dx_ in offsets]
    patches = np.concatenate(cells, axis=-1).reshape(-1, 128)
    length = np.linalg.norm(patches, axis=1, keepdims=True)
    patches = (patches / np.maximum(length, FLAT))[length[:, 0] > FLAT]
    patches = np.minimum(patches, 0.2)
    patches /= np.linalg.norm(patches, axis=1, keepdims=True)
    return np.clip(np.round(512 * patches), 0, 255).astype(np.uint8)


def _reduced(texts: list[str], dim: int) -> np.ndarray:
    """TF-IDF of the texts, reduced to (n, dim) by a truncated SVD: A ≈ U S Vᵀ, and U S are the vectors."""
    from scipy import sparse
    from scipy.sparse.linalg import svds

    from mlsys.retrieval.tokenize import Tokenizer

    tokenize = Tokenizer(stopwords="english")
    numbers: dict[str, int] = {}
    terms = [[numbers.setdefault(term, len(numbers)) for term in tokenize(text)] for text in texts]
    rows = np.repeat(np.arange(len(terms)), [len(found) for found in terms])
    columns = np.fromiter((term for found in terms for term in found), np.int64, len(rows))
    counts = sparse.coo_array((np.ones(len(rows)), (rows, columns)), (len(texts), len(numbers))).tocsr()
    counts.sum_duplicates()
    if not 1 <= dim < min(counts.shape):
        raise ValueError(
            f"dim must be at least 1 and below both the number of texts and of words, {counts.shape}; got {dim}"
        )
    frequency = np.bincount(counts.indices, minlength=len(numbers))
    weights = sparse.csr_array(counts)
    weights.data = (1 + np.log(counts.data)) * np.log((1 + len(texts)) / (1 + frequency))[counts.indices]
    length = np.sqrt(weights.multiply(weights).sum(axis=1))
    weights = weights.multiply(1 / np.maximum(length, 1e-12)[:, None]).tocsr()
    start = np.random.default_rng(0).standard_normal(min(weights.shape))
    u, s, _ = svds(weights, k=dim, v0=start)
    vectors = (u * s)[:, ::-1].astype(np.float32)  # svds gives the smallest first
    return np.ascontiguousarray(
        vectors[np.linalg.norm(vectors, axis=1) > 1e-3]
    )  # a text without words has no direction
