"""What of a run's history is drawn, and the table of it for other programs."""

from __future__ import annotations

import csv
import dataclasses
import math
import re
from typing import TextIO

from ...sharding.chronicle import Columns
from ...sharding.stopwatch import PHASES

Points = tuple[list[float], list[float]]
"""Steps and values."""


@dataclasses.dataclass(frozen=True, slots=True)
class Panel:
    """One picture: some columns over the steps.

    Attributes:
        title: What they are, with the unit.
        pattern: Which columns; a regular expression of the whole name.
        is_log: Whether the axis of values is logarithmic.
        is_noisy: Whether a running mean is drawn, and the values behind it.
    """

    title: str
    pattern: str
    is_log: bool = False
    is_noisy: bool = False

    def series(self, columns: Columns) -> dict[str, Points]:
        """Name to points, of the columns that have any; what is not finite, or has no logarithm, is left out."""
        found = {}
        for name in columns:
            if re.fullmatch(self.pattern, name):
                pairs = zip(columns["step"], columns[name], strict=True)
                points = [(step, value) for step, value in pairs if self._can_draw(value)]
                if points:
                    found[name] = ([step for step, _ in points], [value for _, value in points])
        return found

    def _can_draw(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.is_log)


PANELS = (
    Panel("loss", "loss", is_noisy=True),
    Panel("d, the estimated distance", r"d(\[\d+\])?", is_log=True),
    Panel("learning rate", r"lr(\[\d+\])?"),
    Panel("gradient norm", "grad_norm", is_log=True, is_noisy=True),
    Panel("seconds of a step, by phase", "|".join(f"{phase}_s" for phase in PHASES), is_log=True, is_noisy=True),
)


def drawn(columns: Columns) -> list[tuple[Panel, dict[str, Points]]]:
    """The panels that have something to show."""
    found = [(panel, panel.series(columns)) for panel in PANELS]
    return [(panel, series) for panel, series in found if series]


def write_csv(columns: Columns, file: TextIO) -> None:
    """Write a table with a line for each row; what is not known is empty."""
    writer = csv.writer(file)
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow("" if math.isnan(value) else f"{value:.17g}" for value in row)
