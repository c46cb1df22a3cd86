"""The coordinator's saves without Ray, on one shard whose files wait for the test: what goes on beside them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest
import torch

from stepwell.server.messages import LoadHeader
from stepwell.server.wire import values_to_wire
from stepwell.sharding.buffers import MASTER
from stepwell.sharding.checkpoint import CheckpointReader, write_shard
from stepwell.sharding.errors import CheckpointError, NotRegisteredError
from stepwell.sharding.folder import Destination, read_complete
from stepwell.sharding.manifest import ShardFile
from stepwell.sharding.snapshot import Snapshot
from tests.gated_files import Gate, GatedFileSystem, gated
from tests.server.dying import Ranks, groups_without_sockets
from tests.server.dying import Service as TwoShards
from tests.server.test_coordinator import HALVES, LIMIT_S, NUMEL, Service

EPOCH = 1


def run_test(
    test: Callable[[Service, Gate, str], Coroutine[Any, Any, None]],
) -> Callable[[], None]:
    """Run a test on an event loop, with a service that two ranks train on and a gate that its files come to."""

    def run() -> None:
        async def main() -> None:
            service = Service()
            await service.coordinator.start()
            await service.begin()
            with gated() as (gate, uri):
                await asyncio.wait_for(test(service, gate, uri), LIMIT_S)

        asyncio.run(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def load(service: Service, value: float) -> None:
    values = {(0, MASTER.name, 0): torch.full((NUMEL,), value)}
    await service.coordinator.load([values_to_wire(values)], LoadHeader(), uuid.uuid4().hex)


def saved_master(uri: str) -> torch.Tensor:
    manifest = read_complete(uri)
    with CheckpointReader(uri, manifest) as reader:
        parts = [torch.empty(NUMEL) for _ in manifest.spec.params]
        for index, part in enumerate(parts):
            reader.read(index, MASTER.name, 0, part)
    return torch.cat(parts)


async def begin_save(service: Service, gate: Gate, uri: str) -> str:
    """Returns when the file stands before the gate."""
    save_id = uuid.uuid4().hex
    assert await service.coordinator.begin_save(save_id, uri) == (True, uri, 0)
    await asyncio.to_thread(gate.wait_until_reached)
    return save_id


async def save(service: Service, uri: str) -> bool:
    """Save as a client does; whether it was written, as it was not there."""
    save_id = uuid.uuid4().hex
    is_new, at, _ = await service.coordinator.begin_save(save_id, uri)
    assert at == uri
    if is_new:
        await service.coordinator.end_save(save_id, uri)
    return is_new


@run_test
async def test_service_goes_on_while_a_save_is_written(service: Service, gate: Gate, uri: str) -> None:
    save_id = await begin_save(service, gate, uri)
    await service.register(1, HALVES[1], incarnation="b")
    await load(service, 7.0)
    told = await asyncio.gather(*(service.extend(rank, cut) for rank, cut in enumerate(HALVES)))
    assert told[0].timeline == told[1].timeline
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        read_complete(uri)
    gate.open()
    await service.coordinator.end_save(save_id, uri)
    assert torch.equal(saved_master(uri), torch.ones(NUMEL))
    assert torch.equal(service.master(), torch.cat((torch.full((NUMEL,), 7.0), torch.full((NUMEL,), 2.0))))


@run_test
async def test_save_waits_for_the_one_before(service: Service, gate: Gate, uri: str) -> None:
    first = await begin_save(service, gate, uri + "/first")
    second = asyncio.ensure_future(save(service, uri + "/second"))
    await load(service, 7.0)
    assert not second.done()
    gate.open()
    await service.coordinator.end_save(first, uri + "/first")
    assert await second
    assert torch.equal(saved_master(uri + "/first"), torch.ones(NUMEL))
    assert torch.equal(saved_master(uri + "/second"), torch.full((NUMEL,), 7.0))


@run_test
async def test_same_save_by_several_ranks_is_written_once(service: Service, gate: Gate, uri: str) -> None:
    begun = [asyncio.ensure_future(save(service, uri)) for _ in range(3)]
    await asyncio.to_thread(gate.wait_until_reached)
    gate.open()
    assert [await each for each in begun] == [True, False, False]
    files = [path for path in fsspec.filesystem("gated").ls(uri, detail=False) if "-shard-" in path]
    assert len(files) == 1
    assert torch.equal(saved_master(uri), torch.ones(NUMEL))


@run_test
async def test_save_that_fails_leaves_no_file_and_the_next_one_works(service: Service, gate: Gate, uri: str) -> None:
    save_id = await begin_save(service, gate, uri)
    gate.open(fails=True)
    with pytest.raises(CheckpointError, match=rf"{uri}: {save_id}-shard-00000-of-00001.*No space left on device"):
        await service.coordinator.end_save(save_id, uri)
    assert fsspec.filesystem("gated").find(uri) == []
    assert not service.actor._saves.under_way
    gate.fails = False
    assert await save(service, uri)
    assert torch.equal(saved_master(uri), torch.ones(NUMEL))


@run_test
async def test_save_of_which_another_shard_fails_is_given_up(service: Service, gate: Gate, uri: str) -> None:
    """This shard's file is complete, or the writer stands before the gate: neither stays."""
    await service.actor.snapshot(EPOCH, "save", Destination(uri))
    writing = asyncio.ensure_future(service.actor.save(EPOCH, "save", uri))
    await asyncio.to_thread(gate.wait_until_reached)
    giving_up = asyncio.ensure_future(service.actor.give_up_save(EPOCH, "save", uri))
    await asyncio.sleep(0)
    gate.open()
    with pytest.raises(CheckpointError, match="the save was given up"):
        await writing
    await giving_up
    await service.actor.snapshot(EPOCH, "next", Destination(uri))
    await service.actor.save(EPOCH, "next", uri)
    await service.actor.give_up_save(EPOCH, "next", uri)
    assert fsspec.filesystem("gated").find(uri) == []


@run_test
async def test_shard_that_was_restarted_has_nothing_to_write(service: Service, gate: Gate, uri: str) -> None:
    with pytest.raises(NotRegisteredError, match=f"shard 0 has nothing kept to write to {uri}"):
        await service.actor.save(EPOCH, "of the process before", uri)


@run_test
async def test_manifest_waits_for_a_restore_of_the_checkpoint_that_it_replaces(
    service: Service, gate: Gate, uri: str
) -> None:
    first = await begin_save(service, gate, uri)
    gate.open()
    await service.coordinator.end_save(first, uri)
    await load(service, 7.0)
    again = GatedFileSystem.gate = Gate()
    second = await begin_save(service, again, uri)
    async with service.coordinator._changing:  # as a restore holds it while the shards read
        again.open()
        assert (await service.actor.save(EPOCH, second, uri)).entry.size_bytes > 0
        await asyncio.sleep(0.01)
        assert torch.equal(saved_master(uri), torch.ones(NUMEL))
    await service.coordinator.end_save(second, uri)
    assert torch.equal(saved_master(uri), torch.full((NUMEL,), 7.0))
    assert len(fsspec.filesystem("gated").ls(uri)) == 2


def test_save_that_one_of_two_shards_cannot_write_leaves_no_file_of_the_other(tmp_path: Path) -> None:
    def write(snapshot: Snapshot, uri: str, name: str) -> ShardFile:
        if "-shard-00001-" in name:
            raise CheckpointError(f"{uri}: {name} cannot be written")
        return write_shard(snapshot, uri, name)

    async def main() -> None:
        service = TwoShards()
        coordinator, ranks, folder = await service.start(), Ranks(), tmp_path / "checkpoint"
        await ranks.register(coordinator)
        await ranks.hand_in(coordinator, 1.0)
        assert await coordinator.begin_save("save", str(folder)) == (True, str(folder), 0)
        with pytest.raises(CheckpointError, match=r"save-shard-00001-of-00002\.safetensors cannot be written"):
            await coordinator.end_save("save", str(folder))
        assert not folder.exists() or list(folder.iterdir()) == []
        await service.require_whole()

    with groups_without_sockets(LIMIT_S), mock.patch("stepwell.server.shard_saves.write_shard", write):
        asyncio.run(main())
