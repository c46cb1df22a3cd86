"""The picture of a run's history."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...sharding.chronicle import Columns
from ..demo.picture import smoothed
from .panels import Panel, Points, drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#1f6feb", "#d9480f", "#2b8a3e", "#862e9c", "#e67700", "#0b7285")
_GREY = "#495057"
MAX_NAMED = 12
"""So many lines get a name in the legend."""


def draw(path: Path, *, title: str, columns: Columns) -> None:
    """Write a picture in the format that the path's ending names.

    Args:
        path: The file to write, such as ``run.png``, ``.svg`` or ``.pdf``.
        title: What was run.
        columns: At least one step.

    Raises:
        ValueError: If matplotlib does not know the format.
    """
    # Needed only here, and slow to import.
    from matplotlib.figure import Figure

    panels = drawn(columns)
    figure = Figure(figsize=(8.0, 0.8 + 2.2 * len(panels)), layout="constrained")
    figure.suptitle(title, fontsize=11, color=_GREY)
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (panel, series) in zip(rows, panels, strict=True):
        _draw_panel(axes, panel, series)
    rows[-1].set_xlabel("step", color=_GREY)
    figure.savefig(path, dpi=150)


def _draw_panel(axes: Axes, panel: Panel, series: dict[str, Points]) -> None:
    for index, (name, (steps, values)) in enumerate(series.items()):
        color = _COLORS[index % len(_COLORS)]
        if panel.is_noisy:
            axes.plot(steps, values, color=color, alpha=0.22, linewidth=0.8)
        line = smoothed(values) if panel.is_noisy else values
        label = name if index < MAX_NAMED else None
        axes.plot(steps, line, color=color, linewidth=1.8, label=label, marker="." if len(steps) == 1 else None)
    if panel.is_log:
        axes.set_yscale("log")
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.set_ylabel(panel.title, color=_GREY, fontsize=9)
    axes.grid(visible=True, color="#e9ecef", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_GREY, labelsize=9)
