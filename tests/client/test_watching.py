"""A run's history as a person gets to see it: as a picture, a table, and live."""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from stepwell.client.watching.panels import drawn, write_csv
from stepwell.client.watching.plot import draw
from stepwell.client.watching.top import frame
from stepwell.sharding.chronicle import Columns, last_row, steps_per_second

NAN = math.nan


def history(num_steps: int = 5) -> Columns:
    """A run with a skipped step, a loss that was told in every second step, and one infinite norm."""
    steps = [float(step) for step in range(1, num_steps + 1)]
    return {
        "step": steps,
        "time_s": [1.7e9 + 0.5 * step for step in steps],
        "skipped_steps": [float(step > 2) for step in steps],
        "loss": [2.0 / step if step % 2 else NAN for step in steps],
        "grad_norm": [math.inf, *[1.0 / step for step in steps[1:]]],
        "lr[0]": [1.0] * num_steps,
        "lr[1]": [0.0] * num_steps,
        "d": [1e-6 * step for step in steps],
        "d_max": [1.0] * num_steps,
        "gather_s": [0.0, *[0.01] * (num_steps - 1)],
        "apply_s": [0.002] * num_steps,
    }


def test_panels_hold_what_can_be_drawn() -> None:
    found = {panel.title: series for panel, series in drawn(history())}
    assert list(found) == [
        "loss",
        "d, the estimated distance",
        "learning rate",
        "gradient norm",
        "seconds of a step, by phase",
    ]
    assert found["loss"] == {"loss": ([1, 3, 5], [2.0, 2.0 / 3, 0.4])}
    assert list(found["d, the estimated distance"]) == ["d"]
    assert found["learning rate"]["lr[1]"] == ([1, 2, 3, 4, 5], [0.0] * 5), "0 is drawn where the axis is linear"
    assert found["gradient norm"]["grad_norm"][0] == [2, 3, 4, 5]
    assert found["seconds of a step, by phase"]["gather_s"][0] == [2, 3, 4, 5]


def test_panel_without_values_is_left_out() -> None:
    columns = {"step": [1.0, 2.0], "loss": [NAN, NAN], "lr": [0.1, 0.1]}
    assert [panel.title for panel, _ in drawn(columns)] == ["learning rate"]


@pytest.mark.parametrize("num_steps", [1, 90])
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_picture_is_drawn(tmp_path: Path, kind: str, num_steps: int) -> None:
    path = tmp_path / f"run.{kind}"
    draw(path, title="a run", columns=history(num_steps))
    head = path.read_bytes()[:300]
    assert head.startswith(b"\x89PNG") if kind == "png" else b"<svg" in head or b"<?xml" in head


def test_unknown_format_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="jpgg"):
        draw(tmp_path / "run.jpgg", title="a run", columns=history())


def test_csv_holds_every_number_to_the_last_digit() -> None:
    columns = history()
    file = io.StringIO()
    write_csv(columns, file)
    rows = list(csv.reader(io.StringIO(file.getvalue())))
    assert rows[0] == list(columns)
    assert [row[3] for row in rows[1:]][1::2] == ["", ""]
    back = [[float(cell) if cell else NAN for cell in row] for row in rows[1:]]
    for name, column in zip(rows[0], zip(*back, strict=True), strict=True):
        assert str(list(column)) == str(columns[name]), name


def test_last_row_and_speed_follow_from_the_rows() -> None:
    columns = history(4)
    assert last_row(columns) == {name: values[-1] for name, values in columns.items() if name != "loss"}
    assert steps_per_second(columns) == pytest.approx(2.0)
    assert steps_per_second({name: values[:1] for name, values in columns.items()}) is None
    assert steps_per_second({"step": [1.0, 2.0], "time_s": [2.0, 2.0]}) is None
    assert steps_per_second({}) is None
    assert last_row({}) == {}


STATUS = {
    "name": "trainer",
    "num_shards": 2,
    "generation": "1.2",
    "recoveries": {"count": 3, "last": None},
    "restarts": 0,
    "rule": "Prodigy",
    "world_size": 4,
    "numel": 1234567,
    "step": 5,
    "skipped_steps": 1,
    "size_bytes": [3 * 2**20, 2**19],
}


def text_of(status: dict[str, object], columns: Columns) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(frame(status, columns))
    return console.export_text()


def test_top_shows_where_a_service_stands() -> None:
    text = text_of(STATUS, history())
    for part in (
        "trainer Prodigy 2 shards 4 workers 1,234,567 parameters generation 1.2, 3 recoveries, 0 coordinators lost",
        "gather 8.00 ms",
        "apply 2.00 ms",
        "in all 10.00 ms",
        "state of each shard in MiB 0: 3.0 1: 0.5",
    ):
        assert part in " ".join(text.split()), part
    titles, numbers = (re.split(r"\s{2,}", line.strip()) for line in text.splitlines()[1:3])
    assert dict(zip(titles, numbers, strict=True)) == {
        "step": "5", "skipped": "1", "steps/s": "2", "loss": "0.4", "grad_norm": "0.2", "lr[0]": "1", "d": "5e-06",
    }  # fmt: skip


def test_top_of_a_service_without_a_job_says_so() -> None:
    status = {name: STATUS[name] for name in ("name", "num_shards", "generation", "recoveries", "restarts")}
    assert "no worker has registered" in text_of({**status, "rule": None, "step": 0}, {})
