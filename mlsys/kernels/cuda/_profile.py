"""What a kernel moves and computes, line by line: what the runtime counted, put beside the source."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlsys.kernels.cuda._findings import Reader
from mlsys.kernels.cuda._messages import number
from mlsys.kernels.cuda._processor import Line

SECTOR = 32  # bytes: the piece in which a GPU's memory is read and written
_KINDS = ("read", "write", "atomic")


@dataclass(frozen=True)
class Access:
    """What one line does with one kind of memory, over the whole launch.

    space: "global" (tensors) or "shared". bytes: of one lane's access. requests: of warps. transactions: sectors of 32
    bytes (global), or passes over the 32 banks (shared); ideal: the fewest that would do for the bytes wanted.
    """

    file: str
    line: int
    space: str
    kind: str
    bytes: int
    requests: int
    lanes: int
    transactions: int
    ideal: int

    @property
    def efficiency(self) -> float:
        """Of what was moved, the share that was wanted; 1 is best."""
        return self.ideal / self.transactions if self.transactions else 1.0


@dataclass(frozen=True)
class Profile:
    """A launch, counted. `print(profile)` shows the source with the counts in its margin.

    tensors: of each argument, the bytes that were read and written at least once: the least that has to be moved.
    flops: additions, multiplications, divisions, roots; a fused multiply-add is two.
    """

    kernel: str
    path: Path
    source: tuple[str, ...]
    accesses: tuple[Access, ...]
    tensors: dict[str, tuple[int, int]]
    flops: int

    def _sum(self, space: str, what: str) -> int:
        return sum(getattr(a, what) for a in self.accesses if a.space == space)

    @property
    def sectors(self) -> int:
        """Of 32 bytes, between the caches and the processors."""
        return self._sum("global", "transactions")

    @property
    def requests(self) -> int:
        """Of warps, for tensors."""
        return self._sum("global", "requests")

    @property
    def bytes(self) -> int:
        """In those sectors."""
        return SECTOR * self.sectors

    @property
    def ideal_bytes(self) -> int:
        """If each request had moved only the sectors that its bytes fill."""
        return SECTOR * self._sum("global", "ideal")

    @property
    def least_bytes(self) -> int:
        """Each touched sector of each tensor once: with a cache that forgets nothing."""
        return sum(read + written for read, written in self.tensors.values())

    @property
    def shared_passes(self) -> int:
        """Over the banks of shared memory."""
        return self._sum("shared", "transactions")

    @property
    def conflicts(self) -> int:
        """Passes over the banks that conflict-free accesses would not have needed."""
        return self.shared_passes - self._sum("shared", "ideal")

    @property
    def intensity(self) -> float:
        """FLOPs per byte moved between the caches and the processors."""
        return self.flops / self.bytes if self.bytes else float("inf")

    def __str__(self) -> str:
        """The source with its counts."""
        by_line: dict[int, list[Access]] = defaultdict(list)
        for a in self.accesses:
            if Path(a.file) == self.path:
                by_line[a.line].append(a)
        head = f"{'memory':>15} {'requests':>9} {'moved':>9} {'each':>6} {'best':>5}"
        rows = [head, "-" * len(head)]
        shown = _around(sorted(by_line), len(self.source))
        last = 0
        for line in shown:
            if line > last + 1:
                rows.append(f"{'':>{len(head)}} |  …")
            text = f"{line:>4} {self.source[line - 1]}"
            for a in [*by_line.get(line, ())] or [None]:
                margin = f"{'':>{len(head)}}" if a is None else _margin(a)
                rows.append(f"{margin} | {text}".rstrip())
                text = ""
            last = line
        where = "".join(
            f"\n  {name}: {read:,} bytes read, {written:,} written" for name, (read, written) in self.tensors.items()
        )
        rows += [
            "",
            f"{self.kernel}: {self.flops:,} FLOPs, {self.bytes:,} bytes in {self.sectors:,} sectors: "
            f"{self.intensity:.3g} FLOP/byte",
            f"  with full sectors {self.ideal_bytes:,} bytes would do, with a perfect cache {self.least_bytes:,}",
            f"  shared memory: {self.shared_passes:,} passes, {self.conflicts:,} of them for bank conflicts" + where,
        ]
        return "\n".join(rows)


def read_profile(kernel: str, lines: Sequence[Line], reader: Reader, names: Sequence[str]) -> Profile:
    """From the runtime's lines."""
    counted = [x.fields for x in lines if x.fields[0] == "access"]
    reader.locate({number(fields[1]) for fields in counted})
    sums: dict[tuple[str, int, str, str, int], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for fields in counted:
        shared, kind, size, *counts = map(int, fields[6:])
        key = (*reader.place(number(fields[1])), "shared" if shared else "global", _KINDS[kind], size)
        sums[key] = [a + b for a, b in zip(sums[key], counts, strict=True)]
    accesses = tuple(Access(*key, *numbers) for key, numbers in sorted(sums.items()))
    tensors = {}
    for fields in (x.fields for x in lines if x.fields[0] == "tensor"):
        index, read, written = map(int, fields[6:])
        tensors[names[index] if index < len(names) and names[index] else f"argument {index}"] = (
            SECTOR * read,
            SECTOR * written,
        )
    runs = {number(x.fields[1]): int(x.fields[6]) for x in lines if x.fields[0] == "ran"}
    matrix = sum(int(x.fields[6]) for x in lines if x.fields[0] == "matrix")
    per_block = _flops_of_blocks(reader.binary) if runs else {}
    flops = matrix + sum(count * per_block.get(at, 0) for at, count in runs.items())
    return Profile(kernel, reader.path, tuple(reader.lines), accesses, tensors, flops)


def _margin(a: Access) -> str:
    unit = a.transactions / a.requests
    best = a.ideal / a.requests
    return f"{a.space + ' ' + a.kind:>15} {a.requests:>9,} {a.transactions:>9,} {unit:>6.1f} {best:>5.1f}"


def _around(lines: Sequence[int], total: int) -> list[int]:
    """The lines, and two before and after each."""
    return sorted({n for line in lines for n in range(line - 2, line + 3) if 1 <= n <= total})


# x86-64 and aarch64: one operation; a fused multiply-add, two
_ONE = re.compile(r"v?(?:add|sub|mul|div|sqrt)s[sd]|f(?:add|sub|mul|div|sqrt|nmul)")
_TWO = re.compile(r"vfn?m(?:add|sub)(?:132|213|231)s[sd]|fn?m(?:add|sub)")
_ROW = re.compile(r"^\s*([0-9a-f]+):\t(?:[0-9a-f]{2,8} ?)+\s*\t?(\S+)\s*(.*)")


def _flops_of_blocks(library: Path) -> dict[int, int]:
    """FLOPs of each basic block, by the address after the call that counts it."""
    command = ["objdump", "-d", "--section=.text", str(library)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    flops: dict[int, int] = {}
    block, starts = None, False
    for row in out.splitlines():
        match = _ROW.match(row)
        if match is None:
            continue
        address, name, operands = int(match[1], 16), match[2], match[3]
        if starts:
            block = address
            flops[block] = 0
        starts = "__sanitizer_cov_trace_pc" in operands
        if starts or name in ("jmp", "ret", "retq", "b", "br"):
            block = None
        elif block is not None and name.startswith(("add", "sub", "mul", "div", "sqrt", "v", "f")):
            is_float = (
                name.startswith(("v", "add", "sub", "mul", "div", "sqrt"))
                or re.search(r"\b[sd]\d+\b", operands) is not None
            )
            flops[block] += 2 * bool(_TWO.fullmatch(name)) + bool(is_float and _ONE.fullmatch(name))
    return flops
