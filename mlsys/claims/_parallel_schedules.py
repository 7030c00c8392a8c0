"""Published numbers about pipeline schedules, found by simulating this library's own tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

from mlsys.claims._parallel_time import MEGATRON, ZERO_BUBBLE
from mlsys.claims.core import Claim

GPIPE = "Huang et al. 2019, arXiv:1811.06965, section 2.3"
RELEASED = "Qi et al., description of the released code (sail-sg/zero-bubble-pipeline-parallelism), comparison table"

AREA = "parallel.schedules"
P, M = 8, 32
TIMES = (10, 12, 8)  # of F, B and W, where the formula has all three


@cache
def simulated(
    name: str, v: int = 0, times: tuple[int, int, int] = (1, 1, 1), p: int = P, m: int = M
) -> dict[str, float]:
    """Of one schedule: how long the rank that waits longest waits, what it works, what ranks hold, messages sent."""
    from mlsys.parallel.schedules import SCHEDULES, simulate

    found = simulate(SCHEDULES[name](p, m, v) if v else SCHEDULES[name](p, m), *times)
    home = found.summary.rank_of
    return {
        "wait": max(rank.idle for rank in found.ranks.values()),
        "work": found.ranks[0].busy,
        "held": max(found.peak.values()),
        "share": found.bubble,
        "messages": 2 * m * sum(a != b for a, b in pairwise(home)),
    }


def _claim(name: str, source: str, what: str, published: float, compute: Callable[[], float], **more: Any) -> Claim:
    usual = {"unit": "", "digits": 4, "formula": True}
    return Claim(
        name=f"simulated-{name}",
        area=AREA,
        source=source,
        what=what,
        published=published,
        compute=compute,
        **{**usual, **more},
    )


def _over_work(name: str, v: int = 0) -> float:
    found = simulated(name, v)
    return found["wait"] / found["work"]


SIMULATED = [
    _claim(
        "gpipe-bubble",
        f"{GPIPE}, (K−1)/(M+K−1) at K = {P}, M = 4K",
        f"idle share of GPipe, {P} stages and {M} microbatches, simulated",
        0.1795,
        lambda: simulated("gpipe")["share"],
    ),
    _claim(
        "1f1b-bubble",
        f"{MEGATRON}, section 2.2.1, (p−1)/m at p = {P}, m = {M}",
        "bubble of 1F1B over its work, simulated",
        0.21875,
        lambda: _over_work("1f1b"),
        digits=5,
    ),
    *(
        _claim(
            f"interleaved-{v}-bubble",
            f"{MEGATRON}, section 2.2.2, (p−1)/(v·m) at p = {P}, m = {M}, v = {v}",
            f"bubble of 1F1B with {v} interleaved chunks a rank over its work, simulated",
            published,
            lambda v=v: _over_work("interleaved", v),  # type: ignore[misc]
            digits=digits,
        )
        for v, published, digits in ((2, 0.109375, 6), (4, 0.0546875, 7))
    ),
    _claim(
        "1f1b-held",
        f"{MEGATRON}, section 2.2.1: at most p microbatches in flight, for GPipe m; p/m at p = {P}, m = {M}",
        "most microbatches that a rank of 1F1B holds over those of GPipe, simulated",
        0.25,
        lambda: simulated("1f1b")["held"] / simulated("gpipe")["held"],
    ),
    *(
        _claim(
            f"{name}-bubble",
            f"{ZERO_BUBBLE}, section 2.3 and Table 2, {formula} at p = {P}, times 10, 12 and 8",
            f"bubble of {name.upper()}, the wait within a rank's span, simulated",
            published,
            lambda name=name: simulated(name, times=TIMES)["wait"],  # type: ignore[misc]
            digits=0,
        )
        for name, formula, published in (
            ("zb-h1", "(p−1)(T_F+T_B−T_W)", 98),
            ("zb-h2", "(p−1)(T_F+T_B−2T_W)", 42),
        )
    ),
    *(
        _claim(
            f"{name}-held",
            f"{ZERO_BUBBLE}, {section}, {formula} at p = {P}",
            f"most microbatches that a rank of {name.upper()} holds, in whole activations, simulated",
            published,
            lambda name=name: simulated(name)["held"],  # type: ignore[misc]
            digits=0,
        )
        for name, section, formula, published in (
            ("zb-h1", "section 2.3 and Table 2", "p", 8),
            ("zb-h2", "section 2.3 and Table 2", "2p−1", 15),
            ("zbv", "section 6", "p, as 1F1B", 8),
        )
    ),
    _claim(
        "zbv-bubble",
        f"{ZERO_BUBBLE}, section 6: zero bubble if T_F = T_B = T_W",
        "bubble of ZB-V, the wait within a rank's span, simulated",
        0,
        lambda: simulated("zbv")["wait"],
    ),
    _claim(
        "zbv-messages",
        f"{RELEASED}: twice the communication of 1F1B",
        "messages of a step of ZB-V over those of 1F1B, counted",
        2,
        lambda: simulated("zbv")["messages"] / simulated("1f1b")["messages"],
        formula=False,
        digits=2,
    ),
    _claim(
        "zb-h1-rate",
        f"{RELEASED}: bubble rate (p−1)/(3(m+p−1)) at p = 4, m = 8",
        "idle share of ZB-H1 within a step, simulated with equal F, B and W",
        0.0909,
        lambda: simulated("zb-h1", p=4, m=8)["share"],
        expected="disagrees",
        reason=(
            "a third of 1F1B's wait, printed as a share of 1F1B's longer step; as a share of its own step, which is "
            "3m+p−1 long, it is (p−1)/(3m+p−1)"
        ),
    ),
]
