"""One measurement as one JSON line: case, figures, machine, versions, commit, date."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlsys.files import write_atomic


@dataclass(frozen=True)
class Record:
    """What one implementation did on one case.

    status:   "ok", "noisy" (its times spread widely), "missing" (a library is not installed), "smoke" (ran once, not
              timed), "counted" (checked and counted: its time would say nothing), "wrong" (a result was, or an input
              was changed, before or after the timing) or "failed" (raised, exited, died or ran past its limit); the
              last three have no times. `note` says the rest.
    seconds:  median of `runs` runs, with the quartiles; None if not timed.
    ratio_to_*: this implementation's time ÷ the other's, median over rounds: below 1 is faster.
    share:    the roofline's lower bound on this machine ÷ the time: 1.0 is the limit.
    ranks:    the processes that did it together; flops and bytes are of all of them, threads those of each.
    series:   what is no single number, such as a loss curve: lists of what JSON can hold, for pictures.
    """

    benchmark: str
    case: dict[str, Any]
    impl: str
    role: str
    status: str
    note: str = ""
    seconds: float | None = None
    quartiles: tuple[float, float] | None = None
    runs: int = 0
    ratio_to_reference: float | None = None
    ratio_to_peer: float | None = None
    peer: str | None = None
    error: float | None = None
    flops: float = 0.0
    bytes: float = 0.0
    items: float = 0.0
    unit: str = ""
    share: float | None = None
    bound: str | None = None
    limit_flops: float | None = None
    limit_bandwidth: float | None = None
    peak_bytes: int | None = None
    figures: dict[str, float] = field(default_factory=dict)
    series: dict[str, list[Any]] = field(default_factory=dict)
    ranks: int = 1
    device: str = "cpu"
    threads: int = 1
    size: str = "default"
    machine: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    load: float = 0.0
    date: str = ""

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What a later measurement replaces: same benchmark, case, implementation, device and threads."""
        return self.benchmark, json.dumps(self.case, sort_keys=True), self.impl, self.device, self.threads


def from_json(values: dict[str, Any]) -> Record:
    """The record that `dataclasses.asdict` made these values of; ValueError or TypeError for others."""
    unknown = set(values) - {f.name for f in dataclasses.fields(Record)}
    if unknown:
        raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
    return Record(**{**values, "quartiles": tuple(values["quartiles"]) if values.get("quartiles") else None})


def read(path: Path) -> list[Record]:
    """The records of a JSON-lines file; ValueError names the line that is not one."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(from_json(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number} is not a benchmark record: {error}") from error
    return records


def save(records: Iterable[Record], folder: Path) -> list[Path]:
    """Merge into `folder/<machine>/<benchmark>.jsonl`, newer replacing older; each file is written atomically."""
    files: dict[Path, list[Record]] = {}
    for record in records:
        files.setdefault(folder / record.machine["slug"] / f"{record.benchmark}.jsonl", []).append(record)
    for path, new in files.items():
        kept = {r.key: r for r in read(path)} if path.exists() else {}
        kept.update({r.key: r for r in new})
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(dataclasses.asdict(r), sort_keys=True) for r in kept.values()]
        write_atomic(path, "\n".join(lines) + "\n")
    return list(files)
