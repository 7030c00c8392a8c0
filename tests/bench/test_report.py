"""Pictures and the report: labelled, distinguishable without colour, self-contained, reproducible."""

import dataclasses
import re
import xml.etree.ElementTree as ET

import pytest
from matplotlib.text import Text

from mlsys.bench import find, plots, report
from mlsys.bench.core import Plot
from mlsys.bench.records import Record

HERE = {
    "slug": "toy",
    "cpu": "Toy <CPU>",
    "cores": 2,
    "memory_gib": 4.0,
    "gpu": None,
    "system": "Linux",
    "python": "3.11",
    "versions": {"torch": "2.13"},
}


def record(impl, role, n, seconds):
    return Record(
        benchmark="attention.flash",
        case={"n": n, "heads": 8, "dtype": "float32", "causal": True, "backward": False},
        impl=impl,
        role=role,
        status="ok",
        seconds=seconds,
        quartiles=(seconds, seconds),
        runs=5,
        flops=n * n * 1e3,
        bytes=n * 1e3,
        items=n,
        unit="row",
        share=0.5,
        bound="compute",
        limit_flops=1e11,
        limit_bandwidth=2e10,
        peak_bytes=n * 1000,
        ratio_to_peer=1.0,
        peer="peer",
        machine=HERE,
        date="2026-01-02",
    )


RECORDS = [
    record(impl, role, n, n * factor * 1e-6)
    for n in (512, 1024, 2048)
    for impl, role, factor in (("naive", "reference", 3), ("flash", "ours", 1), ("peer", "peer", 1.01))
]
PLOT = Plot(x="n", xlabel="sequence length n", panel=("dtype",))


def texts(svg):
    return [e.text for e in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("y", ["time", "memory", "throughput"])
def test_axes_are_labelled_and_every_implementation_is_named_in_the_picture(y):
    svg = plots.draw(
        Plot(x="n", xlabel="sequence length n", panel=("n",) if y == "throughput" else ("dtype",), y=y), RECORDS
    )
    written = " ".join(filter(None, texts(svg)))
    for word in ("naive", "flash", "peer", "sequence length n"):
        assert word in written


def test_speedup_is_over_the_fastest_peer_and_noise_has_none():
    mine = [
        dataclasses.replace(r, ratio_to_peer=0.25 if r.impl == "flash" else None if r.impl == "naive" else 1.0)
        for r in RECORDS
    ]
    plot = Plot(x="n", xlabel="n", panel=("dtype",), y="speedup")
    assert [plots._value(plot, r) for r in mine[:3]] == [None, 4.0, 1.0]
    written = texts(plots.draw(plot, mine))
    assert "times as fast as the fastest peer" in written
    assert "flash" in written
    assert "naive" not in written


def test_sizes_in_bytes_are_written_short():
    assert [plots._size(n) for n in (4, 4096, 65536, 2**20, 3 * 2**20, 2**30)] == ["4", "4K", "64K", "1M", "3M", "1G"]
    records = [dataclasses.replace(r, case={"bytes": r.case["n"] * 512}) for r in RECORDS]
    assert "512K" in texts(plots.draw(Plot(x="bytes", xlabel="bytes"), records))


def test_ranks_have_a_roof_of_their_own():
    four = [dataclasses.replace(r, ranks=4, limit_flops=2e11) for r in RECORDS]
    labels = [roof.label for roof, _ in plots.roofs(RECORDS + four)]
    assert labels == ["float32, 1 thread", "float32, 4 ranks of 1 thread"]


@pytest.mark.parametrize("y", ["time", "throughput"])
def test_threads_do_not_share_a_panel(y):
    both = RECORDS + [dataclasses.replace(r, threads=2, seconds=r.seconds / 2) for r in RECORDS]
    plot = Plot(x="n", xlabel="n", panel=("dtype",), y=y)
    assert "float32" in texts(plots.draw(plot, RECORDS))
    assert {"float32, 1 thread", "float32, 2 threads"} <= set(texts(plots.draw(plot, both)))


LONG = {"naive": "block by block", "flash": "two of them at once", "peer": "numba, not shared by any"}


@pytest.mark.parametrize("y", ["time", "memory", "throughput"])
@pytest.mark.parametrize("panel", [("dtype",), ("causal",)])
@pytest.mark.parametrize("sizes", [(512, 1024), (16, 65536)])
def test_every_text_lies_within_the_picture_and_names_within_their_frame(y, panel, sizes):
    records = [
        dataclasses.replace(r, impl=LONG[r.impl], case={**r.case, "n": n, "causal": causal})
        for r in RECORDS[:3]
        for n in sizes
        for causal in (True, False)
    ]
    figure = plots.figure(Plot(x="n", xlabel="sequence length n", panel=panel, y=y), records, list(LONG.values()))
    figure.draw_without_rendering()
    found = 0
    for ax in figure.axes:
        for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            for tick in axis.get_major_ticks():  # one beyond the limits is not drawn
                assert not low <= tick.get_loc() <= high or inside(tick.label1, figure.bbox)
        for text in filter(Text.get_text, (ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts)):
            assert inside(text, figure.bbox), text.get_text()
        for text in ax.texts:
            found += 1
            assert inside(text, ax.get_window_extent()), text.get_text()
    assert found == len(LONG) * len(figure.axes)


def inside(text, box):
    extent = text.get_window_extent()
    return box.x0 <= extent.x0 and extent.x1 <= box.x1 and box.y0 <= extent.y0 and extent.y1 <= box.y1


def test_lines_differ_without_colour():
    styles = set(zip(plots.MARKERS, map(str, plots.LINES), strict=True))
    assert len(styles) == len(plots.COLOURS)


def test_same_records_same_picture():
    assert plots.draw(PLOT, RECORDS) == plots.draw(PLOT, RECORDS)


def test_nothing_to_show_is_no_picture():
    assert plots.draw(Plot(x="n", xlabel="n", only=lambda case: False), RECORDS) is None
    assert plots.roofline([]) is None


def test_roofline_shows_roof_and_points():
    written = " ".join(filter(None, texts(plots.roofline(RECORDS))))
    for word in ("100 GFLOP/s", "20.0 GB/s", "flash", "arithmetic intensity"):
        assert word in written


def test_report_is_one_self_contained_page(tmp_path):
    page = report.write(RECORDS, tmp_path / "report")
    html = page.read_text(encoding="utf-8")
    assert page.name == "index.html"
    assert list(page.parent.iterdir()) == [page]
    assert "<script" not in html
    # no picture, style or font is fetched: the only addresses are XML name spaces
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", html.replace("xlink:href", ""))
    assert html.count("<svg") >= 3
    assert "Toy &lt;CPU&gt;" in html
    assert report.question("attention.flash") in html.replace("&#39;", "'")


def test_every_benchmark_opens_with_a_question():
    for name in find.names():
        assert report.question(name).endswith("?"), name


def test_further_pictures_come_after_the_plots(monkeypatch, toy):
    bench = toy(
        pictures={"all": lambda records: f"<svg>{len(records)}</svg>", "nothing": lambda records: None}, plots=()
    )
    monkeypatch.setattr(report.find, "load", lambda name: bench)
    assert report.pictures("toys.sums", RECORDS) == [f"<svg>{len(RECORDS)}</svg>"]


@pytest.mark.parametrize("x", ["n", ""])
def test_a_title_is_no_wider_than_its_frame(x):
    records = [dataclasses.replace(r, case={**r.case, "what it is called": "a long name, " * 4}) for r in RECORDS[:3]]
    plot = Plot(x=x, xlabel="length", panel=("what it is called",))
    figure = plots.figure(plot, records, ["naive", "flash", "peer"])
    figure.draw_without_rendering()
    (ax,) = figure.axes
    assert ax.title.get_window_extent().width <= ax.get_window_extent().width
