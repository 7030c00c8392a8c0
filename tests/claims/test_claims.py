"""Every claim comes out as the library says it does, and the status is computed, not declared."""

import dataclasses
from pathlib import Path

import pytest

from mlsys import catalog
from mlsys.claims import all_claims, as_markdown, reproduce
from mlsys.claims.attention import flash_traffic_gb

CLAIMS = {c.name: c for c in all_claims()}


@pytest.mark.parametrize("name", CLAIMS)
def test_reproduces(name):
    done = reproduce(CLAIMS[name])
    assert done.status == done.claim.expected, f"ours {done.ours}, published {done.claim.published}"


def test_names_are_unique_and_every_technique_has_a_claim():
    assert len(CLAIMS) == len(all_claims())
    missing = {t.name for t in catalog.techniques()} - {c.area for c in all_claims()}
    assert not missing


def test_there_are_many():
    assert len(CLAIMS) >= 80


def test_what_is_not_exact_says_why():
    assert all(c.reason for c in all_claims() if c.expected != "exact")


@pytest.mark.parametrize(
    ("ours", "status"),
    [
        (4.4, "exact"),
        (4.44, "exact"),
        (4.46, "approximate"),
        (4.0, "approximate"),
        (3.9, "disagrees"),
        (float("nan"), "disagrees"),
    ],
)
def test_status_is_computed(ours, status):
    assert CLAIMS["flash-traffic"].status(ours) == status


def test_no_claim_is_computed_from_the_published_value():
    for claim in (c for c in all_claims() if c.area.startswith("perf.")):  # the quick ones
        moved = dataclasses.replace(claim, published=claim.published * 10)
        assert reproduce(moved).ours == reproduce(claim).ours


def test_traffic_counter_on_a_size_counted_by_hand():
    # n=2, d=1, SRAM of 8 numbers: block_k = ceil(8/4) = 2, block_q = min(2, 1) = 1. One key block, two query blocks:
    # forward 2·2 + 2·(2 + 2 + 1 + 2) = 18; backward 2·2 + 2·(4 + 2 + 1) + 2·2 = 22; 40 numbers of 2 bytes.
    assert flash_traffic_gb(2, 1, 1, 1, sram_bytes=16) == pytest.approx(40 * 2 / 1e9)


def test_larger_sram_means_less_traffic():
    sizes = [flash_traffic_gb(1024, 64, 1, 1, sram_bytes=kib * 1024) for kib in (48, 96, 192, 384)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_table_has_a_row_each():
    text = as_markdown([CLAIMS["flash-traffic"]])
    assert "4.4 GB" in text
    assert "approximate" in text


def test_the_page_lists_every_claim_with_its_status():
    page = (Path(__file__).parents[2] / "docs" / "claims.md").read_text(encoding="utf-8")
    for claim in all_claims():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {claim.name} ")]
        assert f"| {claim.expected} " in row
