"""What the two benchmarks of `two_hosts.sh` share: the network between the ranks, what crosses it, and the picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mlsys.bench import plots
from mlsys.bench.records import Record

VARIABLE = "MLSYS_LINK_MBIT"  # set by two_hosts.sh: Mbit/s between its hosts
LOOPBACK = "loopback"
RANKS = 4
PREDICTED = "predicted ms"  # the figure of a record


def link_mbit() -> float | None:
    """Mbit/s between the two hosts that the ranks are on; None where all are on one."""
    text = os.environ.get(VARIABLE)
    return float(text) if text else None


def network() -> str:
    """The network as a case names it, such as "1000 Mbit/s"."""
    mbit = link_mbit()
    return LOOPBACK if mbit is None else f"{mbit:g} Mbit/s"


def mbit_of(case: Mapping[str, Any]) -> float | None:
    """The Mbit/s that `network` has put into a case."""
    words = str(case["network"]).split()
    return float(words[0]) if words[1:] == ["Mbit/s"] else None


def case(**settings: Any) -> dict[str, Any]:
    """A case of these settings on the network that is there."""
    return {"network": network(), "ranks": RANKS, **settings}


def cable(n: int) -> float | None:
    """Bytes/s that may cross the cable each way, half of n ranks on either side of it; None where there is none."""
    mbit = link_mbit()
    return None if mbit is None or n % 2 else mbit * 1e6 / 8


def crossing(algorithm: str, n: int, size: float) -> float:
    """Bytes that an all-reduce of so many sends over the cable each way: all ranks of a host together."""
    return {
        "ring": 2 * size * (n - 1) / n,  # one link of the ring leads out
        "hierarchical": size,  # 2(g − 1)/g of it, by g = 2 hosts
        "halving_doubling": n / 2 * size,  # half a vector from each rank, there and back
        "recursive_doubling": n / 2 * size,  # a vector from each rank, once
    }[algorithm]


def figures(predicted_s: float | None) -> dict[str, float]:
    """What the model says that a call takes, for the record; nothing where it cannot say."""
    return {} if predicted_s is None else {PREDICTED: 1e3 * predicted_s}


def picture(records: Sequence[Record], panel: str, title: str) -> str | None:
    """Time against bandwidth for each implementation, with what the model predicts dashed; a panel for each case."""
    shown = [r for r in records if r.seconds is not None and mbit_of(r.case) is not None]
    panels = sorted({r.case[panel] for r in shown}, key=str if panel == "model" else float)
    if not shown:
        return None
    names = list(dict.fromkeys(r.impl for r in shown))
    figure, axes = plots.new_figure(len(panels), width=5.2, height=3.9)
    for ax, value in zip(axes, panels, strict=True):
        ends = []
        for style, name in enumerate(names):
            mine = [r for r in shown if r.case[panel] == value and r.impl == name]
            points = sorted((mbit_of(r.case) or 0.0, r.seconds or 0.0, r.figures.get(PREDICTED)) for r in mine)
            if not points:
                continue
            x, y, predicted = zip(*points, strict=True)
            colour = plots.COLOURS[style % plots.STYLES]
            ax.plot(x, [1e3 * s for s in y], color=colour, marker=plots.MARKERS[style % plots.STYLES])
            if all(p is not None for p in predicted):
                ax.plot(x, predicted, color=colour, linestyle=":", linewidth=1)
            ends.append((1e3 * y[-1], x[-1], name, colour))
        ticks = sorted({mbit_of(r.case) or 0.0 for r in shown})
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.set_xlim(ticks[0] / 1.3, ticks[-1] * max(4.0, (ticks[-1] / ticks[0]) ** 0.6))
        ax.grid(True, which="major", alpha=0.3)
        ax.set(title=title.format(value), xlabel="Mbit/s between the hosts (dotted: predicted)", ylabel="time (ms)")
        plots.name_lines(ax, ends)
    return plots.to_svg(figure)
