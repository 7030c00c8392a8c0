"""The pictures of nearest-neighbour search: recall against queries per second, growth with n, build, memory.

Recall against queries per second is drawn as ann-benchmarks draws it: one line an
implementation, through the settings of its knob, time on a logarithmic axis; better
is up and to the right. Recall is stretched towards 1 (by the logarithm of what is
missed), since from 0.99 to 0.999 is as far as from 0.9 to 0.99.

How a cost grows with n is fitted by a power law, cost = a·n^b, which is a line of slope
b where both axes are logarithmic; b stands in the key: 1 for brute force, ½ for √n
lists, near 0 for a graph.

See also:
    `mlsys.bench.neighbours` (which makes the records), `mlsys.bench.layers_plot` (one search through a graph),
    `mlsys.bench.plots` (all other pictures).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlsys.bench.core import describe
from mlsys.bench.plots import COLOURS, HATCHES, LINES, MARKERS, STYLES, _label_decades, new_figure, to_svg
from mlsys.bench.records import Record
from mlsys.bench.tables import amount, implementations

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RECALL = "recall@10"
KNOBS = ("ef", "n_probe", "effort")  # what is turned along a line
Look = dict[str, Any]


def looks(names: Sequence[str], like: Callable[[str], str] = lambda name: name) -> dict[str, Look]:
    """Colour, marker and line style of each; those that are alike share a colour."""
    kinds = list(dict.fromkeys(map(like, names)))
    return {
        name: {
            "color": COLOURS[kinds.index(like(name)) % STYLES],
            "marker": MARKERS[number % STYLES],
            "linestyle": LINES[number % STYLES],
            "markersize": 5,
        }
        for number, name in enumerate(names)
    }


def recall_against_queries(records: Sequence[Record], like: Callable[[str], str] = lambda name: name) -> str | None:
    """One panel a data set that has been searched in several settings; those that are `like` share a colour."""
    panels = largest(r for r in searches(records) if r.seconds and RECALL in r.figures)
    panels = {text: group for text, group in panels.items() if len({*map(knob, group)}) > 1}
    if not panels:
        return None
    names = implementations(records)
    figure, axes = new_figure(len(panels), width=6.4, height=4.4)
    for ax, (text, group) in zip(axes, panels.items(), strict=True):
        lines = by(group, lambda r: (r.impl, rest(r)))
        labels = {key: label(key, lines) for key in lines}
        styles = looks(sorted(labels.values(), key=lambda text: names.index(text.partition(", ")[0])), like)
        for key, some in lines.items():
            points = [(r.figures[RECALL], r.items / (r.seconds or 1)) for r in sorted(some, key=knob)]
            if some[0].role == "reference":  # the same work in each case
                points = [(points[0][0], float(np.median([rate for _, rate in points])))]
            ax.plot(*zip(*points, strict=True), **styles[labels[key]], label=labels[key])
        ax.set_yscale("log")
        _recalls(ax, min(r.figures[RECALL] for r in group))
        ax.set(title=text, xlabel="recall@10 (further right is better)", ylabel="queries per second")
        ax.grid(True, which="major", alpha=0.3)
        crowded = len(lines) > 6  # then beside the frame, for the lines need all of it
        where: Look = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if crowded else {"loc": "lower left"}
        ax.legend(fontsize=8, frameon=False, handlelength=3.2, **where)
    return to_svg(figure)


def recall_against_bytes(records: Sequence[Record]) -> str | None:
    """What a vector's bytes buy: recall over the size of a vector in the index; one panel a data set."""
    panels = largest(r for r in searches(records) if "bytes/vector" in r.figures and RECALL in r.figures)
    panels = {text: group for text, group in panels.items() if len({r.case.get("m") for r in group}) > 1}
    if not panels:
        return None
    names = implementations(records)
    figure, axes = new_figure(len(panels), width=6.0, height=4.0)
    for ax, (text, group) in zip(axes, panels.items(), strict=True):
        lines = by(group, lambda r: r.impl + (", opq" if r.case.get("opq") else ""))
        styles = looks(sorted(lines, key=lambda text: names.index(text.partition(", ")[0])))
        for name, some in lines.items():
            points = sorted({(r.figures["bytes/vector"], r.figures[RECALL]) for r in some})
            ax.plot(*zip(*points, strict=True), **styles[name], label=name)
        ax.set_xscale("log", base=2)
        ticks = [2**power for power in range(2, 12)]
        low, high = ax.get_xlim()
        ax.set_xticks(inside := [tick for tick in ticks if low <= tick <= high], list(map(str, inside)))
        ax.set(title=text, xlabel="bytes per vector in the index (fewer is better)", ylabel="recall@10")
        ax.grid(True, alpha=0.3)
        ax.legend(fontsize=8, frameon=False)
    return to_svg(figure)


COSTS: dict[str, Callable[[Record], float | None]] = {
    "time per query (µs)": lambda r: 1e6 * r.seconds / r.items if r.seconds else None,
    "distances per query": lambda r: r.figures.get("distances/query"),
    "time to build (s)": lambda r: r.figures.get("build s") if r.role != "reference" else None,
}


def growth(records: Sequence[Record]) -> str | None:
    """Costs against n on logarithmic axes, with the slope of the fitted line; None without three sizes of a set."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    names = implementations(records)
    groups = by(searches(records), lambda r: (r.case["data"], r.case.get("metric"), knob(r), rest(r)))
    most = max((len({r.case["n"] for r in group}) for group in groups.values()), default=0)
    if most < 3:
        return None
    group = next(group for group in groups.values() if len({r.case["n"] for r in group}) == most)
    for what, cost in COSTS.items():
        for name in names:
            points = sorted((r.case["n"], value) for r in group if r.impl == name and (value := cost(r)))
            if len(points) > 2:
                found.setdefault(what, {})[name] = points
    if not found:
        return None
    styles = looks(names)
    figure, axes = new_figure(len(found), width=4.6, height=4.0)
    for ax, (what, lines) in zip(axes, found.items(), strict=True):
        for name, points in lines.items():
            n, cost = np.array(points).T
            slope, _ = fitted(n, cost)
            ax.plot(n, cost, **styles[name], label=f"{name}: {slope:.2f}")
        _sizes(ax, sorted({n for points in lines.values() for n, _ in points}))
        _label_decades(ax)
        ax.set(title=f"{group[0].case['data']}, {knob_text(group[0])}", xlabel="vectors n", ylabel=what)
        ax.grid(True, alpha=0.3)
        ax.legend(fontsize=8, frameon=False, title="slope of the fit", title_fontsize=8)
    return to_svg(figure)


def fitted(n: np.ndarray, cost: np.ndarray) -> tuple[float, float]:
    """The exponent b and the factor a of cost = a·n^b, by least squares of the logarithms."""
    slope, start = np.polyfit(np.log(n), np.log(cost), 1)
    return float(slope), float(np.exp(start))


def build(records: Sequence[Record]) -> str | None:
    """Vectors indexed a second, of each implementation but brute force, which only keeps them."""
    shown = [r for r in records if r.case.get("task") == "build" and r.seconds and r.role != "reference"]
    panels = by(shown, lambda r: describe({key: value for key, value in r.case.items() if key not in ("task", *KNOBS)}))
    return _bars(
        records,
        {f"build, {text}": {r.impl: r for r in group} for text, group in panels.items()},
        lambda r: r.items / (r.seconds or 1),
        "vectors indexed per second (higher is better)",
    )


def memory(records: Sequence[Record]) -> str | None:
    """Bytes per vector of each implementation; one panel a data set."""
    panels = {}
    for text, group in largest(r for r in searches(records) if "bytes/vector" in r.figures).items():
        lines = by(group, lambda r: (r.impl, rest(r)))
        panels[text] = {label(key, lines): some[0] for key, some in lines.items()}
    return _bars(records, panels, lambda r: r.figures["bytes/vector"], "bytes per vector (lower is better)")


def _bars(
    records: Sequence[Record], panels: dict[str, dict[str, Record]], value: Callable[[Record], float], xlabel: str
) -> str | None:
    """One panel a title, with a bar for each of its names; None without panels."""
    if not panels:
        return None
    names = implementations(records)
    figure, axes = new_figure(len(panels), width=5.2, height=2.6)
    for ax, (text, bars) in zip(axes, panels.items(), strict=True):
        ordered = sorted(bars, key=lambda name: names.index(bars[name].impl), reverse=True)
        for row, record in enumerate(bars[name] for name in ordered):
            style = names.index(record.impl) % STYLES
            ax.barh(row, value(record), color=COLOURS[style], hatch=HATCHES[style], alpha=0.75, edgecolor="white")
            ax.text(value(record), row, " " + amount(value(record), ""), va="center", fontsize=8)
        ax.set_yticks(range(len(ordered)), ordered, fontsize=8)
        ax.set_xlim(0, 1.25 * max(map(value, bars.values())))
        ax.set(title=text, xlabel=xlabel)
        ax.ticklabel_format(axis="x", style="sci", scilimits=(0, 5))
        ax.locator_params(axis="x", nbins=5)
        ax.grid(True, axis="x", alpha=0.3)
    return to_svg(figure)


USUAL = {"recall": recall_against_queries, "growth": growth, "build": build, "memory": memory}  # of most indexes


# --- records ----------------------------------------------------------------------------------------------------------


def searches(records: Sequence[Record]) -> list[Record]:
    """Those of the task "search"."""
    return [r for r in records if r.case.get("task") == "search"]


def by(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    """Groups, in the order in which they come."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def largest(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Of each data set those at the n that has the most cases, at the largest such n; by the title of their panel."""
    found = {}
    for group in by(records, lambda r: (r.case["data"], r.case.get("metric"))).values():
        sizes = by(group, lambda r: r.case["n"])
        n = max(sizes, key=lambda n: (len({describe(r.case) for r in sizes[n]}), n))
        found[title(group[0], n)] = sizes[n]
    return found


def knob(record: Record) -> float:
    """The value of what is turned; 0 if nothing is."""
    return next((float(record.case[name]) for name in KNOBS if record.case.get(name) is not None), 0.0)


def knob_text(record: Record) -> str:
    """It in words: `ef=80`."""
    return describe({name: record.case[name] for name in (*KNOBS, "m") if name in record.case})


def rest(record: Record) -> str:
    """What else a case says: `m=16`, for a line of its own; nothing of the reference, whose work is always the same."""
    if record.role == "reference":
        return ""
    left_out = {"task", "data", "metric", "n", "queries", *KNOBS}
    return describe({key: value for key, value in record.case.items() if key not in left_out})


def label(key: tuple[str, str], lines: dict[tuple[str, str], Any]) -> str:
    """An implementation's name, with the rest of the case where there are several lines of it."""
    name, others = key
    return f"{name}, {others}" if others and sum(known == name for known, _ in lines) > 1 else name


def title(record: Record, n: int) -> str:
    """Of a panel: the data set, by the name of its file, and how much of it."""
    name = str(record.case["data"]).replace("\\", "/").rpartition("/")[2]
    metric = record.case.get("metric")
    return f"{name}, n = {n:,}" + (f", {metric}" if metric else "")


def _recalls(ax: Axes, least: float) -> None:
    """An axis on which 0.9, 0.99 and 0.999 are equally far apart; 1 is drawn where 0.9995 would be."""
    nothing = 5e-4

    def stretched(recall: Any) -> Any:
        return -np.log10(1 + nothing - np.clip(recall, 0, 1 + 0.9 * nothing))

    def back(place: Any) -> Any:
        return 1 + nothing - 10.0 ** -np.asarray(place)

    ax.set_xscale("function", functions=(stretched, back))
    ticks = [tick for tick in (0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1) if tick >= least - 0.02]
    low, high = stretched(least), stretched(1.0)
    margin = 0.05 * max(high - low, 0.1)
    ax.set_xlim(float(back(low - margin)), float(back(high + margin)))
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.tick_params("x", labelsize=8)


def _sizes(ax: Axes, sizes: Sequence[float]) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.minorticks_off()
    ax.set_xticks(sizes, [f"{n / 1000:g}k" for n in sizes])
    ax.tick_params("x", labelsize=8, rotation=45)
