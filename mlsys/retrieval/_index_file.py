"""An index on disk that is whole or absent: a manifest in JSON, the arrays in safetensors.

The arrays go to a file whose name holds their own SHA-256; only then is the
manifest that names it put in place, by one rename. A process killed at any
moment leaves the old manifest, whose arrays are untouched, or the new one. What
an interrupted save left behind is removed by the next one that completes; other
files in the folder stay, and a folder with somebody else's index.json is refused.

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
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from mlsys.files import write_atomic

MANIFEST = "index.json"
ENTRIES = {"kind": str, "settings": dict, "file": str, "bytes": int, "sha256": str}  # and "checksum", of these
ARRAYS = re.compile(r"arrays-[0-9a-f]{16}\.safetensors")
LEFT_OVER = re.compile(rf"{ARRAYS.pattern}|\.({ARRAYS.pattern}|{re.escape(MANIFEST)})\.[0-9a-f]{{12}}\.tmp")


class IndexFileError(ValueError):
    """The folder holds no index, or one that is damaged: the message says which file and what to do."""


def write(
    folder: str | os.PathLike[str], kind: str, settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Save `arrays` and the JSON-able `settings` as the index in `folder`, in place of the one of its kind there.

    Raises IndexFileError if the folder's index.json is anything else, and then leaves the folder as it was.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    _refuse_others(path / MANIFEST, kind)
    data = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    digest = hashlib.sha256(data).hexdigest()
    file = f"arrays-{digest[:16]}.safetensors"
    manifest = {"kind": kind, "settings": dict(settings), "file": file, "bytes": len(data), "sha256": digest}
    manifest["checksum"] = _checksum(manifest)
    write_atomic(path / file, data)
    write_atomic(path / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    for entry in list(path.iterdir()):
        if LEFT_OVER.fullmatch(entry.name) and entry.name != file and entry.is_file():
            entry.unlink(missing_ok=True)


def read(folder: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The settings and the arrays of the index in `folder`; nothing on disk is changed.

    Raises IndexFileError (a ValueError) if there is none, if it is of another kind, or if a file is damaged.
    """
    path = Path(folder)
    manifest = _manifest(path, kind)
    while True:
        try:
            data = _contents(path / manifest["file"])
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
    except (safetensors.SafetensorError, KeyError) as error:  # KeyError: a dtype that NumPy has not
        raise IndexFileError(f"{path / manifest['file']} is no safetensors file for NumPy: {error}") from None


def _manifest(path: Path, kind: str) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(_contents(file))
    except (FileNotFoundError, NotADirectoryError):
        raise IndexFileError(f"{path} holds no saved index ({MANIFEST} is missing)") from None
    except IndexFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise IndexFileError(
            f"{file} is not JSON ({error}); it is no index or damaged: remove it and save the index again"
        ) from None
    if not _is_manifest(manifest):
        raise IndexFileError(f"{file} is not the manifest of an index; remove it and save the index again")
    if manifest.pop("checksum") != _checksum(manifest):
        raise IndexFileError(f"{file} has a wrong checksum; it is damaged, or was edited by hand: save the index again")
    if manifest["kind"] != kind:
        same = manifest["kind"].partition("/")[0] == kind.partition("/")[0]
        remedy = ": saved by another version of mlsys; index the documents again" if same else ""
        raise IndexFileError(f"{file} holds a {manifest['kind']!r} index, expected {kind!r}{remedy}")
    return manifest


def _refuse_others(file: Path, kind: str) -> None:
    """IndexFileError if there is a manifest that is not of an index of this kind, in whatever version of its format."""
    remedy = "nothing was saved: choose another folder, or remove that file if it may go"
    try:
        manifest = json.loads(_contents(file))
    except FileNotFoundError:
        return
    except (ValueError, RecursionError):
        raise IndexFileError(f"{file} is not the manifest of an index, or a damaged one; {remedy}") from None
    if not _is_manifest(manifest):
        raise IndexFileError(f"{file} is not the manifest of an index; {remedy}")
    if manifest["kind"].partition("/")[0] != kind.partition("/")[0]:
        raise IndexFileError(f"{file} holds a {manifest['kind']!r} index, not a {kind!r} one; {remedy}")


def _is_manifest(found: object) -> bool:
    """Whether it has the form of what `write` writes; an edited one may still have a wrong checksum."""
    return (
        isinstance(found, dict)
        and found.keys() == {*ENTRIES, "checksum"}
        and all(isinstance(found[name], kind) for name, kind in ENTRIES.items())
        and ARRAYS.fullmatch(found["file"]) is not None
    )


def _contents(file: Path) -> bytes:
    if file.is_dir():
        raise IndexFileError(f"{file} is a folder where a file should be; remove it and save the index again")
    return file.read_bytes()


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
