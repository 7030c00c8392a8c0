"""Records as pictures: time or memory against size, throughput as bars, and everything under the machine's roof.

Within a picture each implementation has a colour, a marker, a line style and a
hatch of its own, and lines carry their names at the end, so that the picture can
be read in black and white. SVG, with text as text.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlsys.bench.core import Plot, describe
from mlsys.bench.records import Record
from mlsys.bench.tables import amount, implementations

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#7F7F7F")  # Okabe & Ito 2008
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
STYLES = len(COLOURS)
YLABELS = {"time": "time per {per} (ms)", "memory": "peak memory (MiB)", "throughput": "throughput"}


def new_figure(columns: int, rows: int = 1, width: float = 4.6, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """A figure that belongs to no window and no global state, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def to_svg(figure: Figure) -> str:
    """The figure as SVG text, the same bytes for the same figure."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "mlsys", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return "\n".join(line.rstrip() for line in svg[svg.index("<svg") :].splitlines()) + "\n"


def draw(plot: Plot, records: Sequence[Record]) -> str | None:
    """The picture a benchmark asks for, as SVG; None if no record has what it shows."""
    shown = [r for r in records if plot.only(r.case) and _value(plot, r) is not None]
    if not shown:
        return None
    names = implementations(records)
    return _bars(plot, shown, names) if plot.y == "throughput" else _lines(plot, shown, names)


def _value(plot: Plot, record: Record) -> float | None:
    if plot.y == "memory":
        return None if record.peak_bytes is None else record.peak_bytes / 2**20
    if record.seconds is None:
        return None
    if plot.y == "throughput":
        return record.items / record.seconds
    return record.seconds * 1e3 / (record.case[plot.per] if plot.per else 1)


def _panels(plot: Plot, records: Sequence[Record]) -> dict[str, list[Record]]:
    panels: dict[str, list[Record]] = {}
    for record in records:
        title = describe({key: record.case.get(key) for key in plot.panel}) or "full" if plot.panel else ""
        panels.setdefault(title, []).append(record)
    return panels


def _lines(plot: Plot, records: Sequence[Record], names: Sequence[str]) -> str:
    panels = _panels(plot, records)
    lines = {title: group for title, group in panels.items() if len({r.case[plot.x] for r in group}) > 1}
    panels = lines or panels  # a panel with one size says nothing about growth, where others do
    columns = min(2, len(panels))
    figure, axes = new_figure(columns, -(-len(panels) // columns))
    for ax, (title, group) in zip(axes, panels.items(), strict=False):
        ends = []
        for style, name in enumerate(names):
            points = sorted((r.case[plot.x], _value(plot, r)) for r in group if r.impl == name)
            if not points:
                continue
            x, y = zip(*points, strict=True)
            look: dict[str, Any] = {
                "color": COLOURS[style % STYLES],
                "marker": MARKERS[style % STYLES],
                "linestyle": LINES[style % STYLES],
            }
            ax.plot(x, y, **look, label=name)
            ends.append((y[-1], x[-1], name, COLOURS[style % STYLES]))
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ticks = sorted({r.case[plot.x] for r in group})
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.set_xlim(ticks[0] / 1.15, ticks[-1] * 2.1)  # room for the names at the ends of the lines
        ax.minorticks_off()
        ax.grid(True, which="major", alpha=0.3)
        ax.set(
            title=title, xlabel=plot.xlabel, ylabel=YLABELS[plot.y].format(per=(plot.per or "call").removesuffix("s"))
        )
        _name_lines(ax, ends)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    return to_svg(figure)


def _name_lines(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each line's name at its end, moved apart where the ends are close."""
    low, high = (math.log(v) for v in ax.get_ylim())
    gap = (high - low) * 0.07
    at = -math.inf
    for y, x, name, colour in sorted(ends):
        at = max(math.log(y), at + gap)
        ax.annotate(
            name, (x, y), xytext=(x * 1.12, math.exp(at)), textcoords="data", color=colour, fontsize=8, va="center"
        )


def _bars(plot: Plot, records: Sequence[Record], names: Sequence[str]) -> str:
    panels = _panels(plot, records)
    columns = min(2, len(panels))
    figure, axes = new_figure(columns, -(-len(panels) // columns), height=2.1)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    for ax, (title, group) in zip(axes, panels.items(), strict=False):
        present = [name for name in names if any(r.impl == name for r in group)]
        for row, name in enumerate(reversed(present)):
            record = next(r for r in group if r.impl == name)
            value = _value(plot, record)
            assert value is not None
            style = names.index(name)
            look: dict[str, Any] = {"color": COLOURS[style % STYLES], "hatch": HATCHES[style % STYLES]}
            ax.barh(row, value, **look, alpha=0.75, edgecolor="white")
            ax.text(value, row, " " + amount(value, ""), va="center", fontsize=8)
        ax.set_yticks(range(len(present)), list(reversed(present)))
        ax.set_xlim(0, 1.22 * max(v for r in group if (v := _value(plot, r)) is not None))
        ax.set(title=title, xlabel=f"{group[0].unit} per second ({plot.xlabel})")
        ax.ticklabel_format(axis="x", style="sci", scilimits=(0, 5))
        ax.grid(True, axis="x", alpha=0.3)
    return to_svg(figure)


def roofline(records: Sequence[Record]) -> str | None:
    """All timed records under the measured roofs of their machine, one roof for each dtype and thread count."""
    timed = [r for r in records if r.seconds and r.limit_flops and r.limit_bandwidth and r.flops and r.bytes]
    if not timed:
        return None
    names = implementations(timed)
    figure, axes = new_figure(1, width=7.6, height=4.8)
    ax = axes[0]
    intensities = [r.flops / r.bytes for r in timed]
    roofs: dict[str, Any] = {}
    for r in timed:
        roofs[f"{r.case.get('dtype', 'float32')}, {r.threads} thread{'s' if r.threads > 1 else ''}"] = r
    ridges = [r.limit_flops / r.limit_bandwidth for r in roofs.values()]
    low, high = min(*intensities, *ridges) / 4, max(*intensities, *ridges) * 3
    for line, (label, r) in enumerate(roofs.items()):
        x = sorted({low, r.limit_flops / r.limit_bandwidth, high})
        y = [min(r.limit_flops, v * r.limit_bandwidth) / 1e9 for v in x]
        ax.plot(x, y, color="black", linestyle=LINES[line % STYLES], linewidth=1.2, zorder=1)
        text = f"{label}: {amount(r.limit_flops, 'FLOP/s')}"
        ax.annotate(text, (high, y[-1]), (-2, 3), textcoords="offset points", ha="right", fontsize=8)
    gigabytes = max(r.limit_bandwidth for r in roofs.values()) / 1e9
    slope = math.degrees(math.atan(gigabytes))
    at = low * 1.3
    ax.text(
        at,
        1.15 * at * gigabytes,
        f"memory: {gigabytes:.1f} GB/s",
        rotation=slope,
        rotation_mode="anchor",
        transform_rotates_text=True,
        fontsize=8,
    )
    for style, name in enumerate(names):
        mine = [r for r in timed if r.impl == name]
        ax.scatter(
            [r.flops / r.bytes for r in mine],
            [r.flops / r.seconds / 1e9 for r in mine if r.seconds],
            color=COLOURS[style % STYLES],
            marker=MARKERS[style % STYLES],
            s=28,
            label=name,
            zorder=2,
            alpha=0.85,
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.grid(True, which="major", alpha=0.3)
    ax.set(
        xlabel="arithmetic intensity (FLOP per byte that must move)",
        ylabel="achieved GFLOP/s",
        title="Under the roof: how near each implementation comes to this machine's limit",
    )
    ax.legend(fontsize=8, loc="lower right")
    return to_svg(figure)
