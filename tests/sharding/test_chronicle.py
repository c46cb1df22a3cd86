"""A run's history: what is in it, how it stays bounded, and what becomes of it when the run goes back or is copied."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.optim import AdamWRule, ProdigyRule
from stepwell.sharding.chronicle import MAX_CELLS, MAX_ROWS, MIN_ROWS, Chronicle
from stepwell.sharding.shard import Shard
from stepwell.sharding.stopwatch import PHASES
from tests.zoo import Run, initial_state, small


def of_steps(num_steps: int, num_columns: int = 3) -> Chronicle:
    chronicle = Chronicle()
    for step in range(1, num_steps + 1):
        chronicle.note({"step": step, **{f"column {index}": 10 * step + index for index in range(1, num_columns)}})
    return chronicle


def test_chronicle_is_empty_before_the_first_step() -> None:
    assert Chronicle().columns() == {}
    assert Chronicle().copied().columns(3) == {}


def test_value_that_was_not_noted_is_nan_and_a_late_name_becomes_a_column() -> None:
    chronicle = Chronicle()
    chronicle.note({"step": 1, "d": 0.5})
    chronicle.note({"step": 2, "d": 0.6, "loss": 3.0})
    chronicle.note({"step": 3, "loss": math.inf})
    columns = chronicle.columns()
    assert columns["step"] == [1, 2, 3]
    assert columns["d"][:2] == [0.5, 0.6]
    assert columns["loss"][1:] == [3.0, math.inf]
    assert math.isnan(columns["d"][2])
    assert math.isnan(columns["loss"][0])
    assert chronicle.columns(1)["step"] == [3]


@settings(max_examples=25)
@given(st.integers(1, 4000), st.sampled_from([2, 3, 40, 300]))
def test_long_run_is_thinned_out_and_stays_whole(num_steps: int, num_columns: int) -> None:
    columns = of_steps(num_steps, num_columns).columns()
    steps, most = columns["step"], min(max(MAX_CELLS // num_columns, MIN_ROWS), MAX_ROWS)
    assert len(steps) <= most + 1
    assert steps[-1] == num_steps
    assert len(steps) >= min(num_steps, most // 2), "no more is dropped than has to be"
    gaps = {after - before for before, after in itertools.pairwise(steps[:-1])}
    assert len(gaps) <= 1
    assert steps[0] in (1, *gaps)
    assert columns["column 1"] == [10 * step + 1 for step in steps]


def test_columns_that_come_late_thin_a_table_that_gets_too_large() -> None:
    chronicle = of_steps(MAX_ROWS, 2)
    chronicle.note({"step": MAX_ROWS + 1, **{f"late {index}": 1.0 for index in range(400)}})
    columns = chronicle.columns()
    assert len(columns["step"]) <= MIN_ROWS + 1
    assert columns["step"][-1] == MAX_ROWS + 1
    assert columns["late 399"][-1] == 1.0


@pytest.mark.parametrize("num_steps", [9, 3000])
def test_cut_forgets_what_came_after(num_steps: int) -> None:
    chronicle = of_steps(num_steps)
    before = chronicle.columns()["step"]
    chronicle.cut(num_steps)
    assert chronicle.columns()["step"] == before
    chronicle.cut(num_steps // 2)
    assert chronicle.columns()["step"] == [step for step in before if step <= num_steps // 2]
    for step in range(num_steps // 2 + 1, num_steps // 2 + 9):
        chronicle.note({"step": step, "column 1": -step})
    columns = chronicle.columns()
    assert columns["step"][-1] == -columns["column 1"][-1] == num_steps // 2 + 8
    chronicle.cut(0)
    assert chronicle.columns() == {}


@pytest.mark.parametrize("num_steps", [0, 1, 5, 1500])
def test_copy_stays_as_it_was_and_travels(num_steps: int) -> None:
    chronicle = of_steps(num_steps)
    expected, copied = chronicle.columns(), pickle.loads(pickle.dumps(chronicle.copied()))
    for step in range(num_steps + 1, num_steps + 40):
        chronicle.note({"step": step, "column 1": 0.0})
    assert copied.columns() == expected
    copied.note({"step": num_steps + 1, "column 1": 7.0})
    assert chronicle.columns(10)["column 1"] == [0.0] * 10


def test_cut_leaves_what_a_reader_has_taken() -> None:
    chronicle = of_steps(6)
    reader = copy.copy(chronicle)  # what a thread that is in the middle of reading holds
    chronicle.cut(2)
    for step in range(3, 9):
        chronicle.note({"step": step, "column 1": 0.0})
    assert reader.columns() == of_steps(6).columns()


# Of a run


def test_history_of_a_run_holds_what_each_step_brought() -> None:
    run = Run(small(), ProdigyRule(d0=0.1), num_shards=2, world_size=2, rank_0={"max_grad_norm": math.inf})
    scalars, norms, lrs = [], [], []
    for step in range(4):
        lrs.append(1.0 / (step + 1))
        run.groups[0]["lr"] = lrs[-1]
        pushes = [run.pushes(rank, loss=float(10 * step + rank) if step else None) for rank in range(2)]
        assert run.group.push(pushes[0]) is None
        result = run.group.push(pushes[1])
        assert result is not None
        scalars.append(result.scalars)
        norms.append(result.grad_norm)
    for shard in run.group.shards:
        columns = shard.history.chronicle.columns()
        assert columns["step"] == columns["sequence"] == [1, 2, 3, 4]
        assert math.isnan(columns["loss"][0])
        assert columns["loss"][1:] == [10.5, 20.5, 30.5], "the mean over the ranks that told one"
        assert columns["workers"] == [2] * 4
        assert columns["lr[0]"] == lrs
        assert columns["lr[1]"] == [1.0] * 4
        assert columns["grad_norm"] == norms
        for name in ("d", "d_max", "d_numerator", "k"):
            assert columns[name] == [each[name] for each in scalars]
        for phase in PHASES:
            assert all(duration >= 0 for duration in columns[f"{phase}_s"]), phase
        assert columns["time_s"] == sorted(columns["time_s"])


def test_skipped_steps_are_counted_and_a_rule_without_sums_has_no_reduction() -> None:
    run = Run(small(), AdamWRule())
    run.step()
    run.step(found_inf=True)
    run.step()
    columns = run.group.shards[0].history.chronicle.columns()
    assert columns["skipped_steps"] == [0, 1, 1]
    assert "reduce_s" not in columns
    assert "loss" not in columns


def test_loss_changes_no_bit() -> None:
    plain, told = Run(small(), ProdigyRule(d0=0.1)).steps(5), Run(small(), ProdigyRule(d0=0.1))
    told.rank_0["loss"] = 3.0
    told.steps(5)
    for left, right in zip(plain.buffers(), told.buffers(), strict=True):
        assert torch.equal(left, right)


def test_load_of_an_earlier_state_takes_the_history_back_to_it() -> None:
    run = Run(small(), ProdigyRule(d0=0.1)).steps(5)
    source = initial_state(run.problem)
    run.group.load(source, timeline=2)
    assert run.group.shards[0].history.chronicle.columns() == {}
    run.steps(2)
    columns = run.group.shards[0].history.chronicle.columns()
    assert (columns["step"], columns["timeline"]) == ([1, 2], [2, 2])


def test_rebuilt_shard_has_the_history_of_the_lost_one() -> None:
    run = Run(small(), AdamWRule()).steps(5)
    lost = run.group.shards[0]
    expected, replicated = lost.history.chronicle.columns(), lost.replicated()
    run.steps(7)
    rebuilt = Shard(run.group.spec)
    rebuilt.rebuild(initial_state(run.problem), replicated, {})
    assert rebuilt.history.chronicle.columns() == expected
