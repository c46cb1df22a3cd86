"""The coordinator dies before each of the calls that an operation makes: afterwards it is done, or not done.

Then who asked for it asks the next coordinator, and it is done once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stepwell.server.coordinator import Coordinator
from stepwell.server.knowledge import Knowledge
from stepwell.server.messages import LoadHeader
from stepwell.server.wire import values_to_wire
from stepwell.sharding.buffers import MASTER
from stepwell.sharding.checkpoint import CheckpointReader
from stepwell.sharding.errors import CheckpointError, EpochError
from stepwell.sharding.folder import read_complete
from tests.gated_files import Gate, gated
from tests.server.dying import LIMIT_S, Ranks, Service, groups_without_sockets
from tests.server.test_coordinator import NUMEL

FORMING_TIMEOUT_S = 2.0

Act = Callable[[Coordinator, str], Coroutine[Any, Any, object]]
"""An operation; what it takes is a coordinator and a folder for checkpoints."""

RANKS, GROWN = Ranks(), Ranks(num_groups=2)
ALONE, PAIR, TRIO = (Ranks(world_size=size, gradients="local") for size in (1, 2, 3))


async def nothing(coordinator: Coordinator, folder: str) -> None:
    """A service without a job."""


async def register(coordinator: Coordinator, folder: str) -> None:
    await RANKS.register(coordinator)


async def hand_in(coordinator: Coordinator, folder: str) -> None:
    await RANKS.hand_in(coordinator, 1.0)


async def train(coordinator: Coordinator, folder: str) -> None:
    """A job with parameters."""
    await register(coordinator, folder)
    await hand_in(coordinator, folder)


async def load(coordinator: Coordinator, folder: str) -> None:
    values = {(0, MASTER.name, 0): torch.full((NUMEL,), 7.0)}
    await coordinator.load([values_to_wire(values)], LoadHeader(step=3, sequence=4), "load")


async def save(coordinator: Coordinator, folder: str, save_id: str = "save") -> None:
    is_new, _, _ = await coordinator.begin_save(save_id, folder)
    if is_new:
        await coordinator.end_save(save_id, folder)


async def save_and_go_on(coordinator: Coordinator, folder: str) -> None:
    """A checkpoint, after which the state changes."""
    await train(coordinator, folder)
    await save(coordinator, folder, "before")
    await load(coordinator, folder)


async def restore(coordinator: Coordinator, folder: str) -> None:
    await coordinator.restore(folder, "restore")


async def begin_with_a_checkpoint(coordinator: Coordinator, folder: str) -> None:
    """A checkpoint of a job that was registered in two parts, which another service wrote."""
    other = await Service().start()
    await train(other, folder)
    await GROWN.extend(other, 3.0)
    await save(other, folder, "before")


async def begin_with_another_layout(coordinator: Coordinator, folder: str) -> None:
    """The same, and a job that was registered at once."""
    await begin_with_a_checkpoint(coordinator, folder)
    await GROWN.register(coordinator)
    await GROWN.hand_in(coordinator, 9.0)


async def extend(coordinator: Coordinator, folder: str) -> None:
    await GROWN.extend(coordinator, 3.0)


async def replace(coordinator: Coordinator, folder: str) -> None:
    await RANKS.register(coordinator, [1], incarnation="b")


async def leave(coordinator: Coordinator, folder: str) -> None:
    await coordinator.leave(1, "1-a")


async def dismiss(coordinator: Coordinator, folder: str) -> None:
    await coordinator.dismiss()


async def all_leave(coordinator: Coordinator, folder: str) -> None:
    await train(coordinator, folder)
    await coordinator.leave(0, "0-a")
    await coordinator.leave(1, "1-a")


async def another_job(coordinator: Coordinator, folder: str) -> None:
    await ALONE.register(coordinator, [0])


async def train_elastic(coordinator: Coordinator, folder: str) -> None:
    await PAIR.register(coordinator)
    await load(coordinator, folder)


async def join(coordinator: Coordinator, folder: str) -> None:
    await TRIO.register(coordinator, [2])


OPERATIONS: dict[str, tuple[Act, Act]] = {
    "register": (nothing, register),
    "hand in": (register, hand_in),
    "load": (train, load),
    "extend": (train, extend),
    "restore": (save_and_go_on, restore),
    "restore with another layout": (begin_with_another_layout, restore),
    "restore without a job": (begin_with_a_checkpoint, restore),
    "save": (save_and_go_on, save),
    "replace a worker": (train, replace),
    "leave": (train, leave),
    "dismiss": (train, dismiss),
    "workers of another number": (all_leave, another_job),
    "join": (train_elastic, join),
    "leave an elastic job": (train_elastic, leave),
}
ELASTIC = ("join", "leave an elastic job")


@dataclasses.dataclass
class Outcome:
    """Where a service stands: what its shards know, and own."""

    job: object
    workers: object
    left: object
    world: object
    timeline: int
    state: dict[tuple[int, str, int], torch.Tensor]

    @classmethod
    async def of(cls, service: Service) -> Outcome:
        reports = await service.require_whole()
        known = Knowledge.of(reports)
        state = await service.state() if known.is_loaded else {}
        world = None if known.spec is None else reports[0].world
        return cls(known.spec, known.workers, known.left, world, known.timeline, state)

    def equals(self, other: Outcome) -> bool:
        same = [getattr(self, name) == getattr(other, name) for name in ("job", "workers", "left", "world", "timeline")]
        keys = self.state.keys() == other.state.keys()
        return all(same) and keys and all(torch.equal(self.state[key], other.state[key]) for key in self.state)


def run(test: Callable[[Service], Coroutine[Any, Any, Any]], *, elastic: bool = False) -> Any:
    """Run something on an event loop beside a new service."""

    async def main() -> Any:
        service = Service(elastic=elastic)
        try:
            return await asyncio.wait_for(test(service), LIMIT_S)
        finally:
            for life in service.lives:
                life.bury()

    with groups_without_sockets(FORMING_TIMEOUT_S):
        return asyncio.run(main())


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_is_done_or_not_done_wherever_the_coordinator_dies(name: str, tmp_path: Path) -> None:
    before, operation = OPERATIONS[name]
    folders = (str(tmp_path / str(number)) for number in itertools.count())
    elastic = name in ELASTIC
    num_calls, undone, done = run(lambda service: _complete(service, before, operation, next(folders)), elastic=elastic)
    assert num_calls > 0
    expected = [undone, done]
    if operation in (register, another_job):  # first the job, then its workers
        expected.append(dataclasses.replace(undone, job=done.job, workers={}, left=set(), world=done.world))
    for moment in range(num_calls):
        run(
            lambda service: _die(service, before, operation, next(folders), moment, expected),  # noqa: B023
            elastic=elastic,
        )


def test_coordinator_that_dies_as_it_takes_over_leaves_the_same_to_the_next_one(tmp_path: Path) -> None:
    """One shard has taken a group, the other has not, and neither can reduce in the group that there was."""
    folder = str(tmp_path)

    async def half_extended(service: Service) -> None:
        await train(await service.start(), folder)
        service.life.end_after(7)
        await service.until_over(extend(service.coordinator, folder))
        for actor in service.actors:
            async with actor.fence.changing:  # it has ended what was begun
                pass
        assert [report.timeline for report in await service.reports()] == [2, 1]
        for actor in service.actors:
            assert actor._steps.collective is not None
            actor._steps.collective.close()

    async def take_over(service: Service) -> int:
        await half_extended(service)
        await service.start()
        assert [report.timeline for report in await service.require_whole()] == [2, 2]
        return service.life.num_calls

    async def die(service: Service, moment: int) -> None:
        await half_extended(service)
        await service.start(moment)
        await service.start()
        found = Knowledge.of(await service.require_whole())
        assert (found.spec, found.timeline, set(found.workers)) == (expected, 2, {0, 1})

    _, _, done = run(lambda service: _complete(service, train, extend, folder))
    expected = done.job
    for moment in range(run(take_over)):
        run(lambda service: die(service, moment))  # noqa: B023


async def _complete(service: Service, before: Act, operation: Act, folder: str) -> tuple[int, Outcome, Outcome]:
    """Do it all undisturbed: how many calls the operation makes, where the service stands before and after it."""
    await before(await service.start(), folder)
    undone, num_calls = await Outcome.of(service), service.life.num_calls
    await operation(service.coordinator, folder)
    await _end_saves(service)
    return service.life.num_calls - num_calls, undone, await Outcome.of(service)


async def _die(
    service: Service, before: Act, operation: Act, folder: str, moment: int, expected: Sequence[Outcome]
) -> None:
    await before(await service.start(), folder)
    service.life.end_after(moment)
    await service.until_over(operation(service.coordinator, folder))
    await service.start()
    await _end_saves(service)
    found = await Outcome.of(service)
    assert any(found.equals(each) for each in expected), f"half done, before call {moment}: {found}"
    _require_tidy(folder)
    await operation(service.coordinator, folder)
    await _end_saves(service)
    assert (await Outcome.of(service)).equals(expected[1]), f"not done once, before call {moment}"
    _require_tidy(folder)


async def _end_saves(service: Service) -> None:
    while any(report.saves for report in await service.reports()):
        await asyncio.sleep(0.001)


def _require_tidy(folder: str) -> None:
    """See that a folder holds one whole checkpoint and nothing else, if any."""
    files = {path.name for path in Path(folder).iterdir()} if Path(folder).exists() else set()
    if files:
        manifest = read_complete(folder)
        assert files == {"manifest.msgpack", *(file.name for file in manifest.files)}
        with CheckpointReader(folder, manifest) as reader:
            values = torch.empty(NUMEL)
            reader.read(0, MASTER.name, 0, values)
        assert set(values.tolist()) in ({1.0, 2.0}, {7.0})


def test_coordinator_that_was_replaced_is_refused_and_resigns(tmp_path: Path) -> None:
    """It is alive and knows nothing of the other; whatever it still asks for is not done."""
    folder = str(tmp_path)

    async def test(service: Service) -> None:
        old, resign = await service.start(), service.resign
        await train(old, folder)
        await save(old, folder, "before")
        await service.start()
        before = await Outcome.of(service)
        for operation in (load, restore, replace, leave, another_save):
            resign.reset_mock()
            with pytest.raises(EpochError, match=r"shard \d: expected a call of the coordinator of epoch 2, got .* 1,"):
                await operation(old, folder)
            resign.assert_called()
            assert before.equals(await Outcome.of(service))
        _require_tidy(folder)

    async def another_save(coordinator: Coordinator, folder: str) -> None:
        await save(coordinator, folder, "another")

    run(test)


def test_step_goes_on_that_a_dead_coordinator_held(tmp_path: Path) -> None:
    async def test(service: Service) -> None:
        await train(await service.start(), str(tmp_path))
        service.life.end_after(2)  # which hold the shards
        await service.until_over(save(service.coordinator, str(tmp_path)))
        assert [actor._steps._held_after for actor in service.actors] == [0, 0]
        await service.start()
        await service.require_whole()

    run(test)


def test_save_that_is_being_written_outlives_the_coordinator_and_is_told_of(tmp_path: Path) -> None:
    """Who waited for it asks the next coordinator."""

    async def test(service: Service, gate: Gate, uri: str) -> None:
        await train(await service.start(), uri)
        assert await service.coordinator.begin_save("save", uri) == (True, uri, 0)
        await asyncio.to_thread(gate.wait_until_reached)
        service.life.end_after(0)
        told = asyncio.ensure_future((await service.start()).end_save("save", uri))
        assert await service.coordinator.begin_save("save", uri) == (True, uri, 0)
        gate.open()
        await told
        assert all(not report.saves for report in await service.reports())
        manifest = read_complete(uri)
        assert {file.name.split("-")[0] for file in manifest.files} == {"save"}
        await (await service.start()).end_save("save", uri)
        with pytest.raises(CheckpointError, match=r"did not outlive the service's coordinator.*save again"):
            await service.coordinator.end_save("unknown", uri)

    with gated(num_files=2) as (gate, uri):
        run(lambda service: test(service, gate, uri))
