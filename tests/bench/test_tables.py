"""Tables say what the records say: units, dashes for noise, ratios, and no number that was not measured."""

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
    assert row["of limit"] == "50%"
    assert row["lib"] == "12.5 ms (noisy)"
    assert row["gone"] == "missing"


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
    for part in ("Toy CPU", "2 cores", "Python 3.11.1", "torch 2.13", "2026-01-02", "1 thread"):
        assert part in line
