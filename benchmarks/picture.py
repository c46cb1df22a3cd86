"""The figures at a glance: goals, steps, and growth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from goals import Verdict
from harness import Row
from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS, THEIRS, MET, MISSED, LINE = "#1f6f8b", "#b9b9b9", "#3a8f5c", "#c8553d", "#444444"
STEP_SIZES = ("1 M", "LoRA", "32 M", "128 M")
STEP_PAIRS = (
    ("Prodigy, 2 shards", "prodigyopt"),
    ('Prodigy, eps_d="old", 2 shards', "prodigyopt"),
    ("AdamW, 2 shards", "torch AdamW, fused"),
)


def draw(rows: Sequence[Row], verdicts: Sequence[Verdict], path: Path) -> None:
    """Draw goals, steps and growth into ``path``."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(12, 9), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(1.2, 1))
    above, below = (figure.add_subfigure(place) for place in (grid[0], grid[1]))
    goals, steps = above.subplots(1, 2)
    _draw_goals(goals, [verdict for verdict in verdicts if verdict.value is not None])
    _draw_steps(steps, rows)
    for axes, axis in zip(below.subplots(1, 3), ("parameters", "shards", "workers"), strict=True):
        _draw_growth(axes, [row for row in rows if row.key.startswith(f"growth/{axis}/")], axis)
    figure.savefig(path, dpi=110)


def _draw_goals(axes: Axes, verdicts: Sequence[Verdict]) -> None:
    """How good each figure is, 1 being its goal."""
    axes.set_title("Goals: left of 1 they are missed", loc="left", fontsize=10)
    if not verdicts:
        return
    labels, values, colours = [], [], []
    for verdict in reversed(verdicts):
        assert verdict.value is not None
        ratio = max(verdict.value, 1e-9) / verdict.goal.limit
        values.append(ratio if verdict.goal.at_least else 1 / ratio)
        colours.append(MET if verdict.is_met else MISSED)
        labels.append(verdict.goal.label)
    axes.barh(labels, values, color=colours)
    axes.axvline(1.0, color=LINE, linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("of the goal")
    axes.tick_params(axis="y", labelsize=7)


def _draw_steps(axes: Axes, rows: Sequence[Row]) -> None:
    """Time per parameter of the step, ours beside theirs."""
    found = {row.key: row for row in rows}
    labels: list[str] = []
    for size in STEP_SIZES:
        for ours, theirs in STEP_PAIRS:
            row = found.get(f"step/{size}/given/{ours}/{theirs}")
            if row is not None and row.theirs is not None:
                place = -len(labels)
                axes.barh(place + 0.2, row.ours, height=0.38, color=OURS)
                axes.barh(place - 0.2, row.theirs, height=0.38, color=THEIRS)
                labels.append(f"{size}: {ours.partition(', 2')[0]}")
    axes.set_yticks([-place for place in range(len(labels))], labels, fontsize=7)
    if labels:
        axes.set_xscale("log")
    axes.set_xlabel("ns per parameter")
    axes.set_title("A step, 2 shards (blue); prodigyopt, fused AdamW (grey)", loc="left", fontsize=10)


def _draw_growth(axes: Axes, rows: Sequence[Row], axis: str) -> None:
    """Time per parameter as something grows."""
    axes.set_title(f"Growth with {axis}", loc="left", fontsize=10)
    points = sorted((row.x, row.ours, row.theirs) for row in rows if row.x is not None and row.theirs is not None)
    if not points:
        return  # nothing was measured, and nothing has no logarithm
    xs = [x for x, _, _ in points]
    axes.plot(xs, [ours for _, ours, _ in points], color=OURS, marker="o", label="Prodigy, the service")
    axes.plot(xs, [theirs for _, _, theirs in points], color=THEIRS, marker="o", label="torch AdamW, fused")
    axes.set_yscale("log")
    if axis == "parameters":
        axes.set_xscale("log")
    else:
        axes.set_xticks(xs)
    axes.set_xlabel(axis)
    axes.set_ylabel("ns per parameter")
    axes.legend(fontsize=7)
