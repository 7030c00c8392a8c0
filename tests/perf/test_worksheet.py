"""A worksheet computes what it prints, and prints what it computes."""

import ast
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys.perf import worksheet
from mlsys.perf.worksheet import Worksheet, number, quantity

NUMBERS = st.floats(0.5, 1e12) | st.integers(1, 10**9)


def test_line_has_formula_numbers_and_result():
    sheet = Worksheet()
    sheet.given("N", 7e9)
    assert sheet.line("weights", "2 * N", "B") == 14e9
    assert str(sheet.lines[-1]) == "weights = 2·N = 2·7e9 = 14 GB"


def test_a_negative_number_keeps_its_brackets():
    sheet = Worksheet()
    sheet.given("a", -3)
    assert sheet.line("x", "a**2") == 9
    assert sheet.lines[-1].filled == "(-3)^2"


def test_later_lines_use_earlier_ones():
    sheet = Worksheet()
    sheet.given("L", 96)
    sheet.line("half", "L // 2")
    assert sheet.line("share", "max(half, 3) / (L - 1)") == 48 / 95
    assert sheet.lines[-1].filled == "max(48, 3)/(96 − 1)"


@settings(deadline=None)
@given(a=NUMBERS, b=NUMBERS, c=NUMBERS)
def test_value_is_that_of_python(a, b, c):
    sheet = Worksheet()
    for name, value in (("a", a), ("b", b), ("c", c)):
        sheet.given(name, value)
    formula = "2*a*(b + c/3) - a**0.5 + min(a, b)*ceil(c) - -b + log2(a) + floor(b)"
    want = 2 * a * (b + c / 3) - a**0.5 + min(a, b) * math.ceil(c) + b + math.log2(a) + math.floor(b)
    assert sheet.line("x", formula) == want


def test_filled_formula_keeps_the_brackets_that_matter():
    sheet = Worksheet()
    for name, value in (("a", 2), ("b", 3), ("c", 4)):
        sheet.given(name, value)
    sheet.line("x", "(a + b) * c / (b * c)")
    assert sheet.lines[-1].formula == "(a + b)·c/(b·c)"
    assert sheet.lines[-1].filled == "(2 + 3)·4/(3·4)"


@pytest.mark.parametrize(
    ("formula", "named"),
    [
        ("a + unknown", "unknown"),
        ("__import__('os')", "__import__"),
        ("a.real", "a.real"),
        ("[a]", "[a]"),
        ("'text'", "text"),
        ("a if a else b", "if"),
    ],
)
def test_formula_that_is_not_arithmetic_is_refused(formula, named):
    sheet = Worksheet()
    sheet.given("a", 1)
    with pytest.raises(ValueError, match="formula") as caught:
        sheet.line("x", formula)
    assert named in str(caught.value)
    assert [line.name for line in sheet.lines] == ["a"]


def test_a_name_means_one_thing():
    sheet = Worksheet()
    sheet.given("a", 1)
    with pytest.raises(ValueError, match="'a'"):
        sheet.line("a", "2")


def test_rows_are_plain_and_carry_their_section():
    sheet = Worksheet()
    sheet.section("Model")
    sheet.given("N", 2.0, "B", note="counted")
    sheet.section("Time")
    sheet.line("x", "N * 2", "s")
    assert sheet.rows() == [
        {"section": "Model", "name": "N", "value": 2.0, "unit": "B", "note": "counted"},
        {"section": "Time", "name": "x", "value": 4.0, "unit": "s", "formula": "N·2", "filled": "2·2"},
    ]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (120e9, "B", "120 GB"),
        (1234, "B", "1.23 kB"),
        (0, "B", "0 B"),
        (989.4e12, "FLOP/s", "989 TFLOP/s"),
        (3.14e23, "FLOP", "314 ZFLOP"),
        (0.00802, "s", "8.02 ms"),
        (999.7e9, "B", "1 TB"),
        (0.99996, "s", "1 s"),
        (2987 * 86400, "s", "2,987 days"),
        (5e24, "FLOP", "5,000 ZFLOP"),
        (2.5e-6, "s", "2.5 µs"),
        (0.0, "s", "0 µs"),
        (33.9 * 86400, "s", "33.9 days"),
        (0.4623, "%", "46.2%"),
        (174_591_683_584, "", "174,591,683,584"),
        (1.96, "tokens", "1.96 tokens"),
    ],
)
def test_quantity(value, unit, text):
    assert quantity(value, unit) == text


@pytest.mark.parametrize(
    ("value", "text"), [(96, "96"), (0.45, "0.45"), (90251.3, "90251"), (174_591_683_584, "1.746e11"), (1e-6, "1e-6")]
)
def test_number(value, text):
    assert number(value) == text


def test_show_does_not_change_the_tree():
    tree = ast.parse("a * 2", mode="eval").body
    before = ast.dump(tree)
    worksheet.show(tree, {"a": 3})
    assert ast.dump(tree) == before
