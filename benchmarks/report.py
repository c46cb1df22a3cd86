"""The results as a page, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from goals import NOT_MEASURED, Verdict, judge
from harness import Row, cores
from picture import draw

QUIET = 1.5
"""Upper over lower quartile of a yardstick's turns over the turns before them: above it a run says so."""


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """What one topic's run found.

    Attributes:
        topic: Such as "step".
        date: When it began, UTC.
        taken_s: Seconds that it took.
        load_before: The machine's load average before it: what others were doing; None if nobody has noted it.
        rows: What it found, those of a section one after the other.
        failure: Why it found nothing, a sentence; empty if it went well.
        machine: Where, if that was not the page's machine; else empty.
    """

    topic: str
    date: str
    taken_s: float
    load_before: float | None
    rows: tuple[Row, ...]
    failure: str = ""
    machine: str = ""

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Run:
        """What :func:`dataclasses.asdict` made of one."""
        return cls(**{**fields, "rows": tuple(map(Row.from_dict, fields["rows"]))})


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """All results.

    Attributes:
        machine: What they were measured on.
        quick: Whether these are no figures.
        runs: One of each topic.
    """

    machine: dict[str, Any]
    quick: bool
    runs: tuple[Run, ...] = ()

    @property
    def rows(self) -> list[Row]:
        """Those of all topics."""
        return [row for run in self.runs for row in run.rows]

    def runs_but(self, topics: Sequence[str]) -> list[Run]:
        """Those of other topics."""
        return [run for run in self.runs if run.topic not in topics]

    def with_runs(self, runs: Sequence[Run]) -> Page:
        """The same page with other runs."""
        return dataclasses.replace(self, runs=tuple(runs))


def read(folder: Path, *, quick: bool) -> Page:
    """The page in a folder; if it is of another kind of machine or run, only what it has from still others."""
    empty, path = Page(_machine(), quick), folder / "results.json"
    if not path.exists():
        return empty
    before = json.loads(path.read_text())
    is_same = (before["machine"], before["quick"]) == (empty.machine, quick)
    return empty.with_runs([run for run in map(Run.from_dict, before["runs"]) if is_same or run.machine])


def taken(path: Path) -> list[Run]:
    """The runs of a ``results.json`` that another machine has written; those that failed stay there."""
    there = json.loads(path.read_text())
    found = [Run.from_dict(run) for run in there["runs"] if run["rows"]]
    return [dataclasses.replace(run, machine=run.machine or _described(there["machine"])) for run in found]


def write(folder: Path, page: Page) -> None:
    """Write ``TABLE.md``, ``results.json`` and ``results.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    verdicts = judge(page.rows)
    (folder / "TABLE.md").write_text(_markdown(page, verdicts))
    results = {
        "machine": page.machine,
        "quick": page.quick,
        "goals": [_verdict_fields(verdict) for verdict in verdicts],
        "runs": [dataclasses.asdict(run) for run in page.runs],
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(page.rows, verdicts, folder / "results.png")


def goals_table(verdicts: Sequence[Verdict]) -> str:
    """Figure, goal, measured, and whether that is met."""
    lines = ["| figure | goal | measured | |", "|---|---|---|---|"]
    for verdict in verdicts:
        goal = verdict.goal
        sense = "at least" if goal.at_least else "at most"
        measured = NOT_MEASURED if verdict.value is None else f"{_number(verdict.value)} {goal.unit}".strip()
        lines.append(
            f"| {goal.figure} | {sense} {goal.limit:g} {goal.unit} | {measured} | {_judgement(verdict)} |".replace(
                "  ", " "
            )
        )
    return "\n".join(lines)


def _judgement(verdict: Verdict) -> str:
    if verdict.value is None:
        return ""
    return "met" if verdict.shortfall is None else f"missed by a factor of {_number(verdict.shortfall)}"


def _markdown(page: Page, verdicts: Sequence[Verdict]) -> str:
    machine = page.machine
    parts = [
        "# Benchmarks",
        f"Written by `make bench`: {_described(machine)}.\n",
        *(["**With --quick: these are no figures.**\n"] if page.quick else []),
        f"Who steps in one process has {machine['cores']} threads; a service's shards have as many together, one at "
        "least each; of several ranks each has its share.\n",
        "Contestants took turns, finely interleaved in one run. A ratio is the median over rounds of our time over "
        "theirs in the same round, with its quartiles; below 1 we are faster. GB/s are the bytes that must move over "
        "the median time; the last column sets them against those of the yardstick right before, in the same rounds: "
        "torch's fused AdamW, or on a GPU a copy. A yardstick's ratio to its own turn before is the noise.\n",
        *_warnings(page.rows),
        "![The figures at a glance](results.png)\n",
        "## Goals\n",
        goals_table(verdicts),
        "\n## Runs\n",
        _runs_table(page.runs),
        *(f"\n**{run.failure}**" for run in page.runs if run.failure),
    ]
    for section, lines in itertools.groupby(page.rows, key=lambda row: row.section):
        parts += [f"\n## {section[:1].upper()}{section[1:]}\n", _rows_table(list(lines))]
    return "\n".join(parts) + "\n"


def _runs_table(runs: Sequence[Run]) -> str:
    lines = ["| topic | begun | took | load before | where, if not here |", "|---|---|---:|---:|---|"]
    for run in runs:
        load = "" if run.load_before is None else f"{run.load_before:.1f}"
        lines.append(f"| {run.topic} | {run.date} | {run.taken_s:.0f} s | {load} | {run.machine} |")
    return "\n".join(lines)


def _warnings(rows: Sequence[Row]) -> list[str]:
    """Says so where equal turns were so far apart that ratios mean little."""
    noise = [row.high / row.low for row in rows if row.key.startswith("machine/") and row.high and row.low]
    if not noise or max(noise) <= QUIET:
        return []
    return [
        f"**The machine was not quiet: from one turn to the next the middle half of a yardstick's times were up to "
        f"{_number(max(noise))} times apart. Read the quartiles before the medians.**\n"
    ]


def _rows_table(rows: Sequence[Row]) -> str:
    lines = [
        "| ours | time or size | against | theirs | ratio | GB/s | of the yardstick's |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        theirs = "" if row.theirs is None else _number(row.theirs)
        spread = "" if row.low is None or row.high is None else f" ({_number(row.low)}-{_number(row.high)})"
        ratio = "" if row.ratio is None else _number(row.ratio) + spread
        gb_per_s = "" if row.gb_per_s is None else f"{row.gb_per_s:.1f}"
        share = "" if row.bandwidth is None else f"{row.bandwidth:.2f}"
        name = f"{row.name} ({row.note})" if row.note else row.name
        ours = f"{_number(row.ours)} {row.unit}"
        lines.append(f"| {name} | {ours} | {row.against} | {theirs} | {ratio} | {gb_per_s} | {share} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    """Two or three digits that count."""
    if 0.0 < abs(value) < 0.1:
        return f"{value:.2g}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _verdict_fields(verdict: Verdict) -> dict[str, Any]:
    return {
        **dataclasses.asdict(verdict.goal),
        "measured": verdict.value,
        "is_met": verdict.is_met,
        "shortfall": verdict.shortfall,
    }


def _described(machine: dict[str, Any]) -> str:
    gpu = f"{machine['gpu']}, " if "gpu" in machine else ""
    return f"{gpu}{machine['cores']} cores ({machine['cpu']}), torch {machine['torch']}"


def _machine() -> dict[str, Any]:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "cores": cores(),
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **gpu,
    }
