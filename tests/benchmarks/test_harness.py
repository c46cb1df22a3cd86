from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from contestants import Workload, layered, lora
from goals import Goal, judge
from harness import Contestant, Race, Row, available_bytes, left_out, race
from report import Run, read, taken, write

ROOT = Path(__file__).parents[2]


class Machine:
    """A clock that shows what each contestant takes, times how slow the machine is just then."""

    def __init__(self, seconds: dict[str, float], slowness: Callable[[int], float] = lambda turn: 1.0) -> None:
        self._seconds, self._slowness, self.order = seconds, slowness, list[str]()

    def contestants(self, *names: str, size_bytes: int = 0) -> list[Contestant]:
        return [Contestant(name, functools.partial(self.order.append, name), size_bytes) for name in names]

    def clock(self, step: Callable[[], object]) -> float:
        step()
        return self._seconds[self.order[-1]] * self._slowness(len(self.order))


def run(machine: Machine, names: Sequence[str], yardsticks: Sequence[str] = (), **options: int) -> Race:
    return race(
        machine.contestants(*names, size_bytes=40),
        yardsticks=machine.contestants(*yardsticks, size_bytes=28),
        budget_s=0.0,
        num_warmups=0,
        clock=machine.clock,
        **options,
    )


def test_race_takes_turns_forwards_and_backwards() -> None:
    machine = Machine({"a": 1.0, "b": 2.0, "y": 0.5})
    run(machine, ["a", "b"], ["y"], min_rounds=2)
    assert machine.order == ["y", "a", "y", "b", "y", "b", "y", "a"]


def test_race_ends_with_its_budget() -> None:
    machine = Machine({"a": 1.0})
    found = race(machine.contestants("a"), budget_s=4.5, min_rounds=2, num_warmups=3, clock=machine.clock)
    assert len(found.times["a"]) == 5
    assert len(machine.order) == 8, "three turns that do not count"


def test_ratio_does_not_depend_on_a_machine_that_slows_down() -> None:
    machine = Machine({"a": 3.0, "b": 2.0}, slowness=lambda turn: 1.0 if turn <= 10 else 5.0)
    ratio = run(machine, ["a", "b"], min_rounds=10).ratio("a", "b")
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.5, 1.5, 1.5))


def test_ratio_beyond_a_base_leaves_it_out_of_both() -> None:
    found = run(Machine({"base": 1.0, "a": 3.0, "b": 5.0}), ["base", "a", "b"])
    assert found.ratio("a", "b", beyond="base").median == pytest.approx(0.5)
    assert found.seconds("a", beyond="base") == pytest.approx(2.0)


def test_bandwidth_is_bytes_over_time_against_the_yardstick() -> None:
    found = run(Machine({"a": 2.0, "y": 1.0}), ["a"], ["y"])
    assert found.bandwidth("a", "y") == pytest.approx(40 / 28 / 2)
    assert found.gb_per_s("a") == pytest.approx(20e-9)
    assert found.noise("y").median == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("field", "limit", "row", "is_met", "shortfall"),
    [
        ("ratio", 1.05, Row(name="a", ours=1.0, ratio=1.0, key="k/x"), True, None),
        ("ratio", 1.0, Row(name="a", ours=1.0, ratio=3.0, key="k/x"), False, 3.0),
        ("speedup", 8.0, Row(name="a", ours=1.0, ratio=0.25, key="k/x"), False, 2.0),
        ("speedup", 5.0, Row(name="a", ours=1.0, ratio=0.2, key="k/x"), True, None),
        ("bandwidth", 0.9, Row(name="a", ours=1.0, bandwidth=0.45, key="k/x"), False, 2.0),
        ("ours", 2.0, Row(name="k of no key", ours=3.0), False, 1.5),
        ("ours", 2.0, Row(name="another", ours=3.0), None, None),
    ],
)
def test_judge_says_by_how_much_a_goal_is_missed(
    field: str, limit: float, row: Row, is_met: bool | None, shortfall: float | None
) -> None:
    verdict = judge([row], [Goal("figure", "label", "k", field, limit)])[0]
    assert verdict.is_met is is_met
    assert verdict.shortfall == pytest.approx(shortfall)


def test_row_keeps_what_it_has_no_field_for() -> None:
    row = Row.from_dict({"name": "save", "ours": 1.0, "theirs": 2.0, "ratio": 0.5, "unit": "s", "folder": "/tmp"})
    assert (row.name, row.ratio, row.note) == ("save", 0.5, "folder /tmp")


def test_left_out_says_what_memory_lacks() -> None:
    assert left_out("a", 1, section="s") == []
    row = left_out("a", 2 * available_bytes(), section="s")[0]
    assert row.theirs is not None
    assert row.ours > row.theirs > 0


def test_report_writes_page_json_and_picture(tmp_path: Path) -> None:
    rows = (
        Row(name="4 M", ours=2.0, theirs=1.0, ratio=2.0, section="growth with shards", key="growth/shards/a", x=1.0),
        Row(name="latency", ours=3.0, unit="ms", section="step", key="step/1 M/latency"),
    )
    runs = Run("step", "today", 1.0, 0.0, rows), Run("x", "today", 1.0, 0.0, (), "bench_x.py failed")
    write(tmp_path, read(tmp_path, quick=True).with_runs(runs))
    page = (tmp_path / "TABLE.md").read_text()
    assert "| at most 2 ms | 3.00 ms | missed by a factor of 1.50 |" in page
    assert "bench_x.py failed" in page
    assert (tmp_path / "results.png").stat().st_size > 1000


def test_report_keeps_other_topics_of_the_same_kind_of_run(tmp_path: Path) -> None:
    runs = Run("step", "today", 1.0, 0.0, (Row(name="latency", ours=3.0),)), Run("rules", "today", 1.0, 0.0, ())
    write(tmp_path, read(tmp_path, quick=False).with_runs(runs))
    assert read(tmp_path, quick=False).runs == runs
    assert read(tmp_path, quick=False).runs_but(["step"]) == [runs[1]]
    assert read(tmp_path, quick=True).runs == ()


def test_report_takes_what_another_machine_has_found_and_keeps_it(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    rows = (Row(name="Prodigy", ours=24.0, ratio=0.46, key="gpu/1 B/Prodigy", bandwidth=0.79),)
    write(there, read(there, quick=False).with_runs([Run("gpu", "today", 1.0, 0.0, rows), Run("x", "", 1.0, 0.0, ())]))
    other = json.loads((there / "results.json").read_text())
    other["machine"] = {"cores": 16, "cpu": "C", "torch": "2.11", "python": "3.12", "gpu": "G"}
    (there / "results.json").write_text(json.dumps(other))
    (run,) = taken(there / "results.json")
    assert (run.topic, run.machine) == ("gpu", "G, 16 cores (C), torch 2.11")
    write(here, read(here, quick=False).with_runs([run, Run("step", "today", 1.0, 0.0, ())]))
    assert "| gpu | today | 1 s | 0.0 | G, 16 cores (C), torch 2.11 |" in (here / "TABLE.md").read_text()
    assert read(here, quick=True).runs == (run,), "of another kind of run what came from elsewhere stays"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is measured where there is one")
def test_topic_that_finds_nothing_here_leaves_what_stood_there(tmp_path: Path) -> None:
    rows = (Row(name="Prodigy", ours=24.0, key="gpu/1 B/Prodigy"),)
    before = Run("gpu", "today", 1.0, 0.0, rows, machine="elsewhere")
    write(tmp_path, read(tmp_path, quick=True).with_runs([before]))
    command = [sys.executable, "benchmarks/run.py", "gpu", "--quick", "--out", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    assert "no GPU here" in ended.stderr
    assert read(tmp_path, quick=True).runs == (before,)


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_file_that_cannot_be_taken_is_named(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    command = [sys.executable, "benchmarks/run.py", "--take", str(path), "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 2
    assert f"--take: expected a results.json that run.py has written, got {path}" in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("numel", [1_000, 1_000_000, 17_000_000])
def test_layered_has_so_many_parameters(numel: int) -> None:
    assert sum(shape.numel() for shape in layered(numel)) == numel


def test_lora_has_600_tensors_of_about_7000() -> None:
    numels = [shape.numel() for shape in lora()]
    assert len(numels) == 600
    assert all(6_990 < numel < 7_010 for numel in numels)


def test_workload_backward_gives_its_gradients() -> None:
    workload = Workload(layered(3_000))
    params = workload.params(with_grads=False)
    workload.backward(params)
    for param, grad in zip(params, workload.grads, strict=True):
        assert param.grad is not None
        assert torch.equal(param.grad, grad)
        assert param.grad.data_ptr() != grad.data_ptr()
