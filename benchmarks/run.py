"""All benchmarks: runs every benchmarks/bench_*.py that offers rows(quick), one after the other.

Writes a page, JSON and a picture; topics that were not named keep what was found before on such a machine. Each
benchmark has a process of its own and a time limit; one that fails is named in the page, and the others go on. Ctrl-C
ends the one that runs and all that it has started.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import report
from goals import judge
from harness import Row, tell

FOLDER = Path(__file__).parent
INTERRUPTED = 130
FIRST = ("step", "workers", "checkpoint", "transport", "growth")
"""The order in which the page shows them; what is not named here follows."""
LIMIT_S = 1200.0
END_TIMEOUT_S = 30.0


def main() -> None:
    """Run the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topics", nargs="*", help="such as step or workers; all if none is named")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: whether it runs, no figures")
    parser.add_argument("--out", type=Path, default=FOLDER / "results", help="folder for the results")
    parser.add_argument("--take", type=Path, metavar="FILE", help="run nothing; take another machine's results.json in")
    parser.add_argument("--rows-of", metavar="TOPIC", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # Whoever starts this may have them ignored or left to end this process alone; the topic that runs has to end too.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        _main(parser, arguments)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _main(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.rows_of is not None:
        _write_rows(arguments.rows_of, arguments.quick, arguments.out)
        return
    if arguments.take is not None:
        try:
            runs = report.taken(arguments.take)
        except (OSError, ValueError, LookupError, TypeError) as error:
            parser.error(f"--take: expected a results.json that run.py has written, got {arguments.take} ({error!r})")
        _write(runs, arguments.quick, arguments.out)
        return
    there = sorted((path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")), key=_place)
    if unknown := sorted(set(arguments.topics) - set(there)):
        parser.error(f"there is no benchmark {unknown[0]!r}; there are {', '.join(there)}")
    if not _run_all(arguments.topics or there, arguments.quick, arguments.out):
        sys.exit(1)


def _place(topic: str) -> tuple[int, str]:
    return (FIRST.index(topic) if topic in FIRST else len(FIRST), topic)


def _run_all(topics: Sequence[str], quick: bool, out: Path) -> bool:
    """Run topics and write what they found; whether all went well."""
    runs = [_run(topic, quick) for topic in topics]
    _write(runs, quick, out)
    return not any(run.failure for run in runs)


def _write(runs: Sequence[report.Run], quick: bool, out: Path) -> None:
    """Write what runs have found into the page; one that had nothing to measure here leaves what stood there."""
    page, new = report.read(out, quick=quick), [run for run in runs if run.rows or run.failure]
    kept = page.runs_but([run.topic for run in new])
    page = page.with_runs(sorted([*kept, *new], key=lambda run: _place(run.topic)))
    report.write(out, page)
    print(report.goals_table(judge(page.rows)))
    print(f"\n{len(page.rows)} rows in {out / 'TABLE.md'}")


def _run(topic: str, quick: bool) -> report.Run:
    """Run one topic; what it found, or why it failed."""
    print(f"== {topic}", file=sys.stderr, flush=True)
    begun, load_before, rows, failure = time.monotonic(), os.getloadavg()[0], tuple[Row, ...](), ""
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    try:
        rows = tuple(_sectioned(row, topic) for row in _rows_of(topic, quick))
    except (subprocess.SubprocessError, OSError) as error:
        failure = f"bench_{topic}.py failed: {error}"
        print(failure, file=sys.stderr, flush=True)
    taken_s = time.monotonic() - begun
    tell(f"{taken_s:.0f} s")
    return report.Run(topic, date, taken_s, load_before, rows, failure)


def _sectioned(row: Row, topic: str) -> Row:
    return row if row.section else dataclasses.replace(row, section=topic)


def _rows_of(topic: str, quick: bool) -> list[Row]:
    """Run one topic in a process of its own.

    Raises:
        subprocess.SubprocessError: If it fails or takes too long.
    """
    with tempfile.TemporaryDirectory(prefix="stepwell-bench-") as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, str(Path(__file__)), "--rows-of", topic, "--out", str(path)]
        # In a session of its own, so that Ctrl-C reaches it once, from here.
        process = subprocess.Popen([*command, *(["--quick"] if quick else [])], start_new_session=True)
        try:
            code = process.wait(LIMIT_S)
        finally:
            _end(process)
        if code != 0:
            raise subprocess.CalledProcessError(code, command)
        return [Row.from_dict(fields) for fields in json.loads(path.read_text())]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a topic, if it still runs, giving it the time to end what it has started."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        process.send_signal(number)
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            continue


def _write_rows(topic: str, quick: bool, path: Path) -> None:
    """What the process of one topic does."""
    module = importlib.import_module(f"bench_{topic}")
    rows = module.rows(quick)
    path.write_text(json.dumps([dataclasses.asdict(row) if isinstance(row, Row) else row for row in rows]))


if __name__ == "__main__":
    main()
