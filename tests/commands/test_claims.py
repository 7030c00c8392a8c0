"""`mlsys claims`: the table, the page and the JSON of what is recomputed, and what its exit status says."""

import json
from dataclasses import replace

import pytest

from mlsys import claims, cli
from mlsys.claims import Claim

THIRD = Claim("third", "toys.divide", "Toy 2001, Table 1", "a third", "", 0.33, 2, lambda: 1 / 3)
PI = Claim("pi", "toys.circle", "Toy 2001, §2", "the ratio", "m", 3.1, 1, lambda: 3.2, 0.05, "approximate", "by hand")
TWO = Claim("two", "games.count", "Game 2002, eq. 3", "one and one", "", 3.0, 0, lambda: 2, 0.0, "disagrees", "sic")


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """There are three claims, one of each status."""
    monkeypatch.setattr(claims, "all_claims", lambda: [THIRD, PI, TWO])


def test_claims_are_a_table_with_their_count_below(capsys):
    assert cli.main(["claims"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["claim", "technique", "published", "ours", "status", "what"]
    assert lines[2].split() == ["third", "toys.divide", "0.33", "0.333", "exact", "a", "third"]
    assert lines[3].split() == ["pi", "toys.circle", "3.1", "m", "3.20", "m", "approximate", "the", "ratio"]
    assert lines[-1].startswith("3 claims: 1 exact, 1 approximate, 1 disagree; ")


@pytest.mark.parametrize(
    ("words", "names"),
    [([], ["third", "pi", "two"]), (["toys"], ["third", "pi"]), (["toys.circle"], ["pi"]), (["games"], ["two"])],
)
def test_claims_of_an_area_as_json(words, names, capsys):
    assert cli.main(["claims", *words, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["claim"] for row in rows] == names
    assert all(row["source"] for row in rows)


def test_claims_as_a_page(capsys, tmp_path):
    page = tmp_path / "claims.md"
    assert cli.main(["claims", "--write", str(page)]) == 0
    assert capsys.readouterr().out == f"wrote {page}: 3 claims: 1 exact, 1 approximate, 1 disagree\n"
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Published numbers, reproduced\n")
    assert "3 claims: 1 exact, 1 approximate, 1 disagree.\n" in text
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## games.count", "## toys.circle", "## toys.divide"]
    (row,) = [line for line in text.splitlines() if line.startswith("| pi ")]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "pi", "the ratio", "3.1 m", "3.20 m", "approximate", "Toy 2001, §2", "by hand"
    ]  # fmt: skip


def test_printed_formulas_are_counted_apart(capsys, monkeypatch):
    monkeypatch.setattr(claims, "all_claims", lambda: [replace(THIRD, formula=True), PI])
    assert cli.main(["claims"]) == 0
    assert "(1 are a printed formula at given numbers)" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_claim_that_comes_out_otherwise_is_one(more, capsys, monkeypatch):
    monkeypatch.setattr(claims, "all_claims", lambda: [THIRD, replace(PI, compute=lambda: 3.14)])
    assert cli.main(["claims", *more]) == 1  # better than the library stands by is also otherwise
    assert capsys.readouterr().out.count("exact") >= 2


def test_claims_about_nothing_known_are_two(fails):
    told = fails("claims", "toy")
    assert told == "no claims about 'toy'; there are claims about games, games.count, toys, toys.circle, toys.divide"
