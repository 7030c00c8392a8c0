"""Tables say what the records say: units, dashes for noise, ratios, and no number that was not measured."""

import dataclasses

import pytest

from mlsys.bench import tables
from mlsys.bench.records import Record

HERE = {
    "slug": "toy",
    "cpu": "Toy CPU",
    "cores": 2,
    "memory_gib": 4.0,
    "gpu": None,
    "system": "Linux x",
    "python": "3.11.1",
    "versions": {"torch": "2.13"},
}


def record(impl, role, seconds, status="ok", **more):
    return Record(
        benchmark="toys.sums",
        case={"n": 4},
        impl=impl,
        role=role,
        status=status,
        seconds=seconds,
        quartiles=(seconds, seconds) if seconds else None,
        runs=5,
        machine=HERE,
        date="2026-01-02",
        **more,
    )


ROWS = [
    record("plain", "reference", 0.02, share=0.25, bound="compute", flops=1e9),
    record(
        "fast",
        "ours",
        0.01,
        ratio_to_reference=0.5,
        ratio_to_peer=0.8,
        peer="lib",
        share=0.5,
        bound="compute",
        flops=1e9,
    ),
    record("lib", "peer", 0.0125, status="noisy", flops=1e9),
    record("gone", "peer", None, status="missing", note="pip install it"),
]


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (2.5, "2.50 s"), (0.0123, "12.3 ms"), (4.56e-4, "456 µs"), (7e-9, "7.00 ns")]
)
def test_seconds(value, text):
    assert tables.seconds(value) == text


def test_amounts_with_decimal_and_binary_prefixes():
    assert tables.amount(93.1e9, "FLOP/s") == "93.1 GFLOP/s"
    assert tables.amount(3 * 2**20, "B", 1024) == "3.00 MiB"
    assert tables.amount(None, "B") == "–"


def test_summary_has_one_row_a_case_and_ratios_of_ours():
    (row,) = tables.summary_rows(ROWS)
    assert row["case"] == "n=4"
    assert row["fast"] == "10.0 ms"
    assert row["fast ÷ reference"] == "0.50×"
    assert row["fast ÷ peer"].startswith("0.80×")
    assert row["fast of limit"] == "50%"
    assert row["lib"] == "12.5 ms (noisy)"
    assert row["gone"] == "missing"


def test_a_variant_has_its_time_in_the_summary_and_all_in_the_detail():
    variant = record("step", "variant", 0.03, ratio_to_reference=1.5, ratio_to_peer=2.5, share=0.2)
    (row,) = tables.summary_rows([*ROWS, variant])
    assert row["step"] == "30.0 ms"
    assert [title for title in row if title.startswith("step")] == ["step"]
    assert list(row)[1:5] == ["plain", "step", "fast", "lib"]
    assert tables.detail_rows([*ROWS, variant])[-1]["÷ fastest peer"] == "2.50×"


def test_threads_are_those_of_a_rank_where_there_are_several():
    assert "; 1 thread a rank; " in tables.where_and_when([record("fast", "ours", 0.1, ranks=4)])
    assert "rank" not in tables.where_and_when(ROWS)


def test_yours_stands_beside_ours_and_not_in_its_place():
    more = {"items": 10.0, "unit": "row"}
    ours = record("fast", "ours", 0.01, share=0.5, **more)
    yours = record("yours", "yours", 0.1, share=0.05, **more)
    (row,) = tables.summary_rows([ours, yours])
    assert (row["fast of limit"], row["yours of limit"]) == ("50%", "5%")
    assert (row["fast throughput"], row["yours throughput"]) == ("1.00 krow/s", "100 row/s")


def test_what_ran_on_other_threads_or_devices_has_a_row_of_its_own():
    one = record("fast", "ours", 0.02, ratio_to_peer=0.8)
    two = record("fast", "ours", 0.01, ratio_to_peer=0.7, threads=2)
    gpu = record("fast", "ours", 0.001, device="cuda")
    assert [row["case"] for row in tables.summary_rows([one, two])] == ["n=4, 1 thread", "n=4, 2 threads"]
    rows = tables.summary_rows([one, two, gpu])
    assert [row["case"] for row in rows] == ["n=4, cpu, 1 thread", "n=4, cpu, 2 threads", "n=4, cuda, 1 thread"]
    assert [row["fast"] for row in rows] == ["20.0 ms", "10.0 ms", "1.00 ms"]
    assert [row["fast ÷ peer"] for row in rows] == ["0.80×", "0.70×", "–"]
    assert [row["case"] for row in tables.detail_rows([one, two])] == ["n=4, 1 thread", "n=4, 2 threads"]


def test_figures_of_ours_have_columns():
    figures = {"recall@10": 0.58125, "documents": 21070.0}
    peer = record("lib", "peer", 0.01, figures={"recall@10": 0.1})
    (row,) = tables.summary_rows([record("fast", "ours", 0.01, figures=figures), peer])
    assert (row["recall@10"], row["documents"]) == ("0.5813", "21070")
    assert "recall@10" not in tables.summary_rows([record("fast", "ours", 0.01), peer])[0]
    (detail, _) = tables.detail_rows([record("fast", "ours", 0.01, figures=figures), peer])
    assert detail["documents"] == "21070"


def test_detail_has_a_row_an_implementation_and_its_note():
    text = tables.detail(ROWS)
    assert text.count("\n") == 1 + len(ROWS)
    assert "100 GFLOP/s" in text
    assert "pip install it" in text


def test_html_is_escaped():
    (row,) = tables.summary_rows([record("<b>", "ours", 1.0)])
    assert "<b>" not in tables.html([row])


def test_machine_and_date_come_from_the_records():
    line = tables.where_and_when(ROWS)
    for part in ("Toy CPU", "2 cores", "Python 3.11.1", "torch 2.13", "2026-01-02", "1 thread;"):
        assert part in line
    assert "commit" not in line


def test_where_the_records_differ_the_line_names_all():
    other = {**HERE, "python": "3.12.4", "versions": {"torch": "2.14", "numba": "0.61"}}
    later = dataclasses.replace(ROWS[0], machine=other, threads=2, date="2026-02-03", commit="b2")
    line = tables.where_and_when([dataclasses.replace(ROWS[0], commit="a1"), later, later])
    assert line == (
        "Toy CPU, 2 cores, 4 GiB; Linux x; 1 and 2 threads; Python 3.11.1 and 3.12.4, torch 2.13 and 2.14, numba 0.61; "
        "commit a1 and b2; 2026-01-02 to 2026-02-03."
    )
