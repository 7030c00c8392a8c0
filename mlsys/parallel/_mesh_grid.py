"""Who stands where: ranks as a grid of replicas, stages and shares, and the groups that talk to each other.

    rank = (stage · dp + replica) · tp + share

See also:
    `mlsys.parallel.mesh` (why in this order).
"""

from __future__ import annotations

from typing import NamedTuple

from mlsys.perf import _checks

KINDS = ("dp", "pp", "tp")
ORDER = ("pp", "dp", "tp")  # of the dimensions, from the outermost in


class Place(NamedTuple):
    """Where a rank stands: in which replica, with which stages (by pipeline rank), with which share of the layers."""

    dp: int
    pp: int
    tp: int


class Grid(NamedTuple):
    """`dp` replicas of `pp` pipeline ranks of `tp` shares.

    >>> Grid(dp=2, pp=2, tp=2).groups("dp")
    [[0, 2], [1, 3], [4, 6], [5, 7]]
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.dp * self.pp * self.tp

    def place(self, rank: int) -> Place:
        """Where `rank` stands."""
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank={rank}: the grid {tuple(self)} (dp, pp, tp) has ranks 0 … {self.ranks - 1}")
        rest, tp = divmod(rank, self.tp)
        pp, dp = divmod(rest, self.dp)
        return Place(dp, pp, tp)

    def rank(self, place: Place) -> int:
        """Who stands at `place`."""
        for kind in KINDS:
            if not 0 <= getattr(place, kind) < getattr(self, kind):
                raise ValueError(f"place.{kind}={getattr(place, kind)}: there are {getattr(self, kind)}, from 0 on")
        return (place.pp * self.dp + place.dp) * self.tp + place.tp

    def groups(self, kind: str) -> list[list[int]]:
        """The groups of ranks that differ in `kind` ("dp", "pp" or "tp") alone, each in its order."""
        _checks.known("kind", kind, KINDS)
        found: dict[Place, list[int]] = {}
        for rank in range(self.ranks):
            place = self.place(rank)
            found.setdefault(place._replace(**{kind: 0}), []).append(rank)
        return list(found.values())

    def group_of(self, rank: int, kind: str) -> list[int]:
        """The group of `rank`."""
        return next(group for group in self.groups(kind) if rank in group)


def checked(dp: int, pp: int, tp: int) -> Grid:
    """The grid, of whole numbers from 1 on."""
    return Grid(_checks.whole("dp", dp), _checks.whole("pp", pp), _checks.whole("tp", tp))


def groups(dp: int, pp: int, tp: int) -> dict[str, list[list[int]]]:
    """All groups of the grid by kind: what a contract asks for, and `torch.distributed.new_group` wants."""
    grid = checked(dp, pp, tp)
    return {kind: grid.groups(kind) for kind in KINDS}


def show(grid: Grid) -> str:
    """The grid as text: a row for each replica, a column for each pipeline rank; the ranks of a cell share layers.

    >>> print(show(Grid(dp=2, pp=2, tp=2)))
    8 ranks: dp=2, pp=2, tp=2
    <BLANKLINE>
               stage 0  stage 1
    replica 0  0 1      4 5
    replica 1  2 3      6 7
    <BLANKLINE>
    tp, side by side in a cell      [0 1] [2 3] [4 5] [6 7]
    dp, one below the other         [0 2] [1 3] [4 6] [5 7]
    pp, one place from cell to cell [0 4] [1 5] [2 6] [3 7]
    """
    cells = [
        [" ".join(str(grid.rank(Place(dp, pp, tp))) for tp in range(grid.tp)) for pp in range(grid.pp)]
        for dp in range(grid.dp)
    ]
    heads = [f"stage {pp}" for pp in range(grid.pp)]
    widths = [max(len(head), *(len(row[i]) for row in cells)) for i, head in enumerate(heads)]
    left = len(f"replica {grid.dp - 1}")

    def line(name: str, row: list[str]) -> str:
        return "  ".join([name.ljust(left), *(cell.ljust(width) for cell, width in zip(row, widths))]).rstrip()

    words = {
        "tp": "tp, side by side in a cell",
        "dp": "dp, one below the other",
        "pp": "pp, one place from cell to cell",
    }
    named = [
        f"{words[kind]:31} " + " ".join("[" + " ".join(map(str, group)) + "]" for group in grid.groups(kind))
        for kind in ("tp", "dp", "pp")
    ]
    rows = [line(f"replica {dp}", row) for dp, row in enumerate(cells)]
    title = f"{grid.ranks} ranks: dp={grid.dp}, pp={grid.pp}, tp={grid.tp}"
    return "\n".join([title, "", line("", heads), *rows, "", *named])
