"""Findings: what the runtime wrote, a line of numbers each, put beside the source."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlsys.kernels.cuda._messages import ATOMIC, DYNAMIC, READ, Here, Index, Launch, Variable, message, number
from mlsys.kernels.cuda._processor import Line

COUNTS = ("access", "tensor", "ran", "matrix")  # of the profiler: no findings


@dataclass(frozen=True)
class Finding:
    """One mistake in a kernel.

    kind: race, out-of-bounds, uninitialised, misaligned, divergent-barrier, divergent-shuffle, deadlock, misuse (of an
    instruction: operands that it does not allow), not-waited-for, assertion, endless-loop, invalid-address,
    division-by-zero or stack-overflow.
    other_line: of the other access, in a race; 0 if there is none.
    """

    kind: str
    message: str
    hint: str
    file: str
    line: int
    source: str
    thread: Index
    block: Index
    other_line: int = 0

    def __str__(self) -> str:
        """As a compiler would say it."""
        text = f"{Path(self.file).name}:{self.line}: {self.kind}: {self.message}"
        if self.source:
            text += f"\n    {self.line} | {self.source}"
        return text + (f"\n  {self.hint}" if self.hint else "")


class Reader:
    """Reads what the runs of a library have found."""

    def __init__(
        self, library: Path, path: Path, text: str, parameters: Sequence[str], grid: Index, block: Index
    ) -> None:
        self.binary, self.path = library, path
        self.lines = text.splitlines()
        self._places: dict[int, tuple[str, int]] = {}
        variables = shared_variables(library)
        self._launch = Launch(parameters, grid, block, variables, lambda pc: self.place(pc)[1], self.lines)

    def read(self, lines: Sequence[Line]) -> list[Finding]:
        """In the order in which one should look at them; each place once."""
        told = [line.fields for line in lines if line.fields[0] not in COUNTS]
        told = [f for f in told if f[0] != "unfinished"] or told  # it says less than where the others were
        self.locate({number(f[1]) for f in told} | {number(f[10]) for f in told if f[0] == "race"})
        found = [self._one(*fields) for fields in told if not self._is_first_guess(*fields)]
        racing = {(f.file, line) for f in found if f.kind == "race" for line in (f.line, f.other_line)}
        early = {(f.file, f.line) for f in found if f.kind == "not-waited-for"}
        kept: dict[object, Finding] = {}
        for finding in found:
            if finding.kind == "uninitialised" and (finding.file, finding.line) in racing:
                continue  # the missing barrier is what has to be said
            if finding.kind == "race" and {(finding.file, finding.line), (finding.file, finding.other_line)} & early:
                continue  # the missing wait is: a copy that nobody waits for races with all that comes after it
            kept.setdefault((finding.kind, finding.file, *sorted((finding.line, finding.other_line))), finding)
        return sorted(kept.values(), key=lambda f: f.kind == "uninitialised")

    def place(self, pc: int) -> tuple[str, int]:
        """File and line of an instruction, by its distance from the library's beginning."""
        return self._places.get(pc, (str(self.path), 0))

    def locate(self, pcs: set[int]) -> None:
        """Look up the places of many instructions at once."""
        wanted = sorted(pc for pc in pcs - self._places.keys() if 0 < pc < 1 << 40)
        if not wanted:
            return
        # One back: what is known is where a call returns to. Of inlined calls, the innermost in a user's file.
        command = ["addr2line", "-i", "-a", "-e", str(self.binary), *(hex(pc - 1) for pc in wanted)]
        at = None
        for row in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            if row.startswith("0x"):
                at = int(row, 16) + 1
                continue
            file, _, line = row.split(" (")[0].rpartition(":")
            name = Path(file).name
            if at is not None and at not in self._places and line.isdigit() and not name.startswith("mlsys_"):
                self._places[at] = (str(self.path) if name in ("<stdin>", "-") else file, int(line))

    def _is_first_guess(self, kind: str, pc: str, *fields: str) -> bool:
        """Whether a race is between an atomic and the plain read before a loop of atomicCAS, which puts it right."""
        if kind != "race" or {fields[5], fields[9]} != {str(READ), str(ATOMIC)}:
            return False
        line = self.place(number(pc) if fields[5] == str(READ) else number(fields[8]))[1]
        return any("atomicCAS" in text for text in self.lines[max(line - 1, 0) : line + 6])

    def _one(self, kind: str, pc: str, named: str, at: str, thread: str, block: str, *fields: str) -> Finding:
        where = (named, int(at)) if named else self.place(number(pc))
        here = Here(where[1], _index(thread), _index(block))
        said = message(kind, fields, self._launch, here)
        who = said.thread or here.thread, said.block or here.block
        file, line = where[0], said.line or where[1]
        return Finding(said.kind, said.text, said.hint, file, line, self._source(file, line), *who, said.other_line)

    def _source(self, file: str, line: int) -> str:
        if Path(file) == self.path:
            lines = self.lines
        else:
            lines = Path(file).read_text(errors="replace").splitlines() if Path(file).is_file() else []
        return lines[line - 1].strip() if 0 < line <= len(lines) else ""


def shared_variables(library: Path) -> list[Variable]:
    """The static shared variables of a library, and the room for dynamic ones, by their offset from the first."""
    command = ["nm", "-SC", "--defined-only", str(library)]
    start, found = 0, []
    for row in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        address, *rest = row.split(maxsplit=3)
        if rest and rest[-1] == "__bss_start":
            start = int(address, 16)
        elif len(rest) == 3 and rest[1] in "bBuV" and len(rest[0]) == 16:
            found.append((int(address, 16), int(rest[0], 16), rest[2].rsplit("::", 1)[-1]))
    return sorted((Variable(name, at - start, size) for at, size, name in found if at >= start), key=lambda v: v.offset)


def static_variables(library: Path) -> list[Variable]:
    """Without the room for dynamic ones."""
    return [v for v in shared_variables(library) if v.name != DYNAMIC]


def _index(text: str) -> Index:
    x, y, z = map(int, text.split(","))
    return x, y, z
