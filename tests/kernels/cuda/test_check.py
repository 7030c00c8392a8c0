"""Every planted mistake is found: its kind, its line. Its correct twin is clean, and right in any order of threads."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from mlsys.kernels.cuda import File, Finding, check, load

FILES = Path(__file__).parent / "files"
MISTAKE = re.compile(r"// MISTAKE ([\w-]+)")


@dataclass(frozen=True)
class Case:
    """A kernel and its wrong sibling: how both are launched, and what the right one must have computed.

    arguments: makes them anew. results: the positions of those that the kernel writes. expected: what these must be,
    from the arguments as they were. wrong: makes the wrong one's arguments, where they differ.
    """

    grid: Any
    block: Any
    arguments: Callable[[], list[Any]]
    results: tuple[int, ...]
    expected: Callable[..., Any]
    shared: int = 0
    limit: float = 60.0
    wrong: Callable[[], list[Any]] | None = field(default=None)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _integers(high: int, *shape: int, low: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(0))


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


INT = torch.int32
BARRIERS = {
    "transpose": Case((3, 2), (16, 16), lambda: [_random(19, 37), _zeros(37, 19), 19, 37], (1,), lambda x, *_: x.T),
    "matmul": Case(
        (3, 2),
        (16, 16),
        lambda: [19, 35, 50, _random(19, 50), _random(50, 35), _zeros(19, 35)],
        (5,),
        lambda m, n, k, a, b, c: a @ b,
    ),
    "block_sum": Case(
        3,
        256,
        lambda: [_random(600), _zeros(3), 600],
        (1,),
        lambda x, *_: torch.stack([part.sum() for part in x.split(256)]),
    ),
    "warp_sum": Case(1, 32, lambda: [_random(64), _zeros(1)], (1,), lambda x, _: x.sum()[None]),
    "volatile_sum": Case(1, 64, lambda: [_random(64), _zeros(1)], (1,), lambda x, _: x.sum()[None]),
    "reverse_in_warp": Case(
        2,
        128,
        lambda: [_integers(99, 256), _zeros(256, dtype=INT)],
        (1,),
        lambda x, _: x.view(-1, 32).flip(1).flatten(),
    ),
    "softmax": Case(5, 64, lambda: [_random(5, 100), _zeros(5, 100), 100], (1,), lambda x, *_: x.softmax(1)),
    "double_buffer": Case(
        1, 64, lambda: [_random(5, 64), _zeros(5, 64), 5], (1,), lambda x, *_: x.roll(1, 1) + x.roll(-1, 1)
    ),
    "running_sum": Case(
        1, 128, lambda: [_integers(9, 128), _zeros(128, dtype=INT)], (1,), lambda x, _: x.cumsum(0).to(INT)
    ),
    "block_largest": Case(
        2, 64, lambda: [_random(100), _zeros(2), 100], (1,), lambda x, *_: torch.stack([x[:64].max(), x[64:].max()])
    ),
    "stencil": Case(
        2,
        64,
        lambda: [_random(100), _zeros(100), 100],
        (1,),
        lambda x, *_: torch.nn.functional.conv1d(x[None, None], torch.ones(1, 1, 3), padding=1).flatten(),
    ),
}
BOUNDS = {
    "add": Case(2, 64, lambda: [_random(100), _random(100), _zeros(100), 100], (2,), lambda x, y, *_: x + y),
    "row_sums": Case(1, 32, lambda: [_random(20, 7), _zeros(20), 20, 7], (1,), lambda x, *_: x.sum(1)),
    "difference": Case(
        2, 64, lambda: [_random(100), _zeros(100), 100], (1,), lambda x, *_: torch.diff(x, prepend=torch.zeros(1))
    ),
    "reverse": Case(
        3,
        32,
        lambda: [_integers(99, 96), _zeros(96, dtype=INT)],
        (1,),
        lambda x, _: x.view(3, 32).flip(1).flatten(),
        shared=128,
    ),
    "smooth": Case(
        1,
        (16, 8),
        lambda: [_random(8, 17), _zeros(8, 17), 17],
        (1,),
        lambda x, y, _: torch.cat([0.5 * (x[:, :16] + x[:, 1:]), y[:, 16:]], 1),
    ),
    "look_up": Case(
        2, 32, lambda: [_random(8), _zeros(50), 50], (1,), lambda table, *_: table[torch.arange(50) * 5 % 8]
    ),
    "scale_rows": Case(
        3, 32, lambda: [_random(3, 67), _random(3), _zeros(3, 67), 3, 67], (2,), lambda x, f, *_: f[:, None] * x
    ),
    "twice": Case(1, 32, lambda: [_random(67), _zeros(67), 67], (1,), lambda x, *_: 2 * x),
    "count_pairs": Case(
        1,
        64,
        lambda: [_integers(60000, 50, low=59000), _zeros(16, dtype=INT), 50, 16],
        (1,),
        lambda rows, *_: torch.bincount((rows.long() * 60000 + torch.arange(50)) % 16, minlength=16).to(INT),
    ),
}
DIVERGENCE = {
    "reverse": Case(
        2, 64, lambda: [_random(100), _zeros(100), 100], (1,), lambda x, *_: torch.cat([x[:64].flip(0), x[64:].flip(0)])
    ),
    "mirror": Case(
        2, 64, lambda: [_random(100), _zeros(100), 100], (1,), lambda x, *_: torch.cat([x[:64].flip(0), x[64:].flip(0)])
    ),
    "column_maxima": Case(
        1,
        64,
        lambda: [_random(160), _zeros(3), 160],
        (1,),
        lambda x, *_: torch.stack([torch.cat([x[:n][0::64], x[:n][63::64]]).max() for n in (64, 128, 160)]),
    ),
    "halves": Case(1, 64, lambda: [_random(32), _zeros(32)], (1,), lambda x, _: 2 * x.flip(0)),
    "warp_sums": Case(2, 64, lambda: [_random(128), _zeros(4)], (1,), lambda x, _: x.view(4, 32).sum(1)),
    "even_sum": Case(1, 32, lambda: [_random(32), _zeros(1)], (1,), lambda x, _: x[::2].sum()[None]),
    "broadcast_last": Case(
        2,
        32,
        lambda: [_integers(99, 50), _zeros(50, dtype=INT), 50],
        (1,),
        lambda x, *_: torch.cat([x[31].repeat(32), x[49].repeat(18)]),
    ),
    "compact": Case(
        1,
        32,
        lambda: [_integers(9, 32, low=-9), _zeros(32, dtype=INT), _zeros(1, dtype=INT)],
        (1, 2),
        lambda x, *_: (torch.cat([x[x > 0], x.new_zeros(int((x <= 0).sum()))]), (x > 0).sum().to(INT)[None]),
    ),
}
BLOCKS = {
    "histogram": Case(
        4,
        64,
        lambda: [_integers(16, 1000), _zeros(16, dtype=INT), 1000],
        (1,),
        lambda x, *_: torch.bincount(x, minlength=16).to(INT),
    ),
    "histogram_shared": Case(
        4,
        64,
        lambda: [_integers(16, 1000), _zeros(16, dtype=INT), 1000],
        (1,),
        lambda x, *_: torch.bincount(x, minlength=16).to(INT),
    ),
    "grid_sum": Case(
        8,
        32,
        lambda: [_random(500), _zeros(8), _zeros(1, dtype=INT), _zeros(1), 500],
        (3,),
        lambda x, *_: x.sum()[None],
    ),
    "tiles": Case(
        4,
        32,
        lambda: [_random(120), _zeros(120), 120],
        (1,),
        lambda x, *_: torch.cat([0.5 * (x[:-1] + x[1:]), torch.zeros(1)]),
    ),
    "smooth": Case(
        4,
        32,
        lambda: [_random(120), _zeros(120), 120],
        (1,),
        lambda x, *_: 0.5 * (x + torch.cat([x[1:], x[-1:]])),
        wrong=lambda: [_random(120), 120],
    ),
    "count_negative": Case(
        1, 64, lambda: [_random(64), _zeros(64, dtype=INT)], (1,), lambda x, _: (x < 0).sum().to(INT).repeat(64)
    ),
    "largest_float": Case(
        4, 32, lambda: [_random(120), torch.full((1,), -1e30), 120], (1,), lambda x, *_: x.max()[None]
    ),
    "largest": Case(
        4,
        64,
        lambda: [_random(200), torch.full((1,), -1e30), _zeros(1, dtype=INT), _zeros(1, dtype=INT), 200],
        (1, 2, 3),
        lambda x, *_: (x.max()[None], x.argmax().to(INT)[None], _zeros(1, dtype=INT)),
        limit=0.5,
    ),
    "rank": Case(
        1,
        32,
        lambda: [_random(100).sort()[0], _random(32), _zeros(32, dtype=INT), 100],
        (2,),
        lambda s, x, *_: torch.searchsorted(s, x).to(INT),
        limit=0.5,
    ),
}
COPIES = {
    "pipeline": Case(1, 64, lambda: [_random(4, 64), _zeros(4, 64), 4], (1,), lambda x, *_: x.flip(1)),
    "one_tile": Case(3, 64, lambda: [_random(3, 64), _zeros(3, 64)], (1,), lambda x, *_: x.flip(1)),
    "rows": Case(1, 64, lambda: [_random(4, 64), _zeros(4, 64), 4], (1,), lambda x, *_: 2 * x.flip(1)),
    "phases": Case(
        1,
        64,
        lambda: [_random(4, 64), _zeros(4, 64), 4],
        (1,),
        lambda x, *_: 2 * x.flip(1),
        wrong=lambda: [_random(1, 64), _zeros(1, 64), 1],
    ),
    "counted": Case(1, 64, lambda: [_random(64), _zeros(64)], (1,), lambda x, *_: x.flip(0)),
}
TABLE = {"barriers": BARRIERS, "bounds": BOUNDS, "divergence": DIVERGENCE, "blocks": BLOCKS, "copies": COPIES}
CASES = [
    pytest.param(file, name, case, id=f"{file}.{name}") for file, cases in TABLE.items() for name, case in cases.items()
]


@pytest.fixture(scope="module")
def files() -> dict[str, File]:
    """Loaded once: what is compiled for one case serves all of its file."""
    return {name: load(FILES / f"{name}.cu") for name in TABLE}


def planted(file: File, name: str) -> dict[int, str]:
    """The lines of a kernel that are marked, with the kind of the mistake."""
    starts = sorted(declared.line for declared in file.declared.values())
    start = file.declared[name].line
    end = next((line for line in starts if line > start), len(file.text.splitlines()) + 1)
    rows = enumerate(file.text.splitlines()[start - 1 : end - 1], start)
    return {number: match[1] for number, row in rows if (match := MISTAKE.search(row))}


def lines(found: list[Finding]) -> set[int]:
    return {line for finding in found for line in (finding.line, finding.other_line)} - {0}


@pytest.mark.parametrize(("file", "name", "case"), CASES)
def test_a_planted_mistake_is_found_in_its_line(files, file, name, case):
    kernel = files[file][f"{name}_wrong"]
    marks = planted(files[file], kernel.name)
    assert marks
    found = check(
        kernel, case.grid, case.block, *(case.wrong or case.arguments)(), shared=case.shared, limit=case.limit
    )
    assert {finding.kind for finding in found} == set(marks.values()), "\n".join(map(str, found))
    if "endless-loop" in marks.values():  # it is stopped wherever it is just then
        assert lines(found) <= set(marks)
    else:
        assert lines(found) == set(marks), "\n".join(map(str, found))


@pytest.mark.parametrize(("file", "name", "case"), CASES)
def test_the_correct_twin_is_clean(files, file, name, case):
    found = check(files[file][name], case.grid, case.block, *case.arguments(), shared=case.shared)
    assert not found, "\n".join(map(str, found))


@pytest.mark.parametrize("order", [0, 1, 7])
@pytest.mark.parametrize(("file", "name", "case"), CASES)
def test_the_correct_twin_is_right_in_any_order_of_threads(files, file, name, case, order):
    given, args = case.arguments(), case.arguments()
    expected = case.expected(*given)
    files[file][name](case.grid, case.block, *args, shared=case.shared, order=order)
    results = tuple(args[i] for i in case.results)
    torch.testing.assert_close(results, expected if isinstance(expected, tuple) else (expected,))


def test_every_planted_mistake_has_a_case(files):
    for file, cases in TABLE.items():
        assert {name for name in files[file] if name.endswith("_wrong")} == {f"{name}_wrong" for name in cases}
        assert {name for name in files[file] if not name.endswith("_wrong")} == set(cases)
    assert sum(map(len, TABLE.values())) >= 24


# What the page about the runner shows is what `check` prints, but for who happened to be the first to be seen.
PAGE = Path(__file__).parents[3] / "docs" / "kernels" / "cuda.md"
SHOWN = re.compile(r"<!-- finding (\S+) -->\n```text\n(?:(.*?)\n)??```", re.DOTALL)


def shown(files: dict[str, File], spec: str) -> str:
    file, name = spec.split(".")
    case, kernel = TABLE[file][name], files[file][f"{name}_wrong"]
    found = check(
        kernel, case.grid, case.block, *(case.wrong or case.arguments)(), shared=case.shared, limit=case.limit
    )
    return re.sub(r"  // MISTAKE.*", "", "\n".join(map(str, found)))


@pytest.mark.parametrize("spec", [match[1] for match in SHOWN.finditer(PAGE.read_text(encoding="utf-8"))])
def test_the_page_shows_what_is_printed(files, spec):
    page = next(match[2] or "" for match in SHOWN.finditer(PAGE.read_text(encoding="utf-8")) if match[1] == spec)
    anybody = re.compile(r"\(\d+,\d+,\d+\)|element \d+|\[\d+\]|\d+ bytes past a")
    assert anybody.sub("…", page) == anybody.sub("…", shown(files, spec))
