"""`mlsys roofline`: every record under its own roof, published machines beside them, and what it refuses."""

import dataclasses
import json
import math
import xml.etree.ElementTree as ET

import pytest

from mlsys.bench import plots
from mlsys.bench.records import Record
from mlsys.cli import main
from mlsys.perf import _measure, hardware
from mlsys.perf._measure import Limits

PEAKS = {"float32": 1e11, "bfloat16": 2e11}


def record(impl="flash", dtype="float32", threads=1, slug="toy", benchmark="attention.flash", **changes):
    values = {
        "seconds": 1.0,
        "flops": 5e10,
        "bytes": 1e8,
        "limit_flops": PEAKS[dtype] * threads,
        "limit_bandwidth": 1e10 * threads,
        "machine": {"slug": slug},
        "threads": threads,
    }
    return Record(benchmark, {"n": 1, "dtype": dtype}, impl, "ours", "ok", **{**values, **changes})


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(dataclasses.asdict(r)) + "\n" for r in records))
    return str(path)


def words(svg):
    return [e.text for e in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text") if e.text]


def rows(out):
    """The two tables, each as a list of rows of cells."""
    return [
        [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in table.splitlines()[2:]]
        for table in out.strip().split("\n\n")
    ]


def test_table_has_roofs_and_shares(capsys, tmp_path):
    path = write(
        tmp_path / "r.jsonl",
        [
            record(),  # at 500 FLOP/B half of the peak
            record(seconds=0.5),  # all of it
            record(seconds=0.005, flops=1e8, bytes=1e8),  # at 1 FLOP/B the roof is 10 GFLOP/s: twice that, from cache
            record(impl="naive", dtype="bfloat16"),
        ],
    )
    assert main(["roofline", path]) == 0
    roofs, shares = rows(capsys.readouterr().out)
    assert roofs == [
        ["float32, 1 thread", "100 GFLOP/s", "10.0 GB/s", "10.0"],
        ["bfloat16, 1 thread", "200 GFLOP/s", "10.0 GB/s", "20.0"],
    ]
    assert shares == [
        ["float32, 1 thread", "attention.flash", "flash", "3", "1 : 2", "100%", "200%"],
        ["bfloat16, 1 thread", "attention.flash", "naive", "1", "0 : 1", "25%", "25%"],
    ]


def test_each_dtype_thread_count_and_machine_has_its_roof():
    groups = plots.roofs(
        [
            record(),
            record(dtype="bfloat16", limit_bandwidth=1.2e10),
            record(threads=2),
            record(slug="other", device="cuda"),
            record(limit_flops=1.1e11),  # measured again, a little better
            record(seconds=None),
            record(flops=0.0),
        ]
    )
    assert [(roof.label, roof.peak, roof.bandwidth, len(group)) for roof, group in groups] == [
        ("float32, 1 thread, toy", 1.1e11, 1.2e10, 2),
        ("bfloat16, 1 thread, toy", 2e11, 1.2e10, 1),
        ("float32, 2 threads, toy", 2e11, 2e10, 1),
        ("float32, cuda, other", 1e11, 1e10, 1),
    ]


def test_picture_names_every_roof_and_implementation(tmp_path, capsys):
    path = write(tmp_path / "r.jsonl", [record(), record("naive"), record("numba", benchmark="retrieval.bm25")])
    out = tmp_path / "r.svg"
    assert main(["roofline", path, "--machine", "h100", "--machine", "v100:float32", "--out", str(out)]) == 0
    assert f"wrote {out}" in capsys.readouterr().err
    text = " | ".join(words(out.read_text()))
    for expected in (
        "float32, 1 thread: 100 GFLOP/s, 10.0 GB/s",
        "H100 SXM, bfloat16: 989 TFLOP/s, 3.35 TB/s",
        "V100 SXM2 32 GB, float32: 15.7 TFLOP/s, 900 GB/s",
        "attention.flash: naive",
        "retrieval.bm25: numba",
        "arithmetic intensity",
    ):
        assert expected in text
    first = out.read_bytes()
    main(["roofline", path, "--machine", "h100", "--machine", "v100:float32", "--out", str(out)])
    assert out.read_bytes() == first


def test_roofs_differ_without_colour_and_points_say_which_is_theirs():
    records = [record(impl, dtype, n) for impl in ("naive", "flash") for dtype in PEAKS for n in (1, 2)]
    (ax,) = plots.roofline_figure(records, [plots.published_roof(hardware.find("h100"), "bfloat16")]).axes
    lines = [line for line in ax.lines if line.get_marker() == "None"]
    assert len({str(line._dash_pattern) for line in lines}) == len(lines) == 5
    points = [line for line in ax.lines if line.get_marker() != "None"]
    assert len({(p.get_marker(), p.get_fillstyle()) for p in points}) == len(points) == 8
    assert len({p.get_fillstyle() for p in points}) == 4


def test_every_point_lies_where_it_was_measured_and_every_roof_has_its_corner():
    (ax,) = plots.roofline_figure([record(seconds=2.0)]).axes
    roof, point = ax.lines
    assert (list(point.get_xdata()), list(point.get_ydata())) == ([500.0], [2.5e10])
    x, y = roof.get_xdata(), roof.get_ydata()
    assert (x[1], y[1]) == (10.0, 1e11)
    assert y[0] / x[0] == pytest.approx(1e10)
    assert y[2] == 1e11
    assert x[0] < 10 < 500 < x[2]


def test_nine_implementations_have_nine_looks():
    looks = [plots._look(style) for style in range(24)]
    assert len({(look["marker"], look["color"]) for look in looks}) == 24


def test_ticks_have_prefixes():
    assert [plots._power_of_ten(10.0**e) for e in (-1, 0, 2, 3, 7, 11, 12, 16)] == [
        "0.1", "1", "100", "1 k", "10 M", "100 G", "1 T", "10 P",
    ]  # fmt: skip


def test_png(tmp_path):
    path, out = write(tmp_path / "r.jsonl", [record()]), tmp_path / "r.png"
    assert main(["roofline", path, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_folders_and_the_results_of_this_folder(tmp_path, monkeypatch, capsys):
    write(tmp_path / "results" / "toy" / "a.jsonl", [record()])
    write(tmp_path / "results" / "other" / "b.jsonl", [record(slug="other")])
    monkeypatch.chdir(tmp_path)
    assert main(["roofline"]) == 0
    default = capsys.readouterr().out
    assert "float32, 1 thread, toy" in default
    assert "float32, 1 thread, other" in default
    assert main(["roofline", "results"]) == 0
    assert capsys.readouterr().out == default


def test_a_machine_alone_and_this_machine(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "r.jsonl", [record(seconds=None)])
    monkeypatch.setattr(_measure, "cpu_name", lambda: "Toy CPU")
    monkeypatch.setattr(_measure, "limits", lambda *_: Limits(flops=3e10, bandwidth=1e10))
    out = tmp_path / "r.svg"
    assert main(["roofline", path, "--machine", "tpu-v1", "--machine", "this", "--out", str(out)]) == 0
    (roofs,) = rows(capsys.readouterr().out)
    assert roofs == [
        ["TPU v1, int8", "92.0 TFLOP/s", "34.0 GB/s", "2,706"],
        ["Toy CPU, 1 thread, float32", "30.0 GFLOP/s", "10.0 GB/s", "3.0"],
    ]
    assert "implementations" not in words(out.read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--machine", "h10"], "--machine h10: no machine 'h10'; did you mean h100"),
        (["--machine", "v100:bfloat16"], "it has float64, float32, float16"),
        (["--machine", "this:int3"], "which cannot be measured"),
        (["--out", "a.pdf"], "--out a.pdf: the name must end in .svg or .png"),
        (["nowhere.jsonl"], "nowhere.jsonl"),
        (["empty"], "empty holds no .jsonl file"),
        (["untimed.jsonl"], "no timed measurement"),
        (["broken.jsonl"], "broken.jsonl:1 is not a benchmark record"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jsonl").write_text("{\n")
    write(tmp_path / "untimed.jsonl", [record(seconds=None)])
    assert main(["roofline", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": math.nan}, "seconds must be positive and finite, got nan"),
        ({"seconds": -1.0}, "seconds must be positive and finite, got -1.0"),
        ({"seconds": 0.0}, "seconds must be positive and finite, got 0.0"),
        ({"seconds": "1 s"}, "seconds must be a number, got '1 s'"),
        ({"limit_flops": math.inf}, "limit_flops must be positive and finite, got inf"),
        ({"limit_bandwidth": -1e10}, "limit_bandwidth must be positive"),
        ({"flops": math.nan}, "flops must be at least 0 and finite, got nan"),
        ({"bytes": -1.0}, "bytes must be at least 0 and finite, got -1.0"),
        ({"bytes": None}, "bytes must be a number, got None"),
    ],
)
def test_a_record_that_no_measurement_has_is_refused_by_file_and_line(capsys, tmp_path, changes, message):
    path = write(tmp_path / "results" / "r.jsonl", [record(), record("naive", **changes), record()])
    for argument in (path, str(tmp_path / "results")):
        assert main(["roofline", argument]) == 2
        printed = capsys.readouterr()
        assert f"{path}:2: {message}" in printed.err
        assert "the record of 'naive'" in printed.err
        assert printed.out == ""


def test_a_missing_matplotlib_is_named(capsys, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["roofline", "--out", "a.svg"]) == 2
    assert "needs matplotlib" in capsys.readouterr().err
