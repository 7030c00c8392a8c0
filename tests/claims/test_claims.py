"""Every claim comes out as the library says it does, and the status is computed, not declared."""

import functools
import types
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


def numbers(function):
    """Every number that a function holds: in its code and functions inside it, its defaults and its closure."""
    if isinstance(function, functools.partial):
        given = [*function.args, *function.keywords.values()]
        return numbers(function.func) | {v for v in given if isinstance(v, int | float)}
    held = [*(function.__defaults__ or ()), *(cell.cell_contents for cell in function.__closure__ or ())]
    codes = [function.__code__]
    while codes:
        constants = codes.pop().co_consts
        codes += [inner for inner in constants if isinstance(inner, types.CodeType)]
        held += constants
    return {v for v in held if isinstance(v, int | float)}


@pytest.mark.parametrize("name", CLAIMS)
def test_no_claim_is_computed_from_the_published_value(name):
    claim = CLAIMS[name]
    assert claim.published not in numbers(claim.compute) - {0, 1, 2}


def test_a_claim_that_is_would_be_caught():
    printed = 117
    assert 117 in numbers(lambda: 117.0)
    assert 117 in numbers(lambda: printed)
    assert 117 in numbers(lambda x=117: x)
    assert 117 in numbers(functools.partial(lambda x: x, 117))
    assert 117 in numbers(lambda: (lambda: 117 + 0)())


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
