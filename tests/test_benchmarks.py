"""No benchmark rots: the smallest case of each runs, is checked, and runs what its folder and file say."""

import itertools

import pytest

from mlsys.bench import find, plots, run
from mlsys.bench.core import SIZES
from mlsys.bench.records import Record

NAMES = find.names()
STUDIES = {"quant.model"}  # compare methods by what they lose; what each takes beside its peer, its own benchmark says


def test_there_are_benchmarks():
    assert {"attention.flash", "retrieval.bm25"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_smallest_case_runs_and_agrees(name):
    bench = find.load(name)
    rows = run(bench, bench.select("quick")[:1], size="quick", smoke=True)
    assert {r.status for r in rows} <= {"smoke", "missing"}, [(r.impl, r.status, r.note) for r in rows]
    # where torch itself is the reference, as of a GPU's kernels, it is the production peer as well
    wanted = {"reference"} | ({"peer"} if bench.reference != "torch" and name not in STUDIES else set())
    # where there is one implementation of ours, it is the reference as well
    assert wanted | ({"ours"} if bench.subject != bench.reference else set()) <= {r.role for r in rows}
    assert all((r.flops > 0 and r.bytes > 0) or r.items > 0 for r in rows)  # starting processes is no computation


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_there_and_distinct(name):
    bench = find.load(name)
    assert bench.name == name
    assert bench.subject in bench.impls
    for size in SIZES:
        cases = bench.select(size)
        assert cases
        assert len({str(c) for c in cases}) == len(cases)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_seeded_and_not_zero(name):
    bench = find.load(name)
    case = bench.select("quick")[0]
    first, second = bench.inputs(case, "cpu"), bench.inputs(case, "cpu")
    assert str(first)[:2000] == str(second)[:2000]


def test_an_unknown_name_holds_no_benchmark(tmp_path, monkeypatch):
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "empty.py").write_text('"""Is there nothing here?"""\n')
    monkeypatch.setattr(find, "folder", lambda: tmp_path)
    assert find.names() == ["toys.empty"]
    with pytest.raises(TypeError, match="holds no `bench"):
        find.load("toys.empty")


def made_up(bench, size, device="cpu"):
    """A record for each case and implementation, as if measured: what a picture may rely on."""
    return [
        Record(
            benchmark=bench.name,
            case=case,
            impl=name,
            role=impl.role,
            status="ok",
            seconds=1e-3 * number,
            runs=5,
            ratio_to_peer=1.25,
            flops=1e9,
            bytes=1e6,
            items=1e3,
            unit="row",
            limit_flops=1e11,
            limit_bandwidth=1e10,
            peak_bytes=2**20 * number,
            ranks=bench.ranks(case) if bench.ranks else 1,
        )
        for case in bench.select(size, device=device)
        for number, (name, impl) in enumerate(bench.impls.items(), 1)
        if impl.only(case)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_its_plots_can_be_drawn_from_the_cases_of_every_size(name):
    bench = find.load(name)
    for plot in bench.plots:
        drawn = [plots.draw(plot, made_up(bench, size, device)) for size in SIZES for device in ("cpu", "cuda")]
        assert any(drawn), f"{plot.y} over {plot.x or 'nothing'} shows none of its cases"


@pytest.mark.parametrize("name", NAMES)
def test_no_bar_of_its_plots_hides_another(name):
    bench = find.load(name)
    for plot in bench.plots:
        if plot.x or plot.y == "roofline":
            continue
        for size, device in itertools.product(SIZES, ("cpu", "cuda")):
            shown = [r for r in made_up(bench, size, device) if plot.only(r.case)]
            for title, group in plots.panels(plot, shown).items():
                bars = [r.impl for r in group]
                assert len(bars) == len(set(bars)), f"{size} on {device}, panel {title!r}: {bars}"
