"""One self-contained HTML page: tables, plots, and the machine they were measured on. No scripts, no links to fetch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlsys.bench import find, plots, tables
from mlsys.bench.records import Record
from mlsys.files import write_atomic


def question(name: str) -> str:
    """The question a benchmark answers: the first line of its file's docstring."""
    import ast

    package, _, technique = name.partition(".")
    tree = ast.parse((find.folder() / package / f"{technique}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or name).partition("\n")[0]


def pictures(name: str, records: Sequence[Record]) -> list[str]:
    """The benchmark's plots and further pictures as SVG, those that the records can fill."""
    bench = find.load(name)
    drawn = [plots.draw(plot, records) for plot in bench.plots] + [draw(records) for draw in bench.pictures.values()]
    return [svg for svg in drawn if svg]


def write(records: Sequence[Record], folder: Path) -> Path:
    """Write `folder/index.html` atomically and return its path."""
    import jinja2

    page = folder / "index.html"
    names = list(dict.fromkeys(r.benchmark for r in records))
    sections = []
    for name in names:
        mine = [r for r in records if r.benchmark == name]
        sections.append(
            {
                "name": name,
                "question": question(name),
                "plots": pictures(name, mine),
                "summary": tables.html(tables.summary_rows(mine)),
                "detail": tables.html(tables.detail_rows(mine)),
            }
        )
    machine = records[0].machine
    facts = [(key, value) for key, value in machine.items() if key not in ("versions", "slug") and value]
    facts += [("threads", ", ".join(str(n) for n in sorted({r.threads for r in records})))]
    facts += [(key, value) for key, value in machine["versions"].items()]
    roofs = {
        f"limits, {r.case.get('dtype', 'float32')}, {r.threads} threads": (
            f"{tables.amount(r.limit_flops, 'FLOP/s')}, {tables.amount(r.limit_bandwidth, 'B/s')} (measured)"
        )
        for r in records
        if r.limit_flops
    }
    facts += [*roofs.items(), ("commit", records[0].commit or "not a checkout"), ("date", records[0].date)]
    facts += [("load when started", records[0].load)]
    template = (Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8")
    html = (
        jinja2.Environment(autoescape=True)
        .from_string(template)
        .render(
            sections=sections,
            roofline=plots.roofline(records),
            machine=facts,
            machine_line=tables.where_and_when(records),
        )
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(page, html)
    return page
