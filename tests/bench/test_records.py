"""Records survive a round trip, newer replaces older, and a damaged file is refused and left as it was."""

import dataclasses
import json

import pytest

from mlsys.bench.records import Record, from_json, read, save

HERE = {
    "slug": "toy-machine",
    "cpu": "toy",
    "cores": 1,
    "memory_gib": 1.0,
    "gpu": None,
    "system": "S",
    "python": "3",
    "versions": {},
}


def record(n=1, impl="a", seconds=1.0, **more):
    return Record(
        benchmark="toys.sums",
        case={"n": n},
        impl=impl,
        role="ours",
        status="ok",
        seconds=seconds,
        quartiles=(seconds, seconds),
        machine=HERE,
        date="2026-01-01",
        **more,
    )


def test_round_trip(tmp_path):
    (path,) = save([record(), record(n=2, figures={"recall@10": 0.9})], tmp_path)
    assert path == tmp_path / "toy-machine" / "toys.sums.jsonl"
    assert read(path) == [record(), record(n=2, figures={"recall@10": 0.9})]


def test_series_are_kept_as_they_are_and_older_records_have_none(tmp_path):
    spans = {"losses": [2.5, 2.25], "spans": [[0, "compute", "step", 0.5, 1.0]]}
    (path,) = save([record(series=spans, ranks=2)], tmp_path)
    assert read(path)[0].series == spans
    older = json.loads(path.read_text())
    del older["series"], older["ranks"]
    assert from_json(older) == record()


def test_newer_replaces_the_same_key_only(tmp_path):
    save([record(seconds=1.0), record(n=2, seconds=2.0)], tmp_path)
    (path,) = save([record(seconds=9.0), record(seconds=3.0, threads=2)], tmp_path)
    assert {(r.case["n"], r.threads): r.seconds for r in read(path)} == {(1, 1): 9.0, (2, 1): 2.0, (1, 2): 3.0}


def test_a_damaged_file_is_named_by_line_and_not_overwritten(tmp_path):
    (path,) = save([record()], tmp_path)
    damaged = path.read_text() + '{"benchmark": "toys'
    path.write_text(damaged)
    with pytest.raises(ValueError, match=r"toys\.sums\.jsonl:2 is not a benchmark record"):
        save([record(n=5)], tmp_path)
    assert path.read_text() == damaged


def test_unknown_fields_are_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"colour": "red"}\n')
    with pytest.raises(ValueError, match="unknown field 'colour'"):
        read(path)


def test_key_ignores_when_and_how_fast():
    a = record()
    assert a.key == dataclasses.replace(a, seconds=5.0, date="2027-01-01").key
    assert a.key != dataclasses.replace(a, device="cuda").key
