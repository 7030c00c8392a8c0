"""A launch as a value: which kernel of the library's files, on what grid, with what arguments.

What a variant does is a list of launches. The same list is run, checked, profiled and printed, so that the geometry
that is tested is the one that is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mlsys.kernels.cuda import File, Finding, Profile, check, load, profile, source

CTYPES = {
    torch.float32: "float",
    torch.bfloat16: "__nv_bfloat16",
    torch.int32: "int",
    torch.uint8: "unsigned char",
}
_SMS, _THREADS_PER_SM = 132, 2048  # of an H100: where there is no GPU, the grid is what it would be there


@dataclass(frozen=True)
class Launch:
    """One kernel on one grid; `file` is the library's, without its ending: "reduction.shuffle"."""

    file: str
    kernel: str
    grid: int | tuple[int, ...]
    block: int | tuple[int, ...]
    args: tuple[Any, ...]
    shared: int = 0

    def run(self, *, order: int = 0) -> None:
        """Launch it where its tensors are; `order` of the threads on the CPU, as for `cuda.Kernel`."""
        _file(self.file)[self.kernel](self.grid, self.block, *self.args, shared=self.shared, order=order)

    def check(self) -> list[Finding]:
        """What is wrong with it; its tensors stay as they are."""
        return check(_file(self.file)[self.kernel], self.grid, self.block, *self.args, shared=self.shared)

    def profile(self) -> Profile:
        """What it moves and computes, line by line; its tensors stay as they are."""
        return profile(_file(self.file)[self.kernel], self.grid, self.block, *self.args, shared=self.shared)


def run(launches: Sequence[Launch], *, order: int = 0) -> None:
    """One after the other."""
    for launch in launches:
        launch.run(order=order)


def check_each(launches: Sequence[Launch]) -> list[Finding]:
    """What is wrong with any of them; each is checked with what those before it have left, then run."""
    findings = []
    for launch in launches:
        findings += launch.check()
        launch.run()
    return findings


def profile_each(launches: Sequence[Launch]) -> list[Profile]:
    """What each moves and computes, with what those before it have left."""
    profiles = []
    for launch in launches:
        profiles.append(launch.profile())
        launch.run()
    return profiles


def fill(x: Tensor, threads: int, blocks: int) -> int:
    """How many of `blocks` blocks to launch if each can do the work of several: as many as x's GPU holds at once."""
    sms = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else _SMS
    return max(1, min(blocks, sms * (_THREADS_PER_SM // threads)))


def ceil_div(a: int, b: int) -> int:
    """The least number of b's that hold a."""
    return -(-a // b)


def warps(items: int, most: int = 256) -> int:
    """Threads of a block with an item each: whole warps, at most `most`."""
    return min(most, max(1, ceil_div(items, 32)) * 32)


@cache
def _file(name: str) -> File:
    return load(source(name))
