"""What each step brought, of a whole run and in bounded memory: thinned out when it is full, never cut off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_CELLS = 2**15
MIN_ROWS, MAX_ROWS = 128, 1024
"""Bounds of how many rows :data:`MAX_CELLS` make, by the number of columns."""

Columns = dict[str, list[float]]
"""A name and one value per row, NaN where it was not known; the first column is ``step``."""


class _Table(NamedTuple):
    """A state of the chronicle; the rows up to ``num_rows`` are never written again.

    Attributes:
        names: Of the columns, the step's number first.
        rows: ``(capacity, len(names))`` float64.
        num_rows: How many there are.
        newest: The last step's; it becomes a row once another one is newer. None before the first.
        stride: Rows are of steps whose number is a multiple of this.
    """

    names: tuple[str, ...] = ("step",)
    rows: NDArray[np.float64] = np.empty((0, 1))
    num_rows: int = 0
    newest: Sequence[float] | None = None
    stride: int = 1


class Chronicle:
    """A table with a row for each of a run's steps, or for every second, fourth, ... and the last one.

    One thread writes it; any may read it, at any time.
    """

    def __init__(self) -> None:
        self._table = _Table()

    def note(self, values: Mapping[str, float]) -> None:
        """Add a step; a name that is new becomes a column.

        Args:
            values: By name; ``step`` is the step's number, greater than any before.
        """
        table = _with_newest_kept(self._table)
        if tuple(values) == table.names:  # as in almost every step
            newest = [float(value) for value in values.values()]
        else:
            table = _widened(table, [name for name in values if name not in table.names])
            newest = [float(values.get(name, math.nan)) for name in table.names]
        self._table = table._replace(newest=newest)

    def cut(self, step: int) -> None:
        """Forget what came after a step: the run goes on from there."""
        table = self._table
        if table.newest is not None and table.newest[0] > step:
            num_rows = int(np.searchsorted(table.rows[: table.num_rows, 0], step, side="right"))
            newest = table.rows[num_rows - 1].tolist() if num_rows else None
            # A copy: what is written next would else overwrite rows that somebody may be reading.
            self._table = table._replace(rows=table.rows.copy(), num_rows=max(num_rows - 1, 0), newest=newest)

    def columns(self, last: int | None = None) -> Columns:
        """The rows by column, the last one that of the newest step.

        Args:
            last: How many rows, from the end; None for all.
        """
        table = self._table
        if table.newest is None:
            return {}
        rows = [*table.rows[: table.num_rows].tolist(), list(table.newest)]
        wanted = rows if last is None else rows[-last:]
        return dict(zip(table.names, map(list, zip(*wanted, strict=True)), strict=True))

    def copied(self) -> Chronicle:
        """Another one with the same rows, no larger than they are."""
        other = Chronicle()
        other._table = self._table._replace(rows=self._table.rows[: self._table.num_rows].copy())
        return other


def _capacity(num_columns: int) -> int:
    return min(max(MAX_CELLS // num_columns, MIN_ROWS), MAX_ROWS)


def _with_newest_kept(table: _Table) -> _Table:
    """Make the newest step a row, if the stride falls on it; there is room for another one then."""
    if table.newest is None or table.newest[0] % table.stride:
        return table
    if table.num_rows >= _capacity(len(table.names)):
        return _with_newest_kept(_thinned(table))
    if table.num_rows == len(table.rows):
        room = np.empty((max(len(table.rows), MIN_ROWS // 2), len(table.names)))
        table = table._replace(rows=np.concatenate((table.rows, room)))
    table.rows[table.num_rows] = table.newest
    return table._replace(num_rows=table.num_rows + 1)


def _thinned(table: _Table) -> _Table:
    stride, rows = 2 * table.stride, table.rows[: table.num_rows]
    kept = rows[rows[:, 0] % stride == 0]
    return table._replace(rows=kept, num_rows=len(kept), stride=stride)


def _widened(table: _Table, names: Sequence[str]) -> _Table:
    if not names:
        return table
    rows = table.rows[: table.num_rows]
    rows = np.concatenate((rows, np.full((len(rows), len(names)), math.nan)), axis=1)
    table = table._replace(names=(*table.names, *names), rows=rows)
    while table.num_rows > _capacity(len(table.names)):
        table = _thinned(table)
    return table


def last_row(columns: Columns) -> dict[str, float]:
    """The newest step's values, without those that are not known; empty before the first step."""
    return {name: values[-1] for name, values in columns.items() if not math.isnan(values[-1])}


def steps_per_second(columns: Columns) -> float | None:
    """How fast the steps of these rows came; None if there is only one, or the clock was set back."""
    if not columns or len(columns["step"]) < 2:
        return None
    took_s = columns["time_s"][-1] - columns["time_s"][0]
    return (columns["step"][-1] - columns["step"][0]) / took_s if took_s > 0 else None
