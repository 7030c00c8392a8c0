"""`mlsys list`: every technique on a line, as wide as the terminal, and what cannot run here."""

import json
from pathlib import Path

from mlsys import catalog, cli
from mlsys.commands import list as list_command


def test_list_is_a_table_of_a_hundred_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    for technique in catalog.techniques():
        assert technique.name in text
        assert technique.idea.split()[0] in text
    assert max(map(len, text.splitlines())) <= 100
    assert "torch: cpu yes; cuda " in text


def test_list_of_an_area(capsys):
    assert cli.main(["list", "retrieval"]) == 0
    text = capsys.readouterr().out
    assert "retrieval.bm25" in text
    assert "attention.flash" not in text


def test_list_stars_what_cannot_run_here():
    broken = catalog.Backend("triton", Path("x.py"), {"cuda": "no NVIDIA driver found"})
    flash = catalog.Technique("attention.flash", "Tiles", "", ("Dao 2022.",), (broken,), Path("x.py"), *[None] * 4)
    text = list_command.table([flash])
    assert "triton*" in text
    assert "triton: cuda no (no NVIDIA driver found)" in text


def test_list_json_has_everything(capsys):
    assert cli.main(["list", "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    flash = found["attention.flash"]
    assert flash["source"].endswith("flash.py")
    assert flash["papers"]
    assert flash["backends"][0]["devices"]["cpu"] == {"usable": True, "why": None}
