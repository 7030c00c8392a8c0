"""Records as pictures: time or memory against size, throughput as bars, and everything under the machine's roof.

Within a picture each implementation has a colour, a marker, a line style and a
hatch of its own, and lines carry their names at the end, so that the picture can
be read in black and white. SVG, with text as text.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlsys.bench.core import Plot, describe
from mlsys.bench.records import Record
from mlsys.bench.tables import amount, implementations, settings
from mlsys.perf.hardware import Hardware, peak_flops

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#7F7F7F")  # Okabe & Ito 2008
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
FILLS = ("full", "none", "left", "right", "bottom", "top")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
STYLES = len(COLOURS)
# Names of lines: how far from the line, and how wide at most, as shares of the frame; a reader's font may be wider
NAME_GAP, MOST_NAME, WIDER_FONT = 0.025, 0.6, 1.1
HEADINGS = ("roofs, and the fill of the points under each", "roofs", "implementations")  # of the roofline's key
YLABELS = {
    "speedup": "times as fast as the fastest peer",
    "time": "time per {per} (ms)",
    "memory": "peak memory (MiB)",
    "throughput": "{unit} per second",
}


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
    if plot.y == "roofline":
        return roofline(shown)
    return to_svg(figure(plot, shown, implementations(records)))


def figure(plot: Plot, records: Sequence[Record], names: Sequence[str]) -> Figure:
    """Records that have what the plot shows, as lines or bars; `names` are the implementations in their order."""
    return _lines(plot, records, names) if plot.x else _bars(plot, records, names)


def _value(plot: Plot, record: Record) -> float | None:
    if plot.y == "memory":
        return None if record.peak_bytes is None else record.peak_bytes / 2**20
    if plot.y == "speedup":
        return 1 / record.ratio_to_peer if record.ratio_to_peer else None
    if record.seconds is None:
        return None
    if plot.y == "throughput":
        return record.items / record.seconds
    return record.seconds * 1e3 / (record.case[plot.per] if plot.per else 1)


def _ylabel(plot: Plot, records: Sequence[Record]) -> str:
    return YLABELS[plot.y].format(per=(plot.per or "call").removesuffix("s"), unit=records[0].unit)


def panels(plot: Plot, records: Sequence[Record]) -> dict[str, list[Record]]:
    """What each panel shows, by its title."""
    found: dict[str, list[Record]] = {}
    setting = settings(records)
    for record in records:
        title = describe({key: record.case.get(key) for key in plot.panel}) or "full" if plot.panel else ""
        found.setdefault(", ".join(filter(None, (title, setting(record)))), []).append(record)
    return found


def _lines(plot: Plot, records: Sequence[Record], names: Sequence[str]) -> Figure:
    shown = panels(plot, records)
    lines = {title: group for title, group in shown.items() if len({r.case[plot.x] for r in group}) > 1}
    shown = lines or shown  # a panel with one size says nothing about growth, where others do
    columns = min(2, len(shown))
    figure, axes = new_figure(columns, -(-len(shown) // columns))
    named = []
    for ax, (title, group) in zip(axes, shown.items(), strict=False):
        ends: list[tuple[float, float, str, str]] = []
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
        ax.set_xticks(ticks, [_size(t) if plot.x == "bytes" else str(t) for t in ticks])
        if len(ticks) > 6:
            ax.tick_params("x", labelsize=8, rotation=45)
        ax.set_xlim(ticks[0] / 1.15, ticks[-1] * 1.15)
        _label_decades(ax)
        ax.grid(True, which="major", alpha=0.3)
        ax.set(title=title, xlabel=plot.xlabel, ylabel=_ylabel(plot, group))
        named.append((ax, ends))
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    figure.draw_without_rendering()  # which gives the axes the width that names and titles are fitted to
    _fit_titles(axes)
    for ax, ends in named:
        name_lines(ax, ends)
    return figure


def _fit_titles(axes: Sequence[Axes]) -> None:
    """Make a title that is wider than its frame small enough for it."""
    for ax in axes:
        share = WIDER_FONT * ax.title.get_window_extent().width / ax.get_window_extent().width
        if share > 1:
            ax.title.set_fontsize(float(ax.title.get_fontsize()) / share)


def _size(n: int) -> str:
    """A number of bytes, in as few letters as a tick has room for: `64K`."""
    power = next((p for p in (3, 2, 1) if n >= 1024**p), 0)
    return f"{n / 1024**power:g}{' KMG'[power].strip()}"


def _label_decades(ax: Axes) -> None:
    """The fewer decades, the more ticks in each; written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, high = ax.get_ylim()
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high / low < 10 else (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.minorticks_off()


def name_lines(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each line's name at its end, moved apart where the ends are close, in a frame made wide enough for them.

    ends: y, x, name and colour of each. Both axes are logarithmic.
    """
    low, high = (math.log(v) for v in ax.get_ylim())
    gap = (high - low) * 0.07
    ends = sorted(ends)
    at: list[float] = []
    for y, *_ in ends:
        at.append(max(math.log(y), at[-1] + gap) if at else math.log(y))
    ceiling = high - gap / 2
    for i in reversed(range(len(at))):
        at[i] = min(at[i], ceiling)
        ceiling = at[i] - gap
    texts = [
        ax.text(x, math.exp(height), name, color=colour, fontsize=8, va="center")
        for (_, x, name, colour), height in zip(ends, at, strict=True)
    ]
    distance = NAME_GAP * _make_room(ax, texts)
    for text in texts:
        text.set_x(text.get_position()[0] * math.exp(distance))


def _make_room(ax: Axes, texts: Sequence[Text]) -> float:
    """Move the right limit so that each text fits between where it begins and the frame; the logarithm of the range."""
    left, right = (math.log(v) for v in ax.get_xlim())
    frame = ax.get_window_extent().width
    for text in texts:
        share = min(MOST_NAME, NAME_GAP + WIDER_FONT * text.get_window_extent().width / frame)  # of the frame's width
        right = max(right, left + (math.log(text.get_position()[0]) - left) / (1 - share))
    ax.set_xlim(math.exp(left), math.exp(right))
    return right - left


def _bars(plot: Plot, records: Sequence[Record], names: Sequence[str]) -> Figure:
    from matplotlib.ticker import FuncFormatter

    shown = panels(plot, records)
    columns = min(2, len(shown))
    figure, axes = new_figure(columns, -(-len(shown) // columns), height=2.1)
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    for ax, (title, group) in zip(axes, shown.items(), strict=False):
        present = [name for name in names if any(r.impl == name for r in group)]
        for row, name in enumerate(reversed(present)):
            record = next(r for r in group if r.impl == name)
            value = _value(plot, record)
            assert value is not None
            style = names.index(name)
            look: dict[str, Any] = {"color": COLOURS[style % STYLES], "hatch": HATCHES[style % STYLES]}
            ax.barh(row, value, **look, edgecolor="white")
            ax.text(value, row, " " + amount(value, ""), va="center", fontsize=8)
        ax.set_yticks(range(len(present)), list(reversed(present)))
        ax.set_xlim(0, 1.22 * max(v for r in group if (v := _value(plot, r)) is not None))
        ax.set(title=title, xlabel=f"{_ylabel(plot, group)} ({plot.xlabel})")
        ax.locator_params(axis="x", nbins=5)
        ax.xaxis.set_major_formatter(FuncFormatter(_power_of_ten))
        ax.grid(True, axis="x", alpha=0.3)
    figure.draw_without_rendering()
    _fit_titles(axes)
    return figure


@dataclass(frozen=True)
class Roof:
    """One roof of a roofline picture: FLOP/s and bytes/s, and what to call it."""

    label: str
    peak: float
    bandwidth: float

    def __str__(self) -> str:
        return f"{self.label}: {amount(self.peak, 'FLOP/s')}, {amount(self.bandwidth, 'B/s')}"

    @property
    def ridge(self) -> float:
        """FLOP/B from which on it is flat."""
        return self.peak / self.bandwidth


def roofs(records: Sequence[Record]) -> list[tuple[Roof, list[Record]]]:
    """The measured roof of each machine, dtype and thread count, with the timed records that belong under it.

    Limits measured on different days differ a little; the roof is the highest, for a limit is what was
    reached once. Memory knows no dtypes, so those of one machine and thread count share a bandwidth.
    """
    timed = [r for r in records if r.seconds and r.limit_flops and r.limit_bandwidth and r.flops and r.bytes]
    several = len({r.machine.get("slug") for r in timed}) > 1
    groups: dict[tuple[str, str], list[Record]] = {}
    bandwidths: dict[str, float] = {}
    for r in timed:
        where = f"{r.threads} thread{'s' if r.threads > 1 else ''}" if r.device == "cpu" else r.device
        where = f"{r.ranks} ranks of {where}" if r.ranks > 1 else where
        where = f"{where}, {r.machine.get('slug')}" if several else where
        groups.setdefault((r.case.get("dtype", "float32"), where), []).append(r)
        bandwidths[where] = max(bandwidths.get(where, 0.0), r.limit_bandwidth or 0.0)
    return [
        (Roof(f"{dtype}, {where}", max(r.limit_flops or 0.0 for r in group), bandwidths[where]), group)
        for (dtype, where), group in groups.items()
    ]


def published_roof(hardware: Hardware, dtype: str) -> Roof:
    """The roof of a machine by its record: published, so that nothing quite reaches it."""
    return Roof(f"{hardware.name}, {dtype}", peak_flops(hardware, dtype), hardware.bandwidth)


def roofline(records: Sequence[Record], others: Sequence[Roof] = ()) -> str | None:
    """`roofline_figure` as SVG."""
    figure = roofline_figure(records, others)
    return None if figure is None else to_svg(figure)


def roofline_figure(records: Sequence[Record], others: Sequence[Roof] = ()) -> Figure | None:
    """All timed records, each under the measured roof of its machine, dtype and threads; None with nothing to draw.

    others: further roofs to compare with, drawn without points.
    A roof and the points under it share how the markers are filled; an implementation has a marker and a colour.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter

    measured = roofs(records)
    drawn = [roof for roof, _ in measured] + list(others)
    if not drawn:
        return None
    everything = [r for _, group in measured for r in group]
    benches = list(dict.fromkeys(r.benchmark for r in everything))
    names = [(b, impl) for b in benches for impl in implementations([r for r in everything if r.benchmark == b])]
    looks = {name: _look(style) for style, name in enumerate(names)}

    figure, (ax,) = new_figure(1, width=9.6, height=max(4.8, 1.0 + 0.2 * (len(drawn) + len(names))))
    intensities = [r.flops / r.bytes for r in everything] + [roof.ridge for roof in drawn]
    low, high = min(intensities) / 4, max(intensities) * 4
    keys = [Line2D([], [], linestyle="none", label=HEADINGS[0 if measured else 1])]
    for number, roof in enumerate(drawn):
        line: dict[str, Any] = {"color": "black", "linestyle": LINES[number % STYLES], "linewidth": 1.2}
        x = (low, roof.ridge, high)
        ax.plot(x, [min(roof.peak, v * roof.bandwidth) for v in x], **line, zorder=1)
        if number < len(measured):
            line |= {"marker": "o", "fillstyle": FILLS[number % len(FILLS)]}
        keys.append(Line2D([], [], **line, label=str(roof)))
    for number, (_, group) in enumerate(measured):
        for name in names:
            mine = [r for r in group if (r.benchmark, r.impl) == name]
            ax.plot(
                [r.flops / r.bytes for r in mine],
                [r.flops / r.seconds for r in mine if r.seconds],
                **looks[name],
                fillstyle=FILLS[number % len(FILLS)],
                zorder=2,
            )
    if names:
        keys.append(Line2D([], [], linestyle="none", label=HEADINGS[2]))
    keys += [Line2D([], [], **looks[name], label=": ".join(name) if len(benches) > 1 else name[1]) for name in names]
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(low, high)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(_power_of_ten))
    ax.grid(True, which="major", alpha=0.3)
    ax.set(
        xlabel="arithmetic intensity (FLOP per byte that must move)",
        ylabel="FLOP/s",
        title="Under the roof: how near each comes to its machine's limit" if names else "Roofs",
    )
    legend = figure.legend(handles=keys, loc="outside right upper", fontsize=8, frameon=False, handlelength=3.2)
    for text in legend.get_texts():
        if text.get_text() in HEADINGS:
            text.set_fontweight("bold")
    return figure


def _look(style: int) -> dict[str, Any]:
    """Marker and colour of the points of one implementation; after eight, the same markers in other colours."""
    colour = COLOURS[(style + style // STYLES) % STYLES]
    return {"marker": MARKERS[style % STYLES], "color": colour, "linestyle": "none", "markersize": 5.5, "alpha": 0.85}


def _power_of_ten(value: float, _: int | None = None) -> str:
    """A tick's label, without digits that say nothing: `10 G`, `100`, `0.1`."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:g} {prefix}"
    return f"{value:g}"
