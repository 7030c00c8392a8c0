"""A model in one safetensors file, whole or absent: the weights, and in the metadata the config and a checksum.

safetensors holds names, shapes and numbers, and nothing that runs when it is read, as a pickle would. Its own
check is of the header against the file's length; the SHA-256 here finds a changed bit as well.

See also:
    `mlsys.files` (one file, all at once), `mlsys.models.transformer` and `mlsys.quant.model` (`save` and `load`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mlsys.files import write_atomic

KIND = "mlsys.models.transformer"


def write(
    path: str | os.PathLike[str], config: Mapping[str, Any], weights: Mapping[str, Tensor], *, kind: str = KIND
) -> None:
    """Save `weights` and the JSON-able `config` as `path`, in place of the file there; `kind` is who can read it."""
    on_cpu = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    text = json.dumps(dict(config))
    metadata = {"kind": kind, "config": text, "sha256": _checksum(text, on_cpu)}
    write_atomic(path, safetensors.torch.save(on_cpu, metadata))


def read(path: str | os.PathLike[str], *, kind: str = KIND) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the weights of the model in `path`.

    ValueError if the file is damaged or holds something else; OSError as for `open`.
    """
    with Path(path).open("rb"):
        pass  # a missing file or a folder is told as Python tells it
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # copied, since what is read is a view of the file, and a file may be overwritten by others
            weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (no mapping)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file ({error}): save the model again") from None
    if metadata.get("kind") != kind:
        raise ValueError(f"{path} holds no model that {kind}.save wrote")
    text = metadata.get("config", "")
    if metadata.get("sha256") != _checksum(text, weights):
        raise ValueError(f"{path} has a wrong checksum; it is damaged: save the model again")
    return json.loads(text), weights


def _checksum(config: str, weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(config.encode())
    for name in sorted(weights):
        weight = weights[name]
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
