"""Which of a kernel's configs is the fastest here: timed once for a device and a kind of call, and remembered on disk.

What is remembered is one small JSON file for each kernel and key, in a folder for the device and the version of Triton:
`<cache>/triton/NVIDIA_H200-sm90-triton3.9.0/matmul.3f2a….json`. Delete it, or `mlsys tune`, to time again.

Nothing is timed under the interpreter, where the first config is taken, and nothing when a config is given.

See also:
    `mlsys.commands.tune` (the same from the command line), `mlsys.kernels._triton` (`Config`).
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

from mlsys.files import cache_folder, write_atomic
from mlsys.kernels._triton import INTERPRETED, Config, next_power_of_2

WARM_UP, ROUNDS = 3, 15  # calls of each config before it is timed, and timed
FLUSH = 256 << 20  # bytes written before each timed call: more than any GPU's L2 holds


@dataclass(frozen=True)
class Tuned:
    """What was found: the times in milliseconds of the configs that could be launched, and the fastest of them."""

    kernel: str
    key: str
    device: str
    chosen: str
    milliseconds: dict[str, float]


def tuned(
    kernel: str,
    key: str,
    configs: Sequence[Config],
    run: Callable[[Config], Any],
    device: torch.device,
    config: Config | None = None,
) -> Config:
    """The config for a launch: the one given; the first, under the interpreter; else the fastest one here.

    kernel:  its name, "softmax.forward".
    key:     what the choice depends on, in words: "columns=4096 float32". Sizes that vary freely are best rounded, by
             `size`, or each new one is tuned for.
    configs: those that may be taken for this call, the one most likely to be right first.
    run:     launches the kernel with a config. It is called many times, so that it must not change what it reads.
    RuntimeError if there is nothing to choose from, or no config can be launched, or if it would have to be timed
    while a CUDA graph is captured.
    """
    if config is not None:
        return config
    if not configs:
        raise RuntimeError(f"{kernel} has no config for {key}")
    if INTERPRETED.value or len(configs) == 1:
        return configs[0]
    known = _known(entry_path(kernel, key, device), tuple(configs))
    if not known:
        known.append(_remembered(kernel, key, configs, device) or time_all(kernel, key, configs, run, device))
    return known[0]


def size(n: int) -> str:
    """A size as a part of a key: n is rounded up to a power of 2, since neighbours take the same config."""
    return f"<={next_power_of_2(n)}"


def time_all(
    kernel: str, key: str, configs: Sequence[Config], run: Callable[[Config], Any], device: torch.device
) -> Config:
    """Time all configs on the GPU, write down what was found, and return the fastest.

    They take turns, so that a change of the clock rate is a change for all; the second-level cache is overwritten
    before each call, so that every one starts from memory.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{kernel} is not tuned for {key} yet, and cannot be while a CUDA graph is captured: call it once before"
        )
    able: dict[Config, list[float]] = {}
    refusals = []
    with torch.cuda.device(device):
        for one in configs:
            try:
                for _ in range(WARM_UP):
                    run(one)
                able[one] = []
            except triton.runtime.errors.OutOfResources as error:  # too much shared memory for this GPU: not an error
                refusals.append(f"{one}: {error}")
        if not able:
            raise RuntimeError(f"{kernel} cannot be launched with any of its configs: {'; '.join(refusals)}")
        flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)
        for _ in range(ROUNDS):
            for one, times in able.items():
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                flush.zero_()
                start.record()
                run(one)
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
    medians = {one: statistics.median(times) for one, times in able.items()}
    best = min(medians, key=medians.__getitem__)
    entry = {
        "kernel": kernel,
        "key": key,
        "device": torch.cuda.get_device_name(device),
        "chosen": str(best),
        "milliseconds": {str(one): round(took, 6) for one, took in sorted(medians.items(), key=lambda item: item[1])},
        "refused": refusals,
    }
    path = entry_path(kernel, key, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(entry, indent=1, ensure_ascii=False) + "\n")
    return best


def entry_path(kernel: str, key: str, device: torch.device) -> Path:
    """Where the choice for this kernel and key is remembered."""
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    return _folder() / _place(device) / f"{kernel}.{digest}.json"


def remembered() -> list[Tuned]:
    """All that was found on any device, by kernel and key."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(_folder().glob("*/*.json"))]
    entries = [Tuned(e["kernel"], e["key"], e["device"], e["chosen"], e["milliseconds"]) for e in found]
    return sorted(entries, key=lambda e: (e.device, e.kernel, e.key))


def forget() -> None:
    """Let what this process has read be read again: after files were changed."""
    _known.cache_clear()


def _folder() -> Path:
    return cache_folder() / "triton"


@lru_cache(maxsize=16)
def _place(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return re.sub(r"\W+", "_", torch.cuda.get_device_name(device)) + f"-sm{major}{minor}-triton{triton.__version__}"


@lru_cache(maxsize=1024)
def _known(path: Path, configs: tuple[Config, ...]) -> list[Config]:
    """The choice of this process, once it is known: a list of one. A file is read once, not before every launch."""
    return []


def _remembered(kernel: str, key: str, configs: Sequence[Config], device: torch.device) -> Config | None:
    """What the file says, if there is one that chose among these very configs."""
    path = entry_path(kernel, key, device)
    if not path.is_file():
        return None
    entry = json.loads(path.read_text(encoding="utf-8"))
    timed = {*entry["milliseconds"], *(refusal.partition(": ")[0] for refusal in entry["refused"])}
    return (
        next((one for one in configs if str(one) == entry["chosen"]), None) if timed == {*map(str, configs)} else None
    )
