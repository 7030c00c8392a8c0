"""The picture of one HNSW search: the layers of the graph above each other, and the way of the query down through them.

See also:
    `mlsys.retrieval.hnsw.trace` (which follows the search), `mlsys.bench.neighbour_plots` (the other pictures).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlsys.bench.plots import COLOURS, new_figure, to_svg


def layers(trace: Any) -> str:
    """The layers of an HNSW graph above each other, and the way of one query down through them.

    trace: a `mlsys.retrieval.hnsw.Trace`.
    """
    places = np.asarray(trace.places, np.float64)
    low, high = places.min(axis=0), places.max(axis=0)

    def seen(xy: np.ndarray, layer: int) -> np.ndarray:
        """A plane looked at from the side: depth is pushed to the right, and each layer lies above the last."""
        x, y = ((np.atleast_2d(xy) - low) / (high - low)).T
        return np.stack([x + 0.45 * y, 0.5 * y + 0.78 * layer], axis=1)

    top = len(trace.layers) - 1
    figure, (ax,) = new_figure(1, width=7.2, height=1.5 + 1.55 * (top + 1))
    last = None
    for layer in range(top, -1, -1):
        nodes, links = trace.layers[layer]
        at = dict(zip(map(int, nodes), seen(places[nodes], layer), strict=True))
        corners = seen(np.array([low, [high[0], low[1]], high, [low[0], high[1]], low]), layer)
        ax.fill(*corners.T, color="#F4F4F4", zorder=0)
        for a, b in links:
            ax.plot(*zip(at[int(a)], at[int(b)], strict=True), color="#BBBBBB", linewidth=0.3, zorder=1)
        ax.plot(*np.array(list(at.values())).T, ".", color=COLOURS[7], markersize=3, zorder=2)
        expanded = [step.node for step in trace.steps if step.layer == layer]
        ax.plot(*np.array([at[node] for node in expanded]).T, "o", color=COLOURS[6], markersize=5, zorder=3)
        way = [at[node] for node in trace.path(layer)]
        if last is not None and way:  # down to the same node of the layer below
            ax.plot(*zip(last, way[0], strict=True), color=COLOURS[1], linestyle=":", linewidth=1.2, zorder=4)
        if way:
            ax.plot(*np.array(way).T, "o-", color=COLOURS[1], markersize=4, linewidth=1.8, zorder=5)
            last = way[-1]
        goal = seen(trace.query, layer)[0]
        ax.plot(*goal, "*", color=COLOURS[4], markersize=11 if layer == 0 else 6, zorder=6)
        count = trace.counted[top - layer]
        ax.text(
            corners[0][0] - 0.03, corners[0][1] + 0.2,
            f"layer {layer}\n{len(nodes)} nodes\n{len(expanded)} expanded\n{count} distances",
            ha="right", va="center", fontsize=8,
        )  # fmt: skip
    hits = seen(places[[node for _, node in trace.hits]], 0)
    ax.plot(*hits.T, "s", markerfacecolor="none", markeredgecolor=COLOURS[2], markersize=8, zorder=6)
    ax.set_xlim(-0.4, 1.5)
    ax.set_axis_off()
    ax.set_title(
        f"One search among {len(places)} vectors (★), drawn on their two principal axes\n"
        "orange: nearest so far; light blue: expanded; green: the answer",
        fontsize=9,
    )
    return to_svg(figure)
