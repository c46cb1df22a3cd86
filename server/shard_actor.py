"""A shard as a Ray actor: an event loop that never blocks, and one thread for arithmetic."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
import torch

from ..sharding.buffers import StateSource
from ..sharding.checkpoint import CheckpointReader, ShardFile, read_manifest, shard_file_name, write_shard
from ..sharding.errors import (
    NotRegisteredError,
    PlacementError,
    ServiceError,
    ServiceTimeoutError,
    ShardLostError,
)
from ..sharding.layout import dtype_from_name
from ..sharding.push import Push
from ..sharding.shard import Decision, Receipt, Reduction, Shard, ShardStatus, StepResult
from .collective import Collective, GroupStore
from .config import COLLECTIVE_MARGIN_S, ServiceConfig
from .messages import LoadHeader, WireTensor, from_wire, to_wire, unpack_job, unpack_push


class ShardActor:
    """Serves one :class:`stepwell.sharding.Shard`. Every method is called through Ray, on the actor's event loop.

    Args:
        config: The service's.
        shard: This shard's index.
    """

    def __init__(self, config: ServiceConfig, shard: int) -> None:
        self._config, self._index = config, shard
        self._host = ray.util.get_node_ip_address()
        self._device = _device(config)
        self._shard: Shard | None = None
        self._store: GroupStore | None = None
        self._collective: Collective | None = None
        self._data = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._step: asyncio.Task[None] | None = None
        self._outcome: asyncio.Future[StepResult | ServiceError] | None = None
        self._held_after: int | None = None
        self._released = asyncio.Event()
        self._released.set()
        self._incarnation = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"

    # Forming the group; called by the coordinator

    async def open_store(self, timeout_s: float) -> tuple[str, int]:
        """Host the rendezvous of the next generation; called on shard 0 alone."""
        self._store = GroupStore(self._host, timeout_s)
        return self._store.address

    async def join(self, generation: int, store_address: tuple[str, int], timeout_s: float) -> str:
        """Form the group of ``generation`` with all other shards; returns this process's incarnation."""
        if self._collective is not None and generation <= self._collective.generation:
            raise ServiceError(f"expected a generation after {self._collective.generation}, got {generation}")
        self._collective = await asyncio.get_running_loop().run_in_executor(
            None,
            lambda: Collective(
                generation,
                self._index,
                self._config.num_shards,
                host=self._host,
                store_address=store_address,
                forming_timeout_s=timeout_s,
                timeout_s=self._config.worker_timeout_s + COLLECTIVE_MARGIN_S,
            ),
        )
        return self._incarnation

    # The job and its state; called by the coordinator

    async def register(self, job: bytes) -> None:
        """Lay out a job and allocate its buffers."""
        spec = unpack_job(job)
        self._shard = await self._compute(
            lambda: Shard(spec, shard=self._index, num_shards=self._config.num_shards, device=self._device)
        )

    async def admit(self, rank: int, incarnation: str) -> None:
        """Let a worker's process push as ``rank``."""
        self._job().admit(rank, incarnation)

    async def set_world_size(self, world_size: int) -> None:
        """Change the number of workers."""
        self._job().set_world_size(world_size)

    async def load(self, values: Mapping[tuple[int, str], WireTensor], header: LoadHeader, timeline: int) -> None:
        """Take a state that a worker holds."""
        tensors = {key: from_wire(wire) for key, wire in values.items()}
        source = StateSource(
            read=lambda param, slot, offset, numel: tensors[param, slot][offset : offset + numel],
            available=frozenset(tensors),
            step_counts=header.step_counts,
            scalars=header.scalars,
            sequence=header.sequence,
            step=header.step,
            skipped_steps=header.skipped_steps,
        )
        await self._compute(lambda: self._job().load(source, timeline=timeline))

    async def restore(self, uri: str, timeline: int) -> None:
        """Take the state of a checkpoint."""

        def restore() -> None:
            with CheckpointReader(uri, read_manifest(uri)) as reader:
                self._job().load(reader.source(), timeline=timeline)

        await self._compute(restore)

    async def hold(self) -> int:
        """Begin no step after the one that is under way; returns the step to wait for, see :meth:`settle`."""
        shard = self._job()
        self._held_after = shard.sequence + (self._step is not None and not self._step.done())
        self._released.clear()
        return self._held_after

    async def settle(self, sequence: int, timeout_s: float) -> ShardStatus:
        """Run steps up to ``sequence``, no further, and wait for them; returns where the shard stands then."""
        self._held_after = sequence
        deadline = asyncio.get_running_loop().time() + timeout_s
        self._start_if_complete()
        while self._job().sequence < sequence or (self._step is not None and not self._step.done()):
            left = deadline - asyncio.get_running_loop().time()
            try:
                await asyncio.wait_for(asyncio.shield(self._next_outcome()), max(left, 0.001))
            except TimeoutError as error:
                raise ServiceTimeoutError(
                    f"shard {self._index}: step {sequence} was not done within {timeout_s:g} s"
                ) from error
            await asyncio.sleep(0)
        return self._job().status()

    async def release(self) -> None:
        """Go on with steps after a :meth:`hold`."""
        self._held_after = None
        self._released.set()
        self._start_if_complete()

    async def save(self, uri: str, save_id: str) -> ShardFile:
        """Write this shard's file of a checkpoint; the service is held meanwhile."""
        name = shard_file_name(save_id, self._index, self._config.num_shards)
        return await self._compute(lambda: write_shard(self._job().buffers, uri, name))

    async def export(self) -> tuple[list[tuple[int, str, int, WireTensor]], ShardStatus]:
        """Every owned piece as (param, slot, offset, values), and where the shard stands."""
        shard = self._job()

        def export() -> list[tuple[int, str, int, WireTensor]]:
            return [(piece.param, slot, piece.offset, to_wire(v)) for slot, piece, v in shard.buffers.export()]

        return await self._compute(export), shard.status()

    async def status(self) -> ShardStatus | None:
        """Where the shard stands; None without a job."""
        return None if self._shard is None else self._shard.status()

    # One step; called by workers

    async def push(
        self, request: bytes, gradient: Sequence[WireTensor], reloaded: Mapping[int, WireTensor] | None = None
    ) -> str:
        """Check a push, keep it and acknowledge it at once; start the step when it is complete."""
        header = unpack_push(request)
        shard = self._job()
        parts = tuple(from_wire(wire) for wire in gradient)
        changed = {index: from_wire(wire) for index, wire in (reloaded or {}).items()}
        receipt = shard.receive(Push(header, parts, changed))
        if receipt is Receipt.COMPLETE:
            self._start_if_complete()
        elif receipt is Receipt.WAITING:
            loop = asyncio.get_running_loop()
            loop.call_later(self._config.worker_timeout_s, self._give_up, header.timeline, header.sequence)
        return receipt.value

    async def pull(
        self, timeline: int, sequence: int, dtypes: Sequence[str], timeout_s: float
    ) -> tuple[StepResult, list[WireTensor]]:
        """Wait for step ``sequence`` to be decided; its result and, after a COMMIT, the owned parameters.

        Raises:
            SequenceError: If it is not the last step or the next one.
            ServiceTimeoutError: If it is not decided within ``timeout_s``.
            ShardLostError: If another shard was lost meanwhile.
        """
        shard = self._job()
        result = shard.result(timeline, sequence)
        if result is None or result.decision is Decision.ABORT:
            result = await self._wait(timeline, sequence, timeout_s)
        committed = result.decision is Decision.COMMIT
        return result, await self.parameters(dtypes) if committed else []

    async def decided(self, timeline: int, sequence: int, timeout_s: float) -> StepResult | None:
        """The result of step ``sequence`` if it was taken; waits for one that is under way, never for one that is not."""
        result = self._job().result(timeline, sequence)
        if result is None and self._step is not None and not self._step.done():
            return await self._wait(timeline, sequence, timeout_s)
        return result

    async def parameters(self, dtypes: Sequence[str]) -> list[WireTensor]:
        """The owned parameters, flat, per extent, in the wanted dtypes."""
        return [to_wire(part) for part in self._job().parameters([dtype_from_name(name) for name in dtypes])]

    # Within

    def _job(self) -> Shard:
        if self._shard is None:
            raise NotRegisteredError(
                f"shard {self._index} holds no job; it may have been restarted. Register the job, or restore its last checkpoint."
            )
        return self._shard

    async def _compute(self, work: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._data, work)

    async def _wait(self, timeline: int, sequence: int, timeout_s: float) -> StepResult:
        try:
            outcome = await asyncio.wait_for(asyncio.shield(self._next_outcome()), timeout_s)
        except TimeoutError as error:
            missing = self._job().missing_ranks
            raise ServiceTimeoutError(
                f"shard {self._index}: step {sequence} was not decided within {timeout_s:g} s; "
                f"missing ranks: {missing or 'none, the shards are still at it'}"
            ) from error
        if isinstance(outcome, ServiceError):
            raise outcome
        return outcome

    def _next_outcome(self) -> asyncio.Future[StepResult | ServiceError]:
        if self._outcome is None:
            self._outcome = asyncio.get_running_loop().create_future()
        return self._outcome

    def _give_up(self, timeline: int, sequence: int) -> None:
        """Vote the step down if it still lacks a rank when its time is over."""
        shard = self._shard
        if shard is None or (shard.timeline, shard.sequence + 1) != (timeline, sequence):
            return
        if shard.is_waiting and (self._step is None or self._step.done()):
            self._step = asyncio.get_running_loop().create_task(self._run_step(shard))

    def _start_if_complete(self) -> None:
        shard = self._shard
        running = self._step is not None and not self._step.done()
        if shard is not None and not running and shard.is_waiting and not shard.missing_ranks:
            if self._held_after is None or shard.sequence < self._held_after:
                self._step = asyncio.get_running_loop().create_task(self._run_step(shard))

    async def _run_step(self, shard: Shard) -> None:
        outcome: StepResult | ServiceError = ServiceError(f"shard {self._index} failed in a step; its log has the traceback")
        try:
            outcome = await self._compute(lambda: _drive(shard.step(), self._collective))
        except ServiceError as error:
            outcome = error
        finally:
            waiting, self._outcome = self._next_outcome(), None
            waiting.set_result(outcome)


def _drive(step: Reduction, collective: Collective | None) -> StepResult:
    """Run a step to its end, all-reducing whatever it yields."""
    if collective is None:
        raise ShardLostError("the shards have no process group; restart the service")
    vector = next(step)
    while True:
        try:
            total = collective.all_reduce(vector)
        except ShardLostError:
            step.close()
            raise
        try:
            vector = step.send(total)
        except StopIteration as stop:
            result: StepResult = stop.value
            return result


def _device(config: ServiceConfig) -> torch.device:
    if config.num_gpus_per_shard == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise PlacementError("Ray placed this shard on a GPU, but torch finds no CUDA device there; install a CUDA build of torch")
    return torch.device("cuda", 0)
