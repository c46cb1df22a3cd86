"""The picture of a run: the loss, and below it Prodigy's estimate d."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import events

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREEN, _GREY = "#1f6feb", "#d9480f", "#2b8a3e", "#495057"


def draw(path: Path, *, title: str, steps: Sequence[events.Step], held_out: Sequence[events.HeldOut]) -> None:
    """Writes a PNG.

    Args:
        path: the file to write.
        title: what was run.
        steps: at least one step.
        held_out: the points of the held-out loss.
    """
    # Needed only here, and slow to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    figure.suptitle(title, fontsize=11, color=_GREY)
    _draw_losses(upper, steps, held_out)
    _draw_estimate(lower, steps)
    for axes in (upper, lower):
        axes.grid(visible=True, color="#e9ecef", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_GREY, labelsize=9)
    lower.set_xlabel("step", color=_GREY)
    figure.savefig(path, dpi=150)


def smoothed(values: Sequence[float]) -> list[float]:
    """A centred running mean over about a thirtieth of the run, narrower towards both ends."""
    reach, last = max(1, len(values) // 60), len(values) - 1
    result = []
    for index in range(len(values)):
        near = min(reach, index, last - index)
        window = values[index - near : index + near + 1]
        result.append(sum(window) / len(window))
    return result


def _draw_losses(axes: Axes, steps: Sequence[events.Step], held_out: Sequence[events.HeldOut]) -> None:
    counts, losses = [step.step for step in steps], [step.loss for step in steps]
    axes.plot(counts, losses, color=_BLUE, alpha=0.22, linewidth=0.8)
    axes.plot(counts, smoothed(losses), color=_BLUE, linewidth=2.0, label="training")
    axes.plot(
        [point.step for point in held_out],
        [point.loss for point in held_out],
        color=_ORANGE,
        marker="o",
        markersize=4.5,
        linestyle="none",
        label="held-out",
    )
    axes.set_ylabel("loss (nats per byte)", color=_GREY)
    axes.legend(frameon=False, fontsize=9)


def _draw_estimate(axes: Axes, steps: Sequence[events.Step]) -> None:
    """Prodigy's d, or for a rule that has none the learning rate alone."""
    counts = [step.step for step in steps]
    estimates = [step.d for step in steps if step.d is not None]
    if len(estimates) < len(steps):
        axes.plot(counts, [step.lr for step in steps], color=_GREEN, linewidth=2.0)
        axes.set_ylabel("learning rate", color=_GREY)
        return
    axes.plot(counts, estimates, color=_GREEN, linewidth=2.0, label="d")
    scheduled = [d * step.lr for d, step in zip(estimates, steps, strict=True)]
    axes.plot(counts, scheduled, color=_GREEN, linewidth=1.0, linestyle=":", label="d times the schedule")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5 * min(estimates))
    axes.set_ylabel("d, the estimated distance", color=_GREY)
    axes.legend(frameon=False, fontsize=9, loc="lower center")
