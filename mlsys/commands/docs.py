"""`mlsys docs`: fill the tables and pictures of README and docs/ from saved records. Nobody types a number.

A page asks for a table with two comment lines, `<!-- bench NAME -->` and
`<!-- /bench -->`; what stands between them is written by this command, with
the machine and the date of the measurement. `<!-- list -->` does the same for
the table of techniques, `<!-- claims -->` for reproduced numbers, and
`<!-- run cost train … -->` shows what that `mlsys` command prints.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlsys.commands import UsageError

if TYPE_CHECKING:
    from mlsys.bench.records import Record

START = r"<!-- (?:bench|list|claims|run)(?: [^\n]+?)? -->"
# A block holds no start of another: one whose end was lost must not swallow what follows.
MARKED = re.compile(rf"(<!-- (bench|list|claims|run)( [^\n]+?)? -->\n)(?:(?!{START}).)*?(<!-- /\2 -->)", re.DOTALL)
SHOWN = ("cost", "claims", "list", "show", "roofline")  # commands that only print, which a page may show


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mlsys docs`."""
    parser.add_argument("--root", type=Path, default=Path(), metavar="FOLDER", help="the checkout (default: here)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")


def run(args: argparse.Namespace) -> int:
    """Write, or with --check compare, every page that has markers and every picture they show."""
    from mlsys.files import write_atomic

    root: Path = args.root
    if not (root / "README.md").is_file():
        raise UsageError(f"--root {root}: no README.md there; run this in a checkout of mlsys")
    stale = []
    for path, text in pages(root).items():
        if path.exists() and _same(path, text):
            continue
        stale.append(path)
        if not args.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text)
    for path in stale:
        print(f"{'out of date' if args.check else 'wrote'} {path}", file=sys.stderr)
    return 1 if args.check and stale else 0


def _same(path: Path, text: str) -> bool:
    """A page must be equal; a picture must be of the same records, since each matplotlib draws a little differently."""
    old = path.read_text(encoding="utf-8")
    return old.splitlines()[-1:] == text.splitlines()[-1:] if path.suffix == ".svg" else old == text


def _digest(measured: Sequence[Record]) -> str:
    """A comment that says from which records, and by which code, a picture was drawn."""
    from mlsys.bench import find, plots

    code = [Path(plots.__file__), find.path(measured[0].benchmark)]
    text = "\n".join([*map(repr, measured), *(path.read_text(encoding="utf-8") for path in code)])
    return f"<!-- drawn from records {hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n"


def pages(root: Path) -> dict[Path, str]:
    """Every generated file of a checkout and what it should hold."""
    wanted: dict[Path, str] = {}
    for page in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        starts, blocks = len(re.findall(START, text)), len(MARKED.findall(text))
        if starts != blocks:
            raise UsageError(f"{page} starts {starts} blocks and ends {blocks}: an end marker `<!-- /… -->` is missing")
        if blocks:
            wanted[page] = MARKED.sub(lambda found, page=page: _fill(found, page, root, wanted), text)  # type: ignore[misc]
    return wanted


def _fill(found: re.Match[str], page: Path, root: Path, wanted: dict[Path, str]) -> str:
    start, kind, name, end = found.groups()
    if kind == "bench":
        body = _measured((name or "").strip(), page, root, wanted)
    elif kind == "list":
        body = _techniques()
    elif kind == "run":
        body = _printed((name or "").strip())
    else:
        from mlsys.claims import as_markdown

        body = as_markdown()
    return f"{start}\n{body}\n\n{end}"


def _printed(command: str) -> str:
    """A command and what it prints, as a block; it has to succeed."""
    from mlsys import cli

    words = shlex.split(command)
    if not words or words[0] not in SHOWN:
        raise UsageError(f"`mlsys {command}`: a page may show what {', '.join(SHOWN)} print, and no other command")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            status = cli.main(words)
        except SystemExit as end:  # --help
            status = int(end.code or 0)
    if status:
        raise UsageError(f"`mlsys {command}`, which a page shows, ended with status {status}")
    return f"```text\n$ mlsys {command}\n{out.getvalue().rstrip()}\n```"


def _techniques() -> str:
    from tabulate import tabulate

    from mlsys import catalog

    rows = [(f"`{t.name}`", t.idea, t.paper) for t in catalog.techniques()]
    return str(tabulate(rows, headers=("technique", "idea", "paper"), tablefmt="pipe"))


def _measured(name: str, page: Path, root: Path, wanted: dict[Path, str]) -> str:
    from mlsys.bench import records, report, tables

    found = sorted((root / "results").glob(f"*/{name}.jsonl"))
    if not found:
        return f"Not yet measured: `mlsys bench {name} --save`, then `make docs`."
    parts = []
    for path in found:
        measured = records.read(path)
        parts.append(f"{tables.summary(measured)}\n\n{tables.where_and_when(measured)}")
        for number, svg in enumerate(report.pictures(name, measured), 1):
            picture = root / "docs" / "img" / f"{path.parent.name}.{name}.{number}.svg"
            wanted[picture] = svg + _digest(measured)
            link = Path(os.path.relpath(picture, page.parent)).as_posix()
            if number == 1 or page.parent != root:  # README shows one picture, the technique's page shows all
                parts.append(f"![{name}: {report.question(name)}]({link})")
    return "\n\n".join(parts)
