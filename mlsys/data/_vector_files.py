"""The files that vectors come in: HDF5 as of ann-benchmarks, the corpus-texmex formats, npy.

    fvecs, ivecs, bvecs   row after row: the dimension as int32, then so many float32, int32 or bytes; little-endian
    hdf5                  arrays `train`, `test`, `neighbors`, `distances`; the attribute `distance` names the metric
    npy                   one array (n, d)

Every length in a file is checked against the file's own, so that one that was cut
off is named as such and is never read as fewer vectors.

Papers:
    Jégou, Douze & Schmid 2011, "Product Quantization for Nearest Neighbor Search" (whose data set came as fvecs).

See also:
    `mlsys.data.vectors` (what is made of them).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ELEMENTS: dict[str, np.dtype[Any]] = {".fvecs": np.dtype("<f4"), ".ivecs": np.dtype("<i4"), ".bvecs": np.dtype("u1")}
HDF5 = (".hdf5", ".h5")
KINDS = (*HDF5, *ELEMENTS, ".npy")
DISTANCES = {
    "euclidean": "l2",
    "l2": "l2",
    "angular": "cosine",
    "cosine": "cosine",
    "ip": "ip",
    "dot": "ip",
    "inner_product": "ip",
}
BASE = re.compile(r"^(.*[_-])(base|train)$")  # sift_base.fvecs lies beside sift_query.fvecs


@dataclass(frozen=True)
class Found:
    """What a file holds, as it stands there; None for what it has not."""

    base: np.ndarray
    queries: np.ndarray | None = None
    neighbours: np.ndarray | None = None
    metric: str | None = None


def read(path: Path) -> Found:
    """The vectors of a file, and what lies beside it. FileNotFoundError, or ValueError saying what is wrong with it."""
    if path.suffix.lower() not in KINDS:
        raise ValueError(f"{path}: vectors are read from files that end in {', '.join(KINDS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'is a folder' if path.is_dir() else 'there is no such file'}")
    if path.suffix.lower() in HDF5:
        return hdf5(path)
    name = BASE.match(path.stem)
    asked = _beside(path, name, "query", "test", suffix=path.suffix) if name else None
    if name is None or asked is None:
        return Found(array(path))
    truth = _beside(path, name, "groundtruth", "neighbors", suffix=".ivecs")
    return Found(array(path), array(asked), None if truth is None else array(truth))


def _beside(path: Path, name: re.Match[str], *parts: str, suffix: str) -> Path | None:
    places = [path.with_name(f"{name[1]}{part}{suffix}") for part in parts]
    return next((place for place in places if place.is_file()), None)


def array(path: Path) -> np.ndarray:
    """The one array of an fvecs, ivecs, bvecs or npy file, (n, d), in the file's own type."""
    if path.suffix.lower() == ".npy":
        return _npy(path)
    return _vecs(path, ELEMENTS[path.suffix.lower()])


def _npy(path: Path) -> np.ndarray:
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is no npy file of numbers, or is damaged or truncated: {error}") from None
    if not isinstance(found, np.ndarray) or found.ndim != 2 or not found.size or found.dtype.kind not in "fiu":
        shape = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else "an archive"
        raise ValueError(f"{path} must hold numbers (n, d), got {shape}")
    return found


def _vecs(path: Path, element: np.dtype[Any]) -> np.ndarray:
    data = np.fromfile(path, np.uint8)
    if len(data) < 4:
        raise ValueError(f"{path} is empty, or truncated: it has {len(data)} bytes")
    dim = int(data[:4].view("<i4")[0])
    if not 1 <= dim <= 1 << 20:
        raise ValueError(f"{path} is damaged, or no {path.suffix} file: its first vector would have dimension {dim}")
    row = 4 + dim * element.itemsize
    if len(data) % row:
        raise ValueError(
            f"{path} is truncated or damaged: it has {len(data)} bytes, and vectors of dimension {dim} take {row} each"
        )
    rows = data.reshape(-1, row)
    dims = rows[:, :4].copy().view("<i4")[:, 0]
    if (dims != dim).any():
        odd = int((dims != dim).argmax())
        raise ValueError(f"{path} is damaged: vector 0 has dimension {dim}, vector {odd} has {dims[odd]}")
    return rows[:, 4:].copy().view(element)


def hdf5(path: Path) -> Found:
    """An ann-benchmarks file. ModuleNotFoundError without h5py."""
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path}: HDF5 is read by h5py, which is not installed: pip install 'mlsys-reference[bench]'"
        ) from error
    try:
        with h5py.File(path, "r") as file:
            arrays = {name: file[name][()] for name in ("train", "test", "neighbors") if name in file}
            said = file.attrs.get("distance", file.attrs.get("metric"))
    except (OSError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no HDF5 file, or is damaged or truncated: {error}") from None
    missing = [name for name in ("train", "test") if name not in arrays]
    if missing:
        raise ValueError(f"{path} has no array {missing[0]!r}: ann-benchmarks' files have train, test and neighbors")
    for name, found in arrays.items():
        if found.ndim != 2 or not found.size or found.dtype.kind not in "fiu":
            raise ValueError(f"{path}: {name} must hold numbers (n, d), got {found.dtype} {found.shape}")
    return Found(arrays["train"], arrays["test"], arrays.get("neighbors"), _metric(path, said))


def _metric(path: Path, said: object) -> str | None:
    if said is None:
        return None
    word = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
    if word.lower() not in DISTANCES:
        raise ValueError(f"{path}: its distance is {word!r}; known are {', '.join(DISTANCES)}")
    return DISTANCES[word.lower()]
