"""An index on disk that is whole or absent: a manifest in JSON, the arrays in safetensors.

The arrays go to a file whose name holds their own SHA-256; only then is the
manifest that names it put in place, by one rename. A process killed at any
moment leaves the old manifest, whose arrays are untouched, or the new one. What
an interrupted save left behind is removed by the next one that completes.

    folder/index.json                      format, settings, name and checksum of the arrays, its own checksum
    folder/arrays-<sha256>.safetensors

One writer at a time; any number of readers.

Cost:
    One pass over the bytes for the checksum, saving and loading.

Memory:
    A serialised copy of the arrays while saving or loading.

Papers:
    Pillai et al. 2014, "All File Systems Are Not Created Equal", OSDI (why fsync, rename, and fsync of the folder).

See also:
    `mlsys.files` (one file, all at once), `bm25` (saves itself with this).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from mlsys.files import write_atomic

MANIFEST = "index.json"


class IndexFileError(ValueError):
    """The folder holds no index, or one that is damaged: the message says which file and what to do."""


def write(
    folder: str | os.PathLike[str], kind: str, settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Save `arrays` and the JSON-able `settings` as the index in `folder`, in place of the one there."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    data = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    digest = hashlib.sha256(data).hexdigest()
    file = f"arrays-{digest[:16]}.safetensors"
    manifest = {"kind": kind, "settings": dict(settings), "file": file, "bytes": len(data), "sha256": digest}
    manifest["checksum"] = _checksum(manifest)
    write_atomic(path / file, data)
    write_atomic(path / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    for left_over in [
        *path.glob("arrays-*.safetensors"),
        *path.glob(".arrays-*.tmp"),
        *path.glob(f".{MANIFEST}.*.tmp"),
    ]:
        if left_over.name != file:
            left_over.unlink(missing_ok=True)


def read(folder: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The settings and the arrays of the index in `folder`; nothing on disk is changed.

    Raises IndexFileError (a ValueError) if there is none, if it is of another kind, or if a file is damaged.
    """
    path = Path(folder)
    manifest = _manifest(path, kind)
    while True:
        try:
            data = (path / manifest["file"]).read_bytes()
            break
        except FileNotFoundError:
            again = _manifest(path, kind)  # a writer may have replaced both files since the manifest was read
            if again == manifest:
                raise IndexFileError(f"{path / manifest['file']} is missing; save the index again") from None
            manifest = again
    if len(data) != manifest["bytes"]:
        raise IndexFileError(
            f"{path / manifest['file']} has {len(data)} bytes where {manifest['bytes']} were written; "
            "it is damaged: save the index again"
        )
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise IndexFileError(f"{path / manifest['file']} has a wrong checksum; it is damaged: save the index again")
    try:
        return manifest["settings"], safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise IndexFileError(f"{path / manifest['file']} is no safetensors file: {error}") from None


def _manifest(path: Path, kind: str) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise IndexFileError(f"{path} holds no saved index ({MANIFEST} is missing)") from None
    except ValueError as error:
        raise IndexFileError(f"{file} is not JSON ({error}); it is damaged: save the index again") from None
    if not isinstance(manifest, dict) or manifest.pop("checksum", None) != _checksum(manifest):
        raise IndexFileError(f"{file} has a wrong checksum; it is damaged, or was edited by hand: save the index again")
    if manifest["kind"] != kind:
        raise IndexFileError(f"{file} holds a {manifest['kind']!r} index, expected {kind!r}")
    return manifest


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
