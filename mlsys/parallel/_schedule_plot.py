"""Schedules as a picture: a row a rank, time to the right; simulated and measured steps above each other on one axis.

See also:
    `mlsys.parallel._schedule_show` (the same as text).
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlsys.files import write_atomic
from mlsys.parallel._schedule_ops import KINDS
from mlsys.parallel._schedule_show import Timed, timed
from mlsys.parallel._schedule_simulate import Simulation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import PathPatch

COLOURS = {"F": "#56B4E9", "B": "#E69F00", "W": "#009E73", "BW": "#D55E00"}  # Okabe & Ito 2008
WIDTH, ROW, AROUND = 9.6, 0.26, 0.52  # inches: of the picture, of a rank, of a panel's title
DIGIT = 0.06  # inches, of a digit of the numbers inside
NARROW = 2 / 72  # inches, of an operation: below it, white edges would hide the colours, and each bar costs time
FORMS = (".svg", ".png", ".pdf")


def plot(
    panels: Timed | Mapping[str, Timed],
    path: str | os.PathLike[str] | None = None,
    *,
    unit: str = "",
    ax: Axes | None = None,
) -> Figure:
    """Draw one timeline, or several by title on one time axis; return the figure, and write it to `path` if given.

    Each is a schedule (all costs 1), a simulation, or measured spans, {rank: [(Op, start, end)]}. `path` ends in .svg,
    .png or .pdf. `unit` is what times are in, for the axis. `ax`: draw a single timeline there.

    Numbers are microbatches. Of a rank with several stages, the further a stage is along the model the paler it is.
    Where operations are too narrow to be told apart, those of a kind are drawn as one shape, without edges.
    """
    if path is not None:
        check_form(path)
    titled: dict[str, Timed] = dict(panels) if _by_title(panels) else {"": panels}  # type: ignore[arg-type, dict-item]
    if not titled:
        raise ValueError("panels is empty: there is nothing to draw")
    steps = {title: timed(what) for title, what in titled.items()}
    if ax is not None:
        if len(steps) > 1 or path is not None:
            raise ValueError("ax takes a single timeline, and no path: save its own figure")
        ((title, one),) = steps.items()
        _draw(ax, title, one, one.makespan, inches=ax.get_window_extent().width / ax.figure.dpi)
        return ax.figure  # type: ignore[return-value]

    from matplotlib.figure import Figure

    rows = [one.summary.ranks for one in steps.values()]
    figure = Figure(figsize=(WIDTH, sum(ROW * n + AROUND for n in rows) + 0.75), layout="constrained")
    axes = figure.subplots(len(steps), 1, squeeze=False, sharex=True, height_ratios=rows)[:, 0]
    longest = max(one.makespan for one in steps.values())
    for place, (title, one) in zip(axes, steps.items()):
        _draw(place, title, one, longest, inches=WIDTH - 0.8)
    axes[-1].set_xlabel(f"time ({unit})" if unit else "time")
    _legend(figure, {op.kind for one in steps.values() for ops in one.schedule.values() for op in ops})
    if path is not None:
        write_atomic(path, _encoded(figure, Path(path).suffix[1:]))
    return figure


def check_form(path: str | os.PathLike[str], name: str = "path") -> None:
    """Raise ValueError unless a picture can be written to `path`, called `name`."""
    if Path(path).suffix not in FORMS:
        raise ValueError(f"{name} must end in .svg, .png or .pdf, got {os.fspath(path)!r}")


def _by_title(panels: object) -> bool:
    return isinstance(panels, Mapping) and all(isinstance(title, str) for title in panels)


def _draw(ax: Axes, title: str, one: Simulation, longest: float, inches: float) -> None:
    """One timeline, in a frame of so many inches for the time `longest`."""
    scale = inches / longest if longest else 0.0
    narrow = one.makespan * scale < NARROW * max(map(len, one.schedule.values()))
    for rank, spans in one.spans.items():
        ax.broken_barh([(0, one.makespan)], (rank - 0.42, 0.84), facecolor="#F1F1F1")  # the bubble is what shows of it
        own = sorted({op.stage for op, _, _ in spans})
        for kind in KINDS:
            for chunk, stage in enumerate(own):
                bars = [(start, end - start) for op, start, end in spans if (op.kind, op.stage) == (kind, stage)]
                if bars:
                    colour = _paler(COLOURS[kind], 0.65 * chunk / max(1, len(own) - 1))
                    if narrow:
                        ax.add_artist(_shape(bars, rank - 0.42, 0.84, colour))
                    else:
                        ax.broken_barh(bars, (rank - 0.42, 0.84), facecolor=colour, edgecolor="white", linewidth=0.5)
        for op, start, end in spans:
            if (end - start) * scale > DIGIT * len(str(op.microbatch)) + 0.02:
                middle = (start + end) / 2
                ax.text(middle, rank, str(op.microbatch), fontsize=7, ha="center", va="center_baseline")
    ax.axvline(one.makespan, color="black", linewidth=0.8, linestyle=":")
    ranks = list(one.spans)
    ax.set_yticks(ranks, [f"rank {rank}" for rank in ranks])
    ax.set_ylim(len(ranks) - 0.4, -0.6)
    ax.set_xlim(0, longest * 1.01 or 1)
    ax.tick_params("y", length=0)
    ax.tick_params(labelsize=8)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    most = list(one.peak.values())
    held = " ".join(f"{n:g}" for n in most) if len(most) <= 16 else f"at most {max(most):g}"
    what = f"{one.makespan:.4g} long, bubble {one.bubble:.1%}, in a span {one.span_bubble:.1%}, holds {held}"
    ax.set_title(f"{title}: {what}" if title else what, fontsize=9, loc="left")


def _shape(bars: Sequence[tuple[float, float]], bottom: float, height: float, colour: tuple[float, ...]) -> PathPatch:
    """Many bars as one path: a path each, and matplotlib takes as long for each bar as for a thousand corners."""
    import numpy as np
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    start, width = np.array(bars).T
    x = np.stack([start, start + width, start + width, start], axis=1)
    y = np.broadcast_to([bottom, bottom, bottom + height, bottom + height], x.shape)
    outline = Outline.make_compound_path_from_polys(np.stack([x, y], axis=-1))
    return PathPatch(outline, facecolor=colour, linewidth=0, snap=False)


def _paler(colour: str, by: float) -> tuple[float, ...]:
    """A colour mixed with so much white."""
    from matplotlib.colors import to_rgb

    return tuple(value + (1 - value) * by for value in to_rgb(colour))


def _legend(figure: Figure, kinds: set[str]) -> None:
    from matplotlib.patches import Patch

    present = [kind for kind in KINDS if kind in kinds]
    patches = [Patch(facecolor=COLOURS[kind], label=f"{kind}: {KINDS[kind]}") for kind in present]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=8)


def _encoded(figure: Figure, form: str) -> bytes:
    """The same bytes for the same picture."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "mlsys", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    return buffer.getvalue()
