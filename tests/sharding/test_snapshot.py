"""A save while steps go on: what is written is the step it was asked at, whatever overtakes the writer."""

from __future__ import annotations

import dataclasses
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
import torch

from stepwell.optim import AdamWRule, LAMBRule, NAdamRule, ProdigyRule, Rule, SGDRule, StableAdamRule
from stepwell.sharding import snapshot as snapshot_module
from stepwell.sharding.buffers import MASTER
from stepwell.sharding.checkpoint import CheckpointReader, find_damages, write_shard
from stepwell.sharding.copies import pieces_of, read_copy, size_of, write_copy
from stepwell.sharding.errors import CheckpointError
from stepwell.sharding.folder import read_complete, write_manifest
from stepwell.sharding.manifest import build_manifest, shard_file_name
from stepwell.sharding.shard import Shard
from stepwell.sharding.snapshot import Snapshot
from tests.gated_files import LIMIT_S, Gate, gated
from tests.zoo import (
    Problem,
    Run,
    State,
    ZooTensor,
    assert_same_state,
    constant,
    initial_state,
    small,
    state_source,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

RULES: dict[str, Rule] = {
    "Prodigy": ProdigyRule(d0=1e-3),
    "Prodigy-strided": ProdigyRule(d0=1e-3, slice_p=11),
    "Prodigy-bfloat16": ProdigyRule(d0=1e-3, stat_dtype="bfloat16"),
    "AdamW": AdamWRule(amsgrad=True),
    "LAMB": LAMBRule(),
    "NAdam": NAdamRule(),
    "StableAdam": StableAdamRule(lr=0.01),
}
NEVER_STEPPED = 3
"""The small problem's frozen parameter."""


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tiles to a unit, so that the small problem has some dozens."""
    monkeypatch.setattr(snapshot_module, "UNIT_TILES", 3)


def problem() -> Problem:
    extra = [ZooTensor((500,), dtype="float64"), ZooTensor((0, 3)), ZooTensor((9, 2, 5, 7), dtype="float64")]
    return dataclasses.replace(small(), tensors=(*small().tensors, *extra))


def trained(rule: Rule, num_shards: int = 2) -> Run:
    return Run(problem(), rule, num_shards=num_shards).steps(5, schedule=constant)


class Save:
    """A save of all shards of a run that is being written."""

    def __init__(self, run: Run, uri: str, pool: ThreadPoolExecutor) -> None:
        self.uri, self.spec = uri, run.group.spec
        self.snapshots = [shard.snapshot() for shard in run.group.shards]
        self.writing: list[Future[Any]] = [
            pool.submit(write_shard, snapshot, uri, shard_file_name("save", index, len(self.snapshots)))
            for index, snapshot in enumerate(self.snapshots)
        ]

    def state(self) -> State:
        """What was written, read back by a run of its own."""
        files = [file.result(timeout=LIMIT_S) for file in self.writing]
        write_manifest(self.uri, build_manifest(self.spec, files, self.snapshots[0].status))
        assert find_damages(self.uri) == []
        with CheckpointReader(self.uri, read_complete(self.uri)) as reader:
            return Run(problem(), self.spec.rule, num_shards=3, source=reader.source()).state()


@contextmanager
def saving(run: Run, *, num_before: int = 0, seekable: bool = True) -> Iterator[tuple[Gate, Save]]:
    """A save whose files have come as far as the gate."""
    num_shards = len(run.group.shards)
    with (
        gated(num_before=num_before, num_files=num_shards, seekable=seekable) as (gate, uri),
        ThreadPoolExecutor(num_shards) as pool,
    ):
        try:
            save = Save(run, uri, pool)
            gate.wait_until_reached()
            yield gate, save
        finally:
            gate.open()


@pytest.mark.parametrize("seekable", [True, False])
@pytest.mark.parametrize("num_before", [0, 1, 4, 9])
@pytest.mark.parametrize("name", RULES)
def test_save_is_of_the_step_it_was_asked_at_though_steps_overtake_it(
    name: str, num_before: int, seekable: bool
) -> None:
    run, undisturbed = trained(RULES[name]), trained(RULES[name]).steps(9, schedule=constant).state()
    expected = run.state()
    with saving(run, num_before=num_before, seekable=seekable) as (gate, save):
        run.steps(9, schedule=constant)
        gate.open()
        assert_same_state(save.state(), expected)
    assert_same_state(run.state(), undisturbed)


def test_save_is_of_its_step_though_steps_run_beside_the_writer() -> None:
    """Without a gate: units are copied and read by two threads at once."""
    run = trained(RULES["Prodigy-strided"])
    with gated() as (gate, uri), ThreadPoolExecutor(2) as pool:
        gate.open()
        for _ in range(20):
            expected, save = run.state(), Save(run, uri, pool)
            run.steps(run.next_sequence + 1, schedule=constant)
            assert_same_state(save.state(), expected)


def load(run: Run) -> None:
    run.group.load(initial_state(run.problem), timeline=2)


def reload_by_hand(run: Run) -> None:
    """The never-stepped one's copies follow it; so even what no step changes, changes."""
    run.step(reloaded={0: torch.full((520,), 3.0), NEVER_STEPPED: torch.full((7,), 5.0)})


def extend(run: Run) -> None:
    spec = run.group.spec
    added = dataclasses.replace(spec.params[0], name="added")
    values = {(len(spec.params), MASTER.name): torch.ones(added.numel)}
    run.group.extend(dataclasses.replace(spec, params=(*spec.params, added)), state_source(values), {0: None})
    run.step(gradients={index: torch.ones(run.group.spec.params[index].shape) for index in (0, 5, len(spec.params))})


def take_batches(run: Run) -> None:
    run.group.take_batches((4, len(run.group.spec.params) - 4))
    load(run)


@pytest.mark.parametrize("num_before", [0, 4])
@pytest.mark.parametrize("change", [load, reload_by_hand, extend, take_batches])
@pytest.mark.parametrize("name", ["Prodigy", "Prodigy-strided", "NAdam"])
def test_save_is_of_its_step_whatever_changes_the_state(
    name: str, change: Callable[[Run], None], num_before: int
) -> None:
    run = trained(RULES[name])
    expected = run.state()
    with saving(run, num_before=num_before) as (gate, save):
        change(run)
        gate.open()
        assert_same_state(save.state(), expected)


# What is copied


def slots_copied(snapshot: Snapshot) -> set[str]:
    return {snapshot._slots[index][0].name for index, _ in snapshot._copies}


def test_step_copies_what_it_changes_and_a_load_the_rest() -> None:
    run = trained(RULES["Prodigy-strided"], num_shards=1)
    snapshot = run.group.shards[0].snapshot()
    assert slots_copied(snapshot) == set()
    run.step()
    assert slots_copied(snapshot) == {MASTER.name, "s", "exp_avg", "exp_avg_sq"}
    copies = dict(snapshot._copies)
    run.step()
    assert {unit: id(copy) for unit, copy in snapshot._copies.items()} == {unit: id(copies[unit]) for unit in copies}
    load(run)
    assert slots_copied(snapshot) == {MASTER.name, "s", "p0", "exp_avg", "exp_avg_sq"}


def test_what_is_written_is_not_copied() -> None:
    run = trained(RULES["AdamW"], num_shards=1)
    snapshot = run.group.shards[0].snapshot()
    snapshot.write(io.BytesIO())
    run.step()
    assert not snapshot._copies


@pytest.mark.parametrize("name", RULES)
def test_constant_slots_are_constant(name: str) -> None:
    run = trained(RULES[name])
    before = run.state()
    run.steps(15, schedule=constant)
    for slot in RULES[name].slots:
        is_same = all(map(torch.equal, before.slots[slot.name], run.state().slots[slot.name]))
        assert is_same == slot.constant, slot.name


# Failures


@pytest.mark.parametrize("num_before", [0, 3])
def test_save_that_fails_names_its_file_and_frees_everything(num_before: int) -> None:
    run, undisturbed = trained(RULES["Prodigy"]), trained(RULES["Prodigy"]).steps(12, schedule=constant).state()
    with saving(run, num_before=num_before) as (gate, save):
        run.steps(7, schedule=constant)
        gate.open(fails=True)
        for index, file in enumerate(save.writing):
            with pytest.raises(CheckpointError, match=rf"save-shard-0000{index}-of-00002.*No space left on device"):
                file.result(timeout=LIMIT_S)
        assert fsspec.filesystem("gated").find(save.uri) == []
        for snapshot in save.snapshots:
            assert not snapshot._copies
            assert not snapshot._shared
        run.steps(10, schedule=constant)
    expected = run.state()
    with saving(run) as (gate, save):
        run.steps(12, schedule=constant)
        gate.open()
        assert_same_state(save.state(), expected)
    assert_same_state(run.state(), undisturbed)


def test_step_without_memory_for_the_save_is_taken_and_the_save_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(RULES["Prodigy"])

    def no_memory(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("not enough memory: you tried to allocate 3072 bytes")

    with saving(run, num_before=1) as (gate, save):
        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty_like", no_memory)
            run.group.shards[0]._detach_snapshots(for_step=True)
        run.steps(7, schedule=constant)
        gate.open()
        with pytest.raises(CheckpointError, match=r"no memory to keep .*not enough memory.*save again"):
            save.writing[0].result(timeout=LIMIT_S)
        save.writing[1].result(timeout=LIMIT_S)
    assert_same_state(run.state(), trained(RULES["Prodigy"]).steps(7, schedule=constant).state())


def test_snapshot_that_is_closed_while_its_last_unit_is_written_is_not_taken_for_whole() -> None:
    """A step that had no memory for a copy has changed that unit by now."""
    snapshot = Run(Problem((ZooTensor((512,)),)), SGDRule(lr=0.1)).group.shards[0].snapshot()

    class Closing(io.BytesIO):
        def write(self, data: Buffer) -> int:
            snapshot.close("there is no memory")
            return super().write(data)

    with pytest.raises(CheckpointError, match="the snapshot is closed: there is no memory; save again"):
        snapshot.write(Closing())


def test_snapshots_side_by_side_are_each_of_its_own_moment() -> None:
    run = trained(RULES["Prodigy"], num_shards=1)
    first, shard = run.state(), run.group.shards[0]
    with saving(run, num_before=4) as (gate, save):
        run.steps(6, schedule=constant)
        second, snapshot, replicated = run.state(), shard.snapshot(), shard.replicated()
        pieces, workers = pieces_of(snapshot), dict(shard.members.by_rank)
        run.steps(8, schedule=constant)
        gate.open()
        assert_same_state(save.state(), first)
    memory = torch.empty(size_of(pieces), dtype=torch.uint8)
    write_copy(snapshot, memory)
    copied = Run(problem(), RULES["Prodigy"])
    copied.group.shards[0] = Shard(run.group.spec)
    copied.group.shards[0].rebuild(read_copy(memory, pieces, snapshot.status), replicated, workers)
    assert_same_state(copied.state(), second)
    assert_same_state(run.state(), trained(RULES["Prodigy"]).steps(8, schedule=constant).state())


def test_step_waits_for_no_write() -> None:
    """The file system stands still for the whole test: a step that waited for it would never end."""
    run = trained(RULES["Prodigy"])
    with saving(run, num_before=5):
        stepping = threading.Thread(target=lambda: run.steps(8, schedule=constant), daemon=True)
        stepping.start()
        stepping.join(timeout=LIMIT_S / 2)
        assert not stepping.is_alive()
