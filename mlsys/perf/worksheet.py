"""Arithmetic that shows its work: each line has a formula, the same formula with the numbers in it, and the result.

    >>> sheet = Worksheet()
    >>> sheet.given("N", 7e9, "", "parameters")
    >>> sheet.line("weights", "2 * N", "B")
    14000000000.0
    >>> print(sheet.lines[-1])
    weights = 2·N = 2·7e9 = 14 GB

The formula is the computation: it is parsed and evaluated, and printed from the
same tree, so that what a reader follows cannot differ from what was computed.
Names in a formula are values given before, or results of earlier lines.

Cost:
    A walk over one small expression tree a line.

Memory:
    None to speak of.

Papers:
    Knuth 1984, "Literate Programming", Computer Journal 27(2) (one source for what is read and what is run).

See also:
    `mlsys cost` (which prints such sheets), `mlsys.perf.transformer`, `mlsys.perf.inference`.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

OPERATORS: dict[type[ast.AST], Callable[[Any, Any], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}
FUNCTIONS: dict[str, Callable[..., float]] = {
    "max": max,
    "min": min,
    "ceil": math.ceil,
    "floor": math.floor,
    "log2": math.log2,
}
PREFIXES = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
TIMES = ((86400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
SCALED = ("B", "B/s", "FLOP", "FLOP/s", "FLOP/token")  # units that take a prefix


@dataclass(frozen=True)
class Line:
    """One result: its name, formula, the formula with numbers, value and unit; no formula where it is given."""

    name: str
    value: float
    unit: str
    formula: str = ""
    filled: str = ""
    note: str = ""

    def __str__(self) -> str:
        return " = ".join(
            part for part in (self.name, self.formula, self.filled, quantity(self.value, self.unit)) if part
        )


class Worksheet:
    """Lines in order, and the values of their names; `section` starts a new heading."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.sections: dict[int, str] = {}
        self.values: dict[str, float] = {}

    def section(self, title: str) -> None:
        """The lines from here on belong under this heading."""
        self.sections[len(self.lines)] = title

    def given(self, name: str, value: float, unit: str = "", note: str = "") -> float:
        """A number that is not computed here: an input, or what another module counted."""
        return self._add(Line(name, value, unit, note=note))

    def line(self, name: str, formula: str, unit: str = "", note: str = "") -> float:
        """A result of the names known so far. ValueError names what a formula may not hold."""
        tree = ast.parse(formula, mode="eval").body
        value = evaluate(tree, self.values)
        return self._add(Line(name, value, unit, show(tree, {}), show(tree, self.values), note))

    def _add(self, line: Line) -> float:
        if line.name in self.values:
            raise ValueError(f"name={line.name!r}: the sheet has a line of that name")
        self.lines.append(line)
        self.values[line.name] = line.value
        return line.value

    def rows(self) -> list[dict[str, Any]]:
        """The lines as plain values, to print as JSON."""
        section, rows = "", []
        for index, line in enumerate(self.lines):
            section = self.sections.get(index, section)
            row = {"section": section, "name": line.name, "value": line.value, "unit": line.unit}
            row |= {"formula": line.formula, "filled": line.filled, "note": line.note}
            rows.append({key: value for key, value in row.items() if value != ""})
        return rows


def evaluate(node: ast.expr, values: Mapping[str, float]) -> float:
    """The value of an arithmetic expression: numbers, known names, + − · / // **, max, min, ceil, floor, log2."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in values:
            raise ValueError(f"formula: no value is known for {node.id!r}; known are {', '.join(values) or 'none'}")
        return values[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](evaluate(node.left, values), evaluate(node.right, values))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -evaluate(node.operand, values)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
        return FUNCTIONS[node.func.id](*(evaluate(argument, values) for argument in node.args))
    raise ValueError(f"formula: {ast.unparse(node)!r} is not plain arithmetic")


def show(node: ast.expr, values: Mapping[str, float]) -> str:
    """The expression as one writes it, with names replaced by their values where `values` has them."""

    class Fill(ast.NodeTransformer):
        def visit_Call(self, call: ast.Call) -> ast.Call:
            call.args = [self.visit(argument) for argument in call.args]
            return call

        def visit_Name(self, name: ast.Name) -> ast.Name:
            if name.id not in values:
                return name
            text = number(values[name.id])
            return ast.Name(f"({text})" if text.startswith("-") else text)  # −3², not (−3)², is −9

        def visit_Constant(self, constant: ast.Constant) -> ast.Name:
            return ast.Name(number(constant.value))  # type: ignore[arg-type]

    copy = ast.parse(ast.unparse(node), mode="eval").body
    text = ast.unparse(Fill().visit(copy))
    for written, printed in ((" ** ", "^"), (" * ", "·"), (" // ", " ÷ "), (" / ", "/"), (" - ", " − ")):
        text = text.replace(written, printed)
    return text


def number(value: float) -> str:
    """Short enough to read inside a formula: 96, 0.45, 1.746e11."""
    if float(value).is_integer() and abs(value) < 1e6:
        return str(int(value))
    if 1e4 <= abs(value) < 1e6:
        return f"{value:.0f}"
    mantissa, _, exponent = f"{value:.4g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def quantity(value: float, unit: str) -> str:
    """With its unit, in the prefix that fits: 120 GB, 3.2 TFLOP/s, 8.02 ms, 33.9 days."""
    if unit in SCALED:
        scale, prefix = _scale(value, PREFIXES)
        return f"{_three(value / scale)} {prefix}{unit}"
    if unit == "s":
        scale, name = _scale(value, TIMES)
        return f"{_three(value / scale)} {name}"
    if unit == "%":
        return f"{100 * value:.1f}%"
    text = f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1e3 else f"{value:.4g}"
    return f"{text} {unit}".strip()


def _scale(value: float, scales: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    """The largest scale that is not above the value once that is rounded to three digits."""
    rounded = abs(float(f"{value:.3g}"))
    return next((scale for scale in scales if rounded >= scale[0]), scales[-1])


def _three(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
