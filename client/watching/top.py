"""A service as it is now: one frame of `stepwell top`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ...sharding.chronicle import Columns, last_row, steps_per_second
from ...sharding.stopwatch import PHASES

NUM_ROWS = 32
"""So many rows of the history speed and phases are taken from."""
_WIDTH = 24


def frame(status: Mapping[str, Any], columns: Columns) -> RenderableType:
    """What a person is shown.

    Args:
        status: See :meth:`stepwell.Service.status`.
        columns: The last rows of its history, see :meth:`stepwell.Service.history`.
    """
    parts: list[RenderableType] = [_head(status), _numbers(status, columns)]
    if columns:
        parts.append(_phases(columns))
    if status.get("size_bytes"):
        parts.append(_shards(status))
    return Group(*parts)


def _head(status: Mapping[str, Any]) -> Text:
    text = Text.from_markup(f"[bold]{escape(status['name'])}[/]  ")
    text.append(status["rule"] or "no job yet: no worker has registered")
    text.append(f"  {status['num_shards']} shards")
    if status["rule"] is not None:
        text.append(f"  {status['world_size']} workers  {status['numel']:,} parameters")
    lost = f"{status['recoveries']['count']} recoveries, {status['restarts']} coordinators lost"
    text.append(f"  generation {status['generation']}, {lost}")
    return text


def _numbers(status: Mapping[str, Any], columns: Columns) -> Table:
    row, speed = last_row(columns), steps_per_second(columns)
    shown = {"step": str(status["step"]), "skipped": str(status.get("skipped_steps", 0))}
    shown["steps/s"] = "-" if speed is None else f"{speed:.3g}"
    for name, value in row.items():
        if re.fullmatch(r"loss|grad_norm|(lr|d)(\[0\])?", name):
            shown[name] = f"{value:.4g}"
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in shown:
        table.add_column(title, justify="right")
    table.add_row(*shown.values())
    return table


def _phases(columns: Columns) -> Table:
    """Mean seconds of the last steps, by phase, with a bar."""
    means = {phase: _mean(columns[f"{phase}_s"]) for phase in PHASES if f"{phase}_s" in columns}
    whole = sum(means.values()) or 1.0
    table = Table(box=None, pad_edge=False, show_header=False)
    for phase, mean in means.items():
        table.add_row(phase, f"{1e3 * mean:.2f} ms", Text("█" * round(_WIDTH * mean / whole), style="cyan"))
    table.add_row("in all", f"{1e3 * sum(means.values()):.2f} ms", "", style="bold")
    return table


def _shards(status: Mapping[str, Any]) -> Text:
    sizes = "  ".join(f"{index}: {size_bytes / 2**20:,.1f}" for index, size_bytes in enumerate(status["size_bytes"]))
    return Text.assemble(("state of each shard in MiB  ", "dim"), sizes)


def _mean(values: list[float]) -> float:
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else 0.0
