"""Races: contestants timed in turns in one run, so that what the machine does to one it does to its neighbours.

On a shared machine a time means little and the ratio of two times taken one right after the other means much. A race
therefore runs every contestant once per round, forwards in one round and backwards in the next, with the yardsticks
right before each, and its results are medians over rounds of ratios of neighbours. What a yardstick differs from
itself, from one of its turns to the next, is the noise of the ratios.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

PAUSE_S = 0.002
"""Before each turn: threads that still spin for the last contestant's next loop give up meanwhile."""

RESERVED = 0.06
"""Of all memory: Ray ends processes when 95 % are in use."""

Clock = Callable[[Callable[[], object]], float]


@dataclasses.dataclass(frozen=True, slots=True)
class Contestant:
    """What takes turns.

    Attributes:
        name: Its name, unique in a race.
        step: What is timed.
        size_bytes: What one turn must read and write at the very least, each byte once; 0 if that says nothing.
        prepare: What comes before each turn and is not timed.
    """

    name: str
    step: Callable[[], object]
    size_bytes: int = 0
    prepare: Callable[[], object] = lambda: None


@dataclasses.dataclass(frozen=True, slots=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of one or more values."""
        values = list(values)
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the results.

    Attributes:
        name: What is measured.
        ours, theirs: Both sides, medians, in ``unit``; ``theirs`` is None where there is no other side.
        ratio: Median over rounds of ours over theirs.
        unit: Such as ``ns/param``.
        bytes: What must move for it; 0 if that says nothing.
        against: What ``theirs`` is.
        low, high: Quartiles of the ratio.
        gb_per_s: ``bytes`` over our time.
        bandwidth: That over what the yardstick achieves right before: torch's fused AdamW, or on a GPU a copy.
        section: The heading that it stands under.
        key: What the goals and the picture know it by.
        x: Its place on the picture's axis, such as a number of parameters.
        note: What a reader must know.
    """

    name: str
    ours: float
    theirs: float | None = None
    ratio: float | None = None
    unit: str = "ns/param"
    bytes: int = 0
    against: str = ""
    low: float | None = None
    high: float | None = None
    gb_per_s: float | None = None
    bandwidth: float | None = None
    section: str = ""
    key: str = ""
    x: float | None = None
    note: str = ""

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Row:
        """A row of a benchmark that gives plain dicts; what it says beyond a row's fields becomes the note."""
        known = {field.name for field in dataclasses.fields(cls)}
        more = ", ".join(f"{name} {value}" for name, value in fields.items() if name not in known)
        own = {name: value for name, value in fields.items() if name in known}
        return cls(**{**own, "note": "; ".join(filter(None, (own.get("note", ""), more)))})


class Race:
    """What a race's clock showed.

    Attributes:
        times: Contestant to seconds, one per round.
        before: Yardstick, then contestant, to the seconds that the yardstick took right before the contestant.
        turns: Yardstick to its seconds in the order in which they were taken.
        size_bytes: What one turn of each must move.
    """

    def __init__(self, contestants: Sequence[Contestant], yardsticks: Sequence[Contestant]) -> None:
        self.size_bytes = {each.name: each.size_bytes for each in (*contestants, *yardsticks)}
        self.times: dict[str, list[float]] = {each.name: [] for each in contestants}
        self.before: dict[str, dict[str, list[float]]] = {
            yardstick.name: {each.name: [] for each in contestants} for yardstick in yardsticks
        }
        self.turns: dict[str, list[float]] = {each.name: [] for each in yardsticks}

    def __contains__(self, name: str) -> bool:
        return name in self.times or name in self.before

    def seconds(self, name: str, *, beyond: str | None = None) -> float:
        """A contestant's or yardstick's median time; what it takes ``beyond`` another contestant in the same round."""
        if name in self.turns:
            return statistics.median(self.turns[name])
        return statistics.median(self._beyond(name, name, beyond))

    def ratio(self, name: str, other: str, *, beyond: str | None = None) -> Spread:
        """How many times as long as ``other`` a contestant takes; of both only what is ``beyond`` a third."""
        ours, theirs = self._beyond(name, name, beyond), self._beyond(other, name, beyond)
        return Spread.of(a / b for a, b in zip(ours, theirs, strict=True))

    def bandwidth(self, name: str, yardstick: str) -> float:
        """A contestant's bytes per second over those of a yardstick's turn right before."""
        return self.size_bytes[name] / self.size_bytes[yardstick] / self.ratio(name, yardstick).median

    def gb_per_s(self, name: str) -> float:
        """The bytes that must move, over the median time."""
        return self.size_bytes[name] / self.seconds(name) / 1e9

    def noise(self, yardstick: str) -> Spread:
        """A yardstick's turns over the turns before them: 1, but for what the machine does meanwhile."""
        turns = self.turns[yardstick]
        return Spread.of(b / a for a, b in itertools.pairwise(turns))

    def row(
        self,
        name: str,
        other: str,
        *,
        scale: float,
        label: str | None = None,
        beyond: str | None = None,
        yardstick: str | None = None,
        **fields: Any,
    ) -> Row:
        """One contestant beside another.

        Args:
            name: The one.
            other: The other.
            scale: Units in a second, such as 1e9 / numel for ``ns/param``.
            label: How the row is called; None: as the contestant.
            beyond: See :meth:`ratio`.
            yardstick: Whose bandwidth theirs is compared with.
            fields: Further fields of the row.
        """
        ratio, size_bytes = self.ratio(name, other, beyond=beyond), self.size_bytes[name]
        has_bandwidth = size_bytes > 0 and beyond is None
        return Row(
            name=label or name,
            ours=self.seconds(name, beyond=beyond) * scale,
            theirs=self.seconds(other, beyond=beyond) * scale,
            ratio=ratio.median,
            low=ratio.low,
            high=ratio.high,
            against=other,
            bytes=size_bytes,
            gb_per_s=self.gb_per_s(name) if has_bandwidth else None,
            bandwidth=self.bandwidth(name, yardstick) if has_bandwidth and yardstick else None,
            **fields,
        )

    def machine(self, section: str) -> list[Row]:
        """What the machine gave meanwhile: a row for each yardstick, its turns beside the turns before them."""
        return [
            Row(
                name=name,
                ours=self.seconds(name) * 1e3,
                unit="ms",
                ratio=noise.median,
                low=noise.low,
                high=noise.high,
                against="its own turn before",
                bytes=self.size_bytes[name],
                gb_per_s=self.gb_per_s(name),
                section=section,
                key=f"machine/{name}",
            )
            for name, noise in ((name, self.noise(name)) for name in self.turns)
        ]

    def _beyond(self, name: str, turn_of: str, base: str | None) -> list[float]:
        times = self.times[name] if name in self.times else self.before[name][turn_of]
        if base is None:
            return times
        return [time - less for time, less in zip(times, self.times[base], strict=True)]


def timed(step: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    time.sleep(PAUSE_S)
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def race(
    contestants: Sequence[Contestant],
    *,
    yardsticks: Sequence[Contestant] = (),
    budget_s: float,
    min_rounds: int = 3,
    max_rounds: int = 200,
    num_warmups: int = 2,
    clock: Clock = timed,
) -> Race:
    """Let contestants take turns until ``budget_s`` of their own time is spent.

    Args:
        contestants: Who takes turns.
        yardsticks: Who takes a turn before each of theirs.
        budget_s: Seconds.
        min_rounds: Rounds that are run even so.
        max_rounds: Rounds at most.
        num_warmups: Turns of each that do not count.
        clock: Times one turn. Between processes it gives all of them the same time, so that they end together.
    """
    found, spent_s, num_rounds = Race(contestants, yardsticks), 0.0, 0
    for each in (*yardsticks, *contestants):
        for _ in range(num_warmups):
            each.prepare()
            clock(each.step)
    while num_rounds < min_rounds or (spent_s < budget_s and num_rounds < max_rounds):
        for each in contestants if num_rounds % 2 == 0 else reversed(contestants):
            each.prepare()
            for yardstick in yardsticks:
                taken_s = clock(yardstick.step)
                found.before[yardstick.name][each.name].append(taken_s)
                found.turns[yardstick.name].append(taken_s)
                spent_s += taken_s
            taken_s = clock(each.step)
            found.times[each.name].append(taken_s)
            spent_s += taken_s
        num_rounds += 1
    return found


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def available_bytes() -> int:
    """Memory that can be had before Ray ends processes for want of it, once this one has given back what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else glibc keeps what tensors of up to 32 MiB have left
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return available - int(RESERVED * total)


def left_out(name: str, needed_bytes: int, *, section: str) -> list[Row]:
    """A row that says so where memory has no room for a race; none where it has."""
    free = available_bytes()
    if needed_bytes <= free:
        return []
    tell(f"left out: {name} needs {needed_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} are available")
    row = Row(
        name=f"left out: {name}",
        ours=needed_bytes / 2**30,
        theirs=free / 2**30,
        unit="GiB needed",
        against="available",
        section=section,
    )
    return [row]


def tell(message: str) -> None:
    """Say on stderr how far a benchmark is."""
    print(f"  {message}", file=sys.stderr, flush=True)


def main(rows: Callable[[bool], list[Row]], description: str | None) -> None:
    """The command line of one topic."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: whether it runs, no figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    arguments = parser.parse_args()
    found = rows(arguments.quick)
    for row in found:
        theirs = "" if row.theirs is None else f", {row.theirs:.3f} {row.against}"
        ratio = "" if row.ratio is None else f"; {row.ratio:.3f} x {row.against}"
        share = "" if row.bandwidth is None else f"; {row.gb_per_s:.1f} GB/s, {row.bandwidth:.2f} of the yardstick's"
        print(f"{row.section}: {row.name}: {row.ours:.3f} {row.unit}{theirs}{ratio}{share}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([dataclasses.asdict(row) for row in found], indent=1))
