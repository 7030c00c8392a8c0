"""`mlsys show`: all that is known of a technique, except the hints of its contract."""

from mlsys import catalog, cli


def test_show(capsys):
    assert cli.main(["show", "flash"]) == 0
    text = capsys.readouterr().out
    for part in ("attention.flash", "Cost:", "Papers:", "signature", "cases", "mlsys check attention.flash my.py:"):
        assert part in text
    for path in ("mlsys/attention/flash.py", "tests/attention/test_flash.py", "benchmarks/attention/flash.py"):
        assert path in text
    assert "cpu yes" in text


def test_show_keeps_the_hints_to_itself(capsys):
    from mlsys.contracts import find

    cli.main(["show", "attention.flash"])
    text = capsys.readouterr().out
    for name, wrong in find("attention.flash").wrong.items():
        assert name in text
        assert wrong.hint not in text


def test_show_source(capsys):
    assert cli.main(["show", "attention.flash", "--source"]) == 0
    assert capsys.readouterr().out == catalog.find("attention.flash").source.read_text(encoding="utf-8")
