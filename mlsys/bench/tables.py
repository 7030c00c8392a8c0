"""Records as Markdown tables: a summary, one row a case, and the detail, one row an implementation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from tabulate import tabulate

from mlsys.bench.core import describe
from mlsys.bench.records import Record


def seconds(value: float | None) -> str:
    """Three significant digits with the unit that fits: `12.3 ms`."""
    if value is None:
        return "–"
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= scale:
            return f"{_digits(value / scale)} {unit}"
    return f"{_digits(value / 1e-9)} ns"


def amount(value: float | None, unit: str, step: float = 1e3) -> str:
    """Three significant digits with a prefix: `93.1 GFLOP/s`, `54.0 MiB` (step=1024)."""
    if value is None:
        return "–"
    prefixes = ["", "Ki", "Mi", "Gi", "Ti"] if step == 1024 else ["", "k", "M", "G", "T", "P"]
    power = 0
    while value >= step and power < len(prefixes) - 1:
        value, power = value / step, power + 1
    return f"{_digits(value)} {prefixes[power]}{unit}".rstrip()


def _digits(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _figure(value: float) -> str:
    """A count as it is, anything else with four significant digits."""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.4g}"


def times(value: float | None) -> str:
    """A ratio, or a dash where the timing was too noisy for one."""
    if value is None:
        return "–"
    return f"{value:.2g}×" if value < 0.095 else f"{value:.2f}×"


def percent(value: float | None) -> str:
    """A share of the machine's limit."""
    return "–" if value is None else f"{100 * value:.0f}%"


def by_case(records: Sequence[Record]) -> list[list[Record]]:
    """Those that may stand in one row: of one case, device and number of threads; in the order in which they came."""
    groups: dict[tuple[str, str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((json.dumps(record.case, sort_keys=True), record.device, record.threads), []).append(record)
    return list(groups.values())


def settings(records: Sequence[Record]) -> Callable[[Record], str]:
    """Says of a record on which device and how many threads, as far as these records differ in that: `2 threads`."""
    devices, threads = {r.device for r in records}, {r.threads for r in records}

    def words(record: Record) -> str:
        device = record.device if len(devices) > 1 else ""
        count = f"{record.threads} thread{'s' * (record.threads > 1)}" if len(threads) > 1 else ""
        return ", ".join(filter(None, (device, count)))

    return words


def _row_names(records: Sequence[Record]) -> Callable[[Record], str]:
    """What a record's row is called: its case, and its setting where there are several."""
    setting = settings(records)
    return lambda record: ", ".join(filter(None, (describe(record.case), setting(record))))


def implementations(records: Sequence[Record]) -> list[str]:
    """The implementations' names: the reference, variants, ours, yours, then peers."""
    order = {"reference": 0, "variant": 1, "ours": 2, "yours": 3, "peer": 4}
    roles = {r.impl: order.get(r.role, 9) for r in records}
    return sorted(roles, key=lambda name: roles[name])


def _cell(record: Record | None) -> str:
    if record is None:
        return ""
    if record.seconds is None:
        return record.status
    mark = " (noisy)" if record.status == "noisy" else ""
    return seconds(record.seconds) + mark


def summary(records: Sequence[Record]) -> str:
    """`summary_rows` as Markdown."""
    return _render(summary_rows(records), "pipe")


def detail(records: Sequence[Record]) -> str:
    """`detail_rows` as Markdown."""
    return _render(detail_rows(records), "pipe")


def html(rows: Sequence[dict[str, str]]) -> str:
    """Rows as an HTML table, escaped."""
    return _render(rows, "html")


def summary_rows(records: Sequence[Record]) -> list[dict[str, str]]:
    """One row a case: times, ours ÷ the reference and ÷ the fastest peer, share of the limit, figures such as recall.

    What is said of our implementation is said of the user's beside it, in columns of its own; figures are of ours.
    """
    names = implementations(records)
    ours = [name for name in names if any(r.impl == name and r.role in ("ours", "yours") for r in records)]
    ours = ours or [name for name in names if any(r.impl == name and r.role == "reference" for r in records)]
    memory = any(r.peak_bytes is not None for r in records)
    items = any(r.items for r in records)
    row_name = _row_names(records)
    rows = []
    for group in by_case(records):
        found = {r.impl: r for r in group}
        row = {"case": row_name(group[0])} | {name: _cell(found.get(name)) for name in names}
        several_peers = len([r for r in group if r.role == "peer"]) > 1
        for name in ours:
            record = found.get(name)
            if record is None:
                continue
            if record.role != "reference":
                row[f"{name} ÷ reference"] = times(record.ratio_to_reference)
            row[f"{name} ÷ peer"] = times(record.ratio_to_peer) + (
                f" ({record.peer})" if record.peer and several_peers else ""
            )
            row[f"{name} of limit"] = percent(record.share)
            if items and record.seconds:
                row[f"{name} throughput"] = f"{amount(record.items / record.seconds, record.unit)}/s"
        if memory:
            for name in names:
                row[f"peak {name}"] = amount(found[name].peak_bytes, "B", 1024) if name in found else ""
        for name in ours[:1]:
            if name in found:
                row |= {title: _figure(value) for title, value in found[name].figures.items()}
        rows.append(row)
    return rows


def detail_rows(records: Sequence[Record]) -> list[dict[str, str]]:
    """One row an implementation and case, with every figure."""
    columns: dict[str, Callable[[Record], str]] = {
        "case": _row_names(records),
        "implementation": lambda r: f"{r.impl} ({r.role})",
        "time": _cell,
        "quartiles": lambda r: f"{seconds(r.quartiles[0])} – {seconds(r.quartiles[1])}" if r.quartiles else "–",
        "runs": lambda r: str(r.runs),
        "÷ reference": lambda r: times(r.ratio_to_reference),
        "÷ fastest peer": lambda r: times(r.ratio_to_peer),
        "rate": _rate,
        "of limit": lambda r: f"{percent(r.share)} ({r.bound})" if r.share is not None else "–",
    }
    if any(r.peak_bytes is not None for r in records):
        columns["peak memory"] = lambda r: amount(r.peak_bytes, "B", 1024)
    columns["error"] = lambda r: "–" if r.error is None else f"{r.error:.1e}"
    for name in dict.fromkeys(name for r in records for name in r.figures):
        columns[name] = lambda r, name=name: _figure(r.figures[name]) if name in r.figures else "–"  # type: ignore[misc]
    if any(r.note for r in records):
        columns["note"] = lambda r: r.note
    return [{title: cell(r) for title, cell in columns.items()} for r in records]


def _rate(record: Record) -> str:
    if record.seconds is None:
        return "–"
    if record.items:
        return f"{amount(record.items / record.seconds, record.unit)}/s"
    return amount(record.flops / record.seconds, "FLOP/s")


def where_and_when(records: Sequence[Record]) -> str:
    """The line under a table: machine, threads, versions, commit and date, all of them where the records differ."""
    machines = [
        f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']:.0f} GiB{', ' + m['gpu'] if m['gpu'] else ''}; {m['system']}"
        for m in (r.machine for r in records)
    ]
    threads = sorted({r.threads for r in records})
    versions: dict[str, list[str]] = {"Python": [r.machine["python"] for r in records]}
    for record in records:
        for name, version in record.machine["versions"].items():
            versions.setdefault(name, []).append(version)
    commits = [r.commit for r in records if r.commit]
    dates = sorted({r.date for r in records})
    parts = [
        _all(machines),
        f"{_all(threads)} thread{'s' if threads != [1] else ''}" + " a rank" * any(r.ranks > 1 for r in records),
        ", ".join(f"{name} {_all(seen)}" for name, seen in versions.items()),
        f"commit {_all(commits)}" if commits else "",
        dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}",
    ]
    return "; ".join(filter(None, parts)) + "."


def _all(values: Sequence[object]) -> str:
    """Each once, in the order in which they came: `2.13 and 2.14`."""
    return " and ".join(map(str, dict.fromkeys(values)))


def _render(rows: Sequence[dict[str, str]], form: str) -> str:
    titles = list(dict.fromkeys(title for row in rows for title in row))
    cells = [[row.get(title, "") for title in titles] for row in rows]
    align = ["left" if title in ("case", "implementation", "note") else "right" for title in titles]
    return str(tabulate(cells, headers=titles, tablefmt=form, colalign=align, disable_numparse=True))
