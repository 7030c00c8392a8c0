"""`mlsys docs` fills what is between markers from records, and nothing else; our own pages are up to date."""

import dataclasses
import json
from pathlib import Path

import pytest

from mlsys.bench.records import Record
from mlsys.cli import main

ROOT = Path(__file__).parents[2]
HERE = {
    "slug": "toy",
    "cpu": "Toy CPU",
    "cores": 2,
    "memory_gib": 4.0,
    "gpu": None,
    "system": "Linux",
    "python": "3.11",
}
PAGE = "before\n<!-- bench attention.flash -->\nstale figures\n<!-- /bench -->\nafter\n"


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(PAGE)
    records = [
        Record(
            "attention.flash",
            {"n": n, "heads": 8, "dtype": "float32", "causal": True, "backward": False},
            "flash",
            "ours",
            "ok",
            seconds=n * 1e-6,
            quartiles=(n * 1e-6, n * 1e-6),
            runs=5,
            peak_bytes=n,
            date="2026-01-02",
            machine={**HERE, "versions": {}},
        )
        for n in (512, 1024)
    ]
    folder = tmp_path / "results" / "toy"
    folder.mkdir(parents=True)
    (folder / "attention.flash.jsonl").write_text("\n".join(json.dumps(dataclasses.asdict(r)) for r in records))
    return tmp_path


def test_fills_between_the_markers_only(checkout):
    assert main(["docs", "--root", str(checkout)]) == 0
    text = (checkout / "README.md").read_text()
    assert text.startswith("before\n<!-- bench attention.flash -->\n")
    assert text.endswith("<!-- /bench -->\nafter\n")
    assert "stale figures" not in text
    assert "512 µs" in text
    assert "Toy CPU" in text
    picture = checkout / "docs" / "img" / "toy.attention.flash.1.svg"
    assert picture.read_text().startswith("<svg")
    assert "docs/img/toy.attention.flash.1.svg" in text


def test_check_writes_nothing_and_fails_until_filled(checkout):
    assert main(["docs", "--root", str(checkout), "--check"]) == 1
    assert (checkout / "README.md").read_text() == PAGE
    main(["docs", "--root", str(checkout)])
    assert main(["docs", "--root", str(checkout), "--check"]) == 0


def test_a_picture_of_other_records_is_out_of_date_and_one_drawn_by_another_matplotlib_is_not(checkout):
    main(["docs", "--root", str(checkout)])
    picture = checkout / "docs" / "img" / "toy.attention.flash.1.svg"
    picture.write_text(picture.read_text().replace("<path", "<path ", 1))
    assert main(["docs", "--root", str(checkout), "--check"]) == 0
    saved = checkout / "results" / "toy" / "attention.flash.jsonl"
    saved.write_text(saved.read_text().replace('"runs": 5', '"runs": 6'))
    assert main(["docs", "--root", str(checkout), "--check"]) == 1


def test_what_a_command_prints_is_shown(checkout):
    page = checkout / "README.md"
    page.write_text("<!-- run cost models -->\n<!-- /run -->\n")
    assert main(["docs", "--root", str(checkout)]) == 0
    assert "$ mlsys cost models\n" in page.read_text()
    assert "Touvron et al. 2023" in page.read_text()
    assert main(["docs", "--root", str(checkout), "--check"]) == 0


def test_help_that_is_shown_does_not_end_the_command(checkout):
    stale = "<!-- run cost --help -->\n<!-- /run -->\n\n<!-- list -->\n<!-- /list -->\n"
    (checkout / "README.md").write_text(stale)
    assert main(["docs", "--root", str(checkout), "--check"]) == 1


@pytest.mark.parametrize("command", ["docs --check", "train --steps 1", "bench --quick", "nothing", "cost nothing"])
def test_a_command_that_does_more_than_print_or_fails_is_refused(checkout, capsys, command):
    page = checkout / "README.md"
    page.write_text(f"<!-- run {command} -->\nold\n<!-- /run -->\n")
    assert main(["docs", "--root", str(checkout)]) == 2
    assert "old" in page.read_text()
    assert command.split()[0] in capsys.readouterr().err


def test_a_block_without_an_end_swallows_nothing(checkout, capsys):
    page = checkout / "README.md"
    text = "<!-- list -->\n\nprecious\n\n<!-- list -->\n<!-- /list -->\n"
    page.write_text(text)
    assert main(["docs", "--root", str(checkout)]) == 2
    assert page.read_text() == text
    assert "end marker" in capsys.readouterr().err


def test_what_is_not_measured_says_so(checkout):
    (checkout / "README.md").write_text("<!-- bench retrieval.bm25 -->\n<!-- /bench -->\n")
    main(["docs", "--root", str(checkout)])
    assert "Not yet measured" in (checkout / "README.md").read_text()


def test_elsewhere_is_refused(tmp_path, capsys):
    assert main(["docs", "--root", str(tmp_path)]) == 2
    assert "no README.md" in capsys.readouterr().err


def test_this_checkouts_pages_are_up_to_date():
    """A page that differs from its records, or a record that is in no page, is a number nobody can trust."""
    assert main(["docs", "--root", str(ROOT), "--check"]) == 0
