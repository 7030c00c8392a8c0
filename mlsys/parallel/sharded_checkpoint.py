"""A checkpoint that every rank writes its share of, that is whole after a kill at any moment, and loads on other ranks.

    save("run", model, optimizer, notes={"step": 1000})     # every rank calls it: 4 of them, ZeRO-3, say
    notes = load("run", model, optimizer)                   # every rank calls it: 3 of them, ZeRO-1, or one, or 64

Gathering the whole state on one rank to write it needs memory that ZeRO was used to save, and lets n − 1 ranks wait.
So each rank writes what it holds, in a file of its own, and one small file says what is where:

    run/manifest.json                                  names, shapes, dtypes; which numbers of which tensor are in
                                                       which file; sizes and checksums of the files; notes
    run/3f2a…-00000-of-00004.safetensors               rank 0's numbers
    run/3f2a…-00001-of-00004.safetensors               rank 1's, …

**Numbers, not shards.** A file says "numbers 4096 … 8191 of blocks.3.mlp.up.weight, in row-major order". How the
tensors were laid out, padded and cut is not in it, so nothing has to be undone: a rank that loads asks which numbers it
needs, and reads those, from however many files have some. So 4 ranks load what 3 have saved, ZeRO-3 loads what plain
data parallelism has saved, and the other way round. State of the optimizer has the shape of its weight and is cut
alike. What all ranks have (buffers, the weights of a plain module) is written once.

**Atomic.** No file of the last checkpoint is touched while the next is written: their names begin with a random number,
the *save*. The order of steps does the rest:

    1  every rank writes its file and forces it to disk       a kill here: the manifest still names the old files
    2  all ranks tell each other that they have
    3  rank 0 replaces the manifest, all at once              a kill comes before or after, never in between
    4  rank 0 removes files that the manifest does not name   a kill here: the next save removes them

**Checked before anything changes.** Names, shapes, dtypes, the optimizer's class and groups, sizes and checksums are
compared first, on all ranks, and one rank's objection stops them all. Nothing is pickled, so no file can run code.

What is saved: parameters in the precision that the optimizer works in, persistent buffers, the optimizer's state and
the options of its groups (a schedule's learning rate among them). Not saved: gradients, random generators, the place in
the data. Put what is needed of these into `notes`. One save into a folder at a time.

Cost:
    Each rank writes Ψ/n · 12 bytes for Adam in float32, reads as much, and hashes both. The ranks verify a checkpoint's
    files together, each of them once.

Memory:
    Saving: a chunk of 64 MiB beside the state. Loading: a second copy of this rank's share, until all is known to fit.

Papers:
    Pillai et al. 2014, "All File Systems Are Not Created Equal", OSDI (which orders of writing survive a crash).
    Lian et al. 2024, arXiv:2406.18820 (checkpoints that do not depend on how the state was sharded).
    Wan et al. 2024, arXiv:2407.20143 (tensors as ranges of numbers; resharding when loading).

See also:
    `mlsys.parallel.zero`, `mlsys.parallel.zero3` (whose pieces are saved), `mlsys.models.training` (one process, one
    file), `torch.distributed.checkpoint` (its plans also hold other things, and are pickled).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mlsys.files import write_atomic
from mlsys.parallel._sharded import Sharded, names_of
from mlsys.parallel.collectives import Communicator
from mlsys.parallel.data_parallel import DataParallel

T = TypeVar("T")
FORMAT = 1
MANIFEST = "manifest.json"
DATA_FILE = re.compile(r"[0-9a-f]{16}-\d{5}-of-\d{5}\.safetensors")
OWN_MANIFEST = re.compile(rb'\{\s*"format": \d+,\s*"save": "[0-9a-f]{16}"')  # how ours begin
CHUNK = 64 * 2**20  # bytes
CODES = {  # torch's dtypes as safetensors calls them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# How an optimizer computes, not what: a matter of the machine that it runs on, not of the one that saved.
HOW = ("foreach", "fused", "capturable", "differentiable")


class CheckpointError(ValueError):
    """The folder holds no whole checkpoint, or one of another model: the message says which file or parameter."""


def save(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    notes: Any = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Make the state of `model` and `optimizer` the checkpoint in `folder`, all at once; every rank calls it.

    model:     a ZeRO1, ZeRO2, ZeRO3 or DataParallel, or any module, of which all ranks have the same copy.
    optimizer: that of `model`.
    notes:     what JSON can hold, such as the step: rank 0's are saved.
    group:     the ranks that have a plain module, where those are not all; the others know theirs.

    When it returns, on any rank, the checkpoint is on disk. If it raises, the earlier one is as it was. What goes wrong
    on one rank (a full disk) is raised on all. The folder is made if need be; files in it that are not ours stay;
    ValueError if one of them is called manifest.json.
    """
    ranks = _Ranks(model, group)
    path = Path(folder)

    def prepare() -> tuple[str, list[_Range], dict[str, Any] | None]:
        json.dumps(notes)  # TypeError here, before anything is written
        if ranks.rank == 0:
            path.mkdir(parents=True, exist_ok=True)
            _check_ours(path)
        held = _holdings(model, optimizer)
        return secrets.token_hex(8), [one.range for one in held], _settings(model, optimizer)

    plans = ranks.together(prepare)
    name = plans[0][0]
    parts = _divided([ranges for _, ranges, _ in plans])
    optimizers = [settings for _, _, settings in plans]
    files = [f"{name}-{rank:05d}-of-{ranks.size:05d}.safetensors" for rank in range(ranks.size)]

    def write() -> dict[str, Any]:
        mine = {one for one, rank in parts.items() if rank == ranks.rank}
        return _write(path / files[ranks.rank], [one for one in _holdings(model, optimizer) if one.range in mine])

    def commit() -> None:
        if ranks.rank == 0:
            _commit(path, name, files, written, parts, _merged(optimizers), notes)

    try:
        written = ranks.together(write)
        ranks.together(commit)
    except Exception:
        if _named_in_manifest(path, name):  # the manifest was replaced, and only tidying up failed
            raise
        (path / files[ranks.rank]).unlink(missing_ok=True)
        raise


def load(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> Any:
    """Give `model` and `optimizer` the state of the checkpoint in `folder`, and return its notes; every rank calls it.

    The number of ranks and the ZeRO stage may be others than when it was saved; names, shapes and dtypes of the
    parameters, and the optimizer's class and groups, must be the same. Without `optimizer` only weights are loaded.
    Frozen weights are converted where their precision differs. How the optimizer computes (`fused`, `foreach`, …)
    stays as it was made. `group` is as for `save`.

    FileNotFoundError if there is no checkpoint. CheckpointError, on every rank and with nothing changed, if it is
    damaged or of another model.
    """
    ranks = _Ranks(model, group)
    path = Path(folder)
    manifest = ranks.together(lambda: _read_manifest(path) if ranks.rank == 0 else None)[0]
    assert manifest is not None

    def read() -> tuple[list[tuple[_Held, Tensor]], list[tuple[Tensor, dict[str, Any]]]]:
        weights = _holdings(model, None)
        _compare(path, manifest, model, weights)
        if optimizer is not None:
            _compare_optimizer(path, manifest, model, optimizer)
        _verify(path, manifest, ranks)
        source = _Source(path, manifest)
        values = [(one, source.read(one.range.key, one.range.start, one.range.stop)) for one in weights]
        state = [] if optimizer is None else _read_state(source, manifest, model, optimizer)
        return values, state

    values, state = ranks.keep(read)
    with torch.no_grad():
        for one, numbers in values:
            one.tensor.copy_(numbers.view(one.tensor.shape))
        if isinstance(model, Sharded):
            model.sync_weights()
    if optimizer is not None:
        optimizer.state.clear()
        for tensor, entries in state:
            optimizer.state[tensor] = entries
        for options, saved in zip(optimizer.param_groups, manifest["optimizer"]["groups"], strict=True):
            options.update({key: _decoded(value) for key, value in saved["options"].items() if key not in HOW})
    return manifest["notes"]


def read_notes(folder: str | os.PathLike[str]) -> Any:
    """The notes of the checkpoint in `folder`, for whoever must know them to make the model. Any one process calls it.

    FileNotFoundError if there is no checkpoint, CheckpointError if its manifest is damaged.
    """
    return _read_manifest(Path(folder))["notes"]


# --- who holds what ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Range:
    """The numbers start … stop − 1 of one tensor, in row-major order.

    key:   "weights/blocks.0.weight", "buffers/norm.mean" or "optimizer/blocks.0.weight/exp_avg".
    shape: of the whole tensor.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    stop: int


@dataclass(frozen=True)
class _Held:
    """A range, and the tensor of this rank that has those numbers."""

    range: _Range
    tensor: Tensor


@dataclass(frozen=True)
class _Piece:
    """What this rank holds of a parameter: all of it, or with ZeRO a part."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    tensor: Tensor

    @property
    def whole(self) -> bool:
        return self.stop - self.start == math.prod(self.shape)


def _module(model: nn.Module) -> nn.Module:
    """The module whose names count."""
    inner = model.module if isinstance(model, Sharded | DataParallel) else model
    assert isinstance(inner, nn.Module)
    return inner


def _pieces(model: nn.Module) -> list[_Piece]:
    if not isinstance(model, Sharded):
        named = _module(model).named_parameters()
        return [_Piece(name, tuple(p.shape), 0, p.numel(), p) for name, p in named]
    found = [_Piece(p.name, tuple(p.shape), p.start, p.stop, p.tensor) for p in model.pieces()]
    # Parameters without numbers are in nobody's slice.
    empty = [(name, p) for name, p in model.module.named_parameters() if math.prod(p.shape) == 0]
    return found + [_Piece(name, tuple(p.shape), 0, 0, p) for name, p in empty]


def _holdings(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[_Held]:
    """All numbers of this rank that are to be saved, or to be set."""
    pieces = _pieces(model)
    found = [_held(f"weights/{piece.name}", piece.shape, piece.start, piece.stop, piece.tensor) for piece in pieces]
    for name, buffer in _buffers(_module(model)):
        found.append(_held(f"buffers/{name}", tuple(buffer.shape), 0, buffer.numel(), buffer))
    if optimizer is not None:
        for piece in pieces:
            for entry, value in optimizer.state.get(piece.tensor, {}).items():
                key = f"optimizer/{piece.name}/{entry}"
                if _is_number(entry, value, piece):
                    continue
                if value.shape == piece.tensor.shape:
                    found.append(_held(key, piece.shape, piece.start, piece.stop, value))
                elif piece.whole:  # such as the means of rows and columns: of the weight as a whole
                    found.append(_held(key, tuple(value.shape), 0, value.numel(), value))
                else:
                    raise ValueError(
                        f"the state {entry!r} of {piece.name} has shape {tuple(value.shape)}, and the weight is cut: "
                        'such an optimizer needs split="tensors"'
                    )
    return found


def _held(key: str, shape: tuple[int, ...], start: int, stop: int, tensor: Tensor) -> _Held:
    if tensor.dtype not in CODES:
        raise TypeError(f"{key} has dtype {tensor.dtype}, which safetensors does not know")
    return _Held(_Range(key, shape, tensor.dtype, start, stop), tensor)


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Persistent buffers, each once, by the first of its names."""
    seen: set[int] = set()
    for prefix, part in module.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{prefix}.{name}" if prefix else name, buffer


def _is_number(entry: str, value: Any, piece: _Piece) -> bool:
    """Whether a value of the optimizer's state is one number for the whole weight, such as the count of steps."""
    if not isinstance(value, Tensor):
        return True
    return value.ndim == 0 and (entry == "step" or piece.tensor.ndim > 0)


def _settings(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any] | None:
    """What this rank has to say of the optimizer for the manifest: class, groups, and state that is no tensor."""
    if optimizer is None:
        return None
    pieces = {id(piece.tensor): piece for piece in _pieces(model)}
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        strangers = [tuple(tensor.shape) for tensor in group["params"] if id(tensor) not in pieces]
        if strangers:
            raise ValueError(
                f"group {index} of the optimizer has a parameter {strangers[0]} that is not of the model: "
                "give the model and the optimizer that belong together"
            )
        options = {
            key: _encoded(f"group {index}, {key}", value)
            for key, value in group.items()
            if key not in ("params", "param_names")
        }
        groups.append({"options": options, "parameters": sorted({pieces[id(t)].name for t in group["params"]})})
    state: dict[str, dict[str, Any]] = {}
    for piece in pieces.values():
        entries = optimizer.state.get(piece.tensor, {})
        if entries:
            state[piece.name] = {
                entry: _encoded(f"{entry} of {piece.name}", value)
                if _is_number(entry, value, piece)
                else {"file": True}
                for entry, value in entries.items()
            }
    return {"class": type(optimizer).__name__, "groups": groups, "state": state}


def _merged(settings: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """What all ranks together know of the optimizer."""
    if settings[0] is None:
        return None
    whole: dict[str, Any] = json.loads(json.dumps(settings[0]))
    for rank, other in enumerate(settings[1:], 1):
        assert other is not None
        if len(other["groups"]) != len(whole["groups"]):
            raise ValueError(
                f"rank {rank}'s optimizer has {len(other['groups'])} groups, rank 0's {len(whole['groups'])}"
            )
        for mine, theirs in zip(whole["groups"], other["groups"], strict=True):
            mine["parameters"] = sorted({*mine["parameters"], *theirs["parameters"]})
        for name, entries in other["state"].items():
            if whole["state"].setdefault(name, entries) != entries:
                raise ValueError(
                    f"the ranks' optimizers differ in the state of {name}: {whole['state'][name]} before rank {rank}, "
                    f"{entries} there; have they all done the same steps?"
                )
    return whole


def _encoded(what: str, value: Any) -> Any:
    """A value that JSON can hold, with what JSON would lose of it."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"{what} is a tensor of shape {tuple(value.shape)}: only numbers can be saved there")
        dtype = str(value.dtype).removeprefix("torch.")
        return {"number": value.item(), "dtype": dtype, "on_cpu": value.device.type == "cpu"}
    if isinstance(value, tuple):
        return {"tuple": [_encoded(what, item) for item in value]}
    if isinstance(value, list):
        return [_encoded(what, item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{what} is {type(value).__name__} {value!r}: only numbers, text and tuples of them can be saved")


def _decoded(value: Any, device: torch.device | None = None) -> Any:
    if isinstance(value, dict) and "tuple" in value:
        return tuple(_decoded(item) for item in value["tuple"])
    if isinstance(value, dict):
        return torch.tensor(value["number"], dtype=_dtype(value["dtype"]), device=device)
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"the manifest names a dtype {name!r} that this torch does not know")
    return found


# --- saving -----------------------------------------------------------------------------------------------------------


def _divided(held: list[list[_Range]]) -> dict[_Range, int]:
    """Which rank writes each range: where several have it, the one with least to write so far; of buffers the first.

    ValueError if the ranges of a tensor overlap or leave a gap.
    """
    holders: dict[_Range, list[int]] = {}
    for rank, ranges in enumerate(held):
        for one in ranges:
            holders.setdefault(one, []).append(rank)
    loads = [0] * len(held)
    writers: dict[_Range, int] = {}
    for one, candidates in sorted(holders.items(), key=lambda item: len(item[1])):  # those with no choice first
        # Means of a batch norm may differ between ranks, and rank 0's are the ones that count.
        writer = candidates[0] if one.key.startswith("buffers/") else min(candidates, key=loads.__getitem__)
        loads[writer] += (one.stop - one.start) * one.dtype.itemsize
        writers[one] = writer
    whole: dict[str, list[_Range]] = {}
    for one in writers:
        whole.setdefault(one.key, []).append(one)
    for key, ranges in whole.items():
        ranges.sort(key=lambda one: one.start)
        ends = [0, *(one.stop for one in ranges)]
        if [one.start for one in ranges] != ends[:-1] or ends[-1] != math.prod(ranges[0].shape):
            have = ", ".join(f"{one.start}:{one.stop}" for one in ranges)
            raise ValueError(
                f"the ranks together hold the numbers {have} of {key}, of {math.prod(ranges[0].shape)}: "
                "every rank must call save, with its own model of the same group"
            )
    return writers


def _write(path: Path, held: Iterable[_Held]) -> dict[str, Any]:
    """Write a safetensors file tensor by tensor, and force it to disk; its size and checksum."""
    # Wide numbers first, so that each tensor begins at a multiple of its numbers' size.
    ordered = sorted(held, key=lambda one: (-one.range.dtype.itemsize, one.range.key, one.range.start))
    header: dict[str, Any] = {}
    end = 0
    for one in ordered:
        start, end = end, end + (one.range.stop - one.range.start) * one.range.dtype.itemsize
        shape = [one.range.stop - one.range.start]
        header[_entry(one.range)] = {"dtype": CODES[one.range.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    with os.fdopen(descriptor, "wb") as file:
        for block in _blocks(text, ordered):
            digest.update(block)
            size += file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _entry(one: _Range) -> str:
    """A range's name in its file."""
    return f"{one.key}[{one.start}:{one.stop}]"


def _blocks(header: bytes, held: Iterable[_Held]) -> Iterator[Any]:
    yield len(header).to_bytes(8, "little")
    yield header
    for one in held:
        flat = one.tensor.detach().reshape(-1)
        for chunk in flat.split(max(1, CHUNK // one.range.dtype.itemsize)):
            if chunk.numel():
                yield chunk.cpu().contiguous().view(torch.uint8).numpy().data


def _commit(
    path: Path,
    name: str,
    files: list[str],
    written: list[dict[str, Any]],
    parts: Mapping[_Range, int],
    optimizer: dict[str, Any] | None,
    notes: Any,
) -> None:
    """Make the manifest name the new files, then remove what it does not name."""
    tensors: dict[str, dict[str, Any]] = {}
    for one, rank in sorted(parts.items(), key=lambda item: (item[0].key, item[0].start)):
        dtype = str(one.dtype).removeprefix("torch.")
        entry = tensors.setdefault(one.key, {"shape": list(one.shape), "dtype": dtype, "parts": []})
        entry["parts"].append([rank, one.start, one.stop])
    manifest = {
        "format": FORMAT,
        "save": name,
        "ranks": len(files),
        "files": [{"name": file, **facts} for file, facts in zip(files, written, strict=True)],
        "tensors": tensors,
        "optimizer": optimizer,
        "notes": notes,
    }
    manifest = json.loads(json.dumps(manifest))  # as it will be read: keys are text, tuples are lists
    manifest["sha256"] = _digest(manifest)
    _sync_folder(path)  # the files are on disk; now also that they are in this folder
    write_atomic(path / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
    for other in path.iterdir():
        ours = DATA_FILE.fullmatch(other.name) and other.name not in files
        if ours or re.fullmatch(rf"\.{re.escape(MANIFEST)}\.[0-9a-f]+\.tmp", other.name):
            other.unlink(missing_ok=True)


def _check_ours(path: Path) -> None:
    """ValueError if something else than a checkpoint has a manifest here, which a save would replace.

    One of ours may go, however damaged: it begins as ours do, or data files of ours are beside it. So may an empty one,
    which is what an interrupted copy of a folder leaves: there is nothing in it to lose.
    """
    if not (path / MANIFEST).exists():
        return
    with (path / MANIFEST).open("rb") as file:
        start = file.read(256)
    ours = OWN_MANIFEST.match(start) or any(DATA_FILE.fullmatch(other.name) for other in path.iterdir())
    if start.strip(b"\0") and not ours:  # zeros: a file whose size has reached the disk and whose contents have not
        raise ValueError(
            f"{path / MANIFEST} is no manifest of a checkpoint, and would be replaced: save into another folder, or "
            "remove it"
        )


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _named_in_manifest(path: Path, name: str) -> bool:
    try:
        return bool(_read_manifest(path)["save"] == name)
    except (OSError, CheckpointError):
        return False


def _sync_folder(path: Path) -> None:
    if os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- loading ----------------------------------------------------------------------------------------------------------


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint in {str(path)!r}: there is no {MANIFEST}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version, checksum = manifest["format"], manifest.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is no manifest, or is damaged ({type(error).__name__}: {error})") from None
    if version != FORMAT:
        raise CheckpointError(f"{file} has format {version}, this version reads {FORMAT}")
    if _digest(manifest) != checksum:
        raise CheckpointError(f"{file} is damaged: its checksum is wrong")
    return dict(manifest)


def _compare(path: Path, manifest: Mapping[str, Any], model: nn.Module, held: Iterable[_Held]) -> None:
    """Whether these are the weights and buffers of this very model."""
    module, tensors = _module(model), manifest["tensors"]
    own = {f"weights/{names[0]}" for names in names_of(module).values()}
    own |= {f"buffers/{name}" for name, _ in _buffers(module)}
    saved = {key for key in tensors if not key.startswith("optimizer/")}
    for problem, keys in (("is missing from the checkpoint", own - saved), ("is in the checkpoint only", saved - own)):
        if keys:
            more = f", and {len(keys) - 1} more" if len(keys) > 1 else ""
            kind, _, name = min(keys).partition("/")
            raise CheckpointError(
                f"{path} is of another model: {kind.removesuffix('s')} {name} {problem}{more}"
                + ("; a tied weight is saved under the first of its names" if kind == "weights" else "")
            )
    frozen = {f"weights/{name}" for name, p in module.named_parameters() if not p.requires_grad}
    for one in held:
        key, entry = one.range.key, tensors[one.range.key]
        if tuple(entry["shape"]) != one.range.shape:
            raise CheckpointError(
                f"{path} is of another model: {key} has shape {tuple(entry['shape'])} there and {one.range.shape} here"
            )
        there = _dtype(entry["dtype"])
        converted = key in frozen and there.is_floating_point and one.range.dtype.is_floating_point
        if there != one.range.dtype and not converted:
            raise CheckpointError(
                f"{path}: {key} is {there} there and {one.range.dtype} here; make the model in {there}, then convert it"
            )


def _compare_optimizer(
    path: Path, manifest: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    saved = manifest["optimizer"]
    if saved is None:
        raise CheckpointError(f"{path} was saved without an optimizer: load it without one")
    kind = type(optimizer).__name__
    if saved["class"] != kind:
        raise CheckpointError(f"{path} has the state of {saved['class']}, and the optimizer is {kind}")
    settings = _settings(model, optimizer)
    assert settings is not None
    if len(saved["groups"]) != len(settings["groups"]):
        raise CheckpointError(
            f"{path}: the optimizer had {len(saved['groups'])} groups of parameters, and has {len(settings['groups'])}"
        )
    for index, (there, here) in enumerate(zip(saved["groups"], settings["groups"], strict=True)):
        for name in here["parameters"]:
            if name not in there["parameters"]:
                raise CheckpointError(
                    f"{path}: {name} is in group {index} of the optimizer, and was not when it was saved; make the "
                    "same groups"
                )


def _verify(path: Path, manifest: Mapping[str, Any], ranks: _Ranks) -> None:
    """Look at every file's size, and at the contents of this rank's share of the files."""
    if len(manifest["files"]) != manifest["ranks"]:
        raise CheckpointError(f"{path / MANIFEST} names {len(manifest['files'])} files for {manifest['ranks']} ranks")
    for index, facts in enumerate(manifest["files"]):
        file = path / facts["name"]
        if not DATA_FILE.fullmatch(facts["name"]):
            raise CheckpointError(f"{path / MANIFEST} names a file {facts['name']!r} that is none of ours")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: the checkpoint was copied or removed in part")
        if file.stat().st_size != facts["bytes"]:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes, and had {facts['bytes']}: it is damaged")
        if index % ranks.size == ranks.rank:
            with file.open("rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != facts["sha256"]:
                    raise CheckpointError(f"{file} is damaged: its checksum is wrong")


class _Source:
    """Reads ranges of numbers from whichever files have them."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.opened: dict[int, Any] = {}

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """The numbers start … stop − 1, in a row, on the CPU."""
        entry = self.manifest["tensors"][key]
        numbers = torch.empty(stop - start, dtype=_dtype(entry["dtype"]))
        filled = 0
        for rank, first, last in entry["parts"]:
            low, high = max(start, first), min(stop, last)
            if low < high:
                numbers[low - start : high - start] = self._slice(
                    rank, f"{key}[{first}:{last}]", low - first, high - first
                )
                filled += high - low
        if filled != stop - start:
            raise CheckpointError(f"{self.path / MANIFEST}: numbers {start}:{stop} of {key} are in no file")
        return numbers

    def _slice(self, rank: int, name: str, start: int, stop: int) -> Tensor:
        file = self.path / self.manifest["files"][rank]["name"]
        try:
            if rank not in self.opened:
                self.opened[rank] = safe_open(file, framework="pt", device="cpu")
            found: Tensor = self.opened[rank].get_slice(name)[start:stop]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: cannot read {name} ({error})") from None
        return found


def _read_state(
    source: _Source, manifest: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[tuple[Tensor, dict[str, Any]]]:
    """For each of the optimizer's tensors on this rank, its state."""
    saved = manifest["optimizer"]["state"]
    held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    found = []
    for piece in _pieces(model):
        if id(piece.tensor) not in held or piece.name not in saved:
            continue
        entries: dict[str, Any] = {}
        for entry, value in saved[piece.name].items():
            if value != {"file": True}:
                on_cpu = isinstance(value, dict) and value.get("on_cpu")
                entries[entry] = _decoded(value, torch.device("cpu") if on_cpu else piece.tensor.device)
                continue
            key = f"optimizer/{piece.name}/{entry}"
            shape = tuple(manifest["tensors"][key]["shape"])
            if shape == piece.shape:
                numbers = source.read(key, piece.start, piece.stop).view(piece.tensor.shape)
            elif piece.whole:
                numbers = source.read(key, 0, math.prod(shape)).view(shape)
            else:
                raise CheckpointError(
                    f"{source.path}: the state {entry!r} of {piece.name} belongs to the weight as a whole, which is "
                    'cut here: make the model with split="tensors"'
                )
            entries[entry] = numbers.to(piece.tensor.device)
        found.append((piece.tensor, entries))
    return found


# --- the ranks --------------------------------------------------------------------------------------------------------


class _Ranks:
    """The ranks that save or load together: those of the model's group, or this process alone."""

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None) -> None:
        known: Any = group
        if isinstance(model, Sharded):
            known = model.communicator
        elif isinstance(model, DataParallel):
            known = model.group
        if group is not None and known is not group:
            raise ValueError(f"group is for plain modules: {type(model).__name__} has its own, leave it out")
        self.group = known.group if isinstance(known, Communicator) else known
        self.alone = not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if self.alone else dist.get_rank(self.group)
        self.size = 1 if self.alone else dist.get_world_size(self.group)

    def together(self, work: Callable[[], T]) -> list[T]:
        """What `work` returned on each rank; if it raised on one, all raise: that rank its own error."""
        outcome, error = self._attempt(work)
        outcomes = self._gather(outcome if error is None else None)
        self._agree(error)
        return outcomes

    def keep(self, work: Callable[[], T]) -> T:
        """What `work` returned here, once it has returned on all ranks."""
        outcome, error = self._attempt(work)
        self._agree(error)
        assert outcome is not None
        return outcome

    def _attempt(self, work: Callable[[], T]) -> tuple[T | None, Exception | None]:
        try:
            return work(), None
        except Exception as error:
            return None, error

    def _agree(self, error: Exception | None) -> None:
        kinds = (CheckpointError, FileNotFoundError, OSError, TypeError)  # the others raise the first that fits
        kind = next((i for i, kind in enumerate(kinds) if isinstance(error, kind)), None)
        said = self._gather(None if error is None else (kind, str(error)))
        if error is not None:
            raise error
        for rank, other in enumerate(said):
            if other is not None:
                raise (ValueError if other[0] is None else kinds[other[0]])(f"rank {rank}: {other[1]}")

    def _gather(self, value: Any) -> list[Any]:
        if self.alone:
            return [value]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self.group)
        return everyone
