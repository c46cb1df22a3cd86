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

from ..sharding.checkpoint import CheckpointReader, write_shard
from ..sharding.compiling import Kernel, compiled_code, resolve_kernel, take_compiled_code
from ..sharding.coverage import Gradients
from ..sharding.delivery import Sink
from ..sharding.errors import NotRegisteredError, PlacementError, SegmentError, ServiceError, StepwellError
from ..sharding.files import remove_file
from ..sharding.layout import dtype_from_name
from ..sharding.manifest import Manifest, ShardFile, shard_file_name
from ..sharding.push import Push
from ..sharding.reports import ShardStatus, StepResult
from ..sharding.segments import open_segment
from ..sharding.shard import Shard
from ..sharding.snapshot import Snapshot
from ..sharding.vote import Decision
from ..sharding.warm_up import warm_up
from .collective import Collective, GroupStore
from .config import COLLECTIVE_MARGIN_S, ServiceConfig
from .mappings import Mappings
from .messages import (
    LoadHeader,
    Target,
    WireTensor,
    WireValues,
    from_wire,
    source_of,
    to_wire,
    unpack_exchange,
    unpack_holdings,
    unpack_job,
    unpack_push,
    unpack_target,
    values_from_wire,
)
from .outcomes import Outcome
from .steps import Steps


class ShardActor:
    """Serves one :class:`stepwell.sharding.Shard`. Every method is called through Ray, on the actor's event loop.

    Args:
        config: The service's.
        shard: This shard's index.
    """

    def __init__(self, config: ServiceConfig, shard: int) -> None:
        self._config, self._index = config, shard
        self._host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._device = _device(config)
        torch.set_num_threads(max(1, round(config.num_cpus_per_shard)))
        self._store: GroupStore | None = None
        self._steps = Steps(shard, config.worker_timeout_s)
        self._files = ThreadPoolExecutor(max_workers=1, thread_name_prefix="files")
        self._snapshots: dict[str, Snapshot] = {}
        self._mappings = Mappings()
        self._incarnation = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"

    # Forming the group; called by the coordinator

    async def open_store(self, timeout_s: float) -> tuple[str, int]:
        """Host the rendezvous of the next generation; called on shard 0 alone."""
        self._store = GroupStore(self._host, timeout_s)
        return self._store.address

    async def join(
        self, generation: int, store_address: tuple[str, int], timeout_s: float, shards: Sequence[Any]
    ) -> str:
        """Leave the last group and form that of ``generation`` with all ``shards``; returns this incarnation."""
        if generation <= self._steps.generation:
            raise ServiceError(f"expected a generation after {self._steps.generation}, got {generation}")
        self._steps.leave_group([shard for index, shard in enumerate(shards) if index != self._index])
        self._steps.collective = await asyncio.get_running_loop().run_in_executor(
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

    async def generation(self) -> int:
        """The generation of a group that this shard can use; 0 if there is none."""
        collective = self._steps.collective
        return collective.generation if collective is not None and collective.is_open else 0

    # The job and its state; called by the coordinator

    async def kernel(self) -> Kernel:
        """How passes can run here."""
        kernel: Kernel = await self._steps.compute(lambda: resolve_kernel(self._config.kernel, self._device))
        return kernel

    async def compile(self, job: bytes) -> bytes:
        """Compile a job's kernels; returns their code, for the other shards. Called on shard 0 alone."""
        spec = unpack_job(job)

        def compile_kernels() -> bytes:
            warm_up(spec, self._device)
            return compiled_code()

        code: bytes = await self._steps.compute(compile_kernels)
        return code

    async def register(self, job: bytes, code: bytes) -> None:
        """Lay out a job and allocate its buffers; its kernels are compiled already, as ``code``."""
        spec = unpack_job(job)
        self._steps.shard = None  # else there would be memory for two

        def lay_out() -> Shard:
            take_compiled_code(code)
            warm_up(spec, self._device)
            return Shard(spec, shard=self._index, num_shards=self._config.num_shards, device=self._device)

        self._steps.shard = await self._steps.compute(lay_out)

    async def admit(self, rank: int, incarnation: str, holdings: bytes) -> None:
        """Let a worker's process push as ``rank``."""
        shard = self._steps.job()
        if shard.admit(rank, incarnation, unpack_holdings(holdings, shard.spec.params)):
            self._mappings.forget(rank)

    async def forget(self, rank: int) -> None:
        """Give up the memory of a worker that leaves; called by the worker."""
        self._mappings.forget(rank)

    async def set_workers(self, world_size: int, gradients: Gradients) -> None:
        """Change number and kind of the workers."""
        self._steps.job().set_workers(world_size, gradients)

    async def load(self, header: LoadHeader, timeline: int, *parts: WireValues) -> None:
        """Take a state that workers hold, a part each."""
        source = source_of(header, map(values_from_wire, parts))
        await self._steps.load(lambda: self._steps.job().load(source, timeline=timeline))

    async def prepare_extension(self, job: bytes, *parts: WireValues) -> None:
        """Make room for parameters that are added to the job."""
        spec, source = unpack_job(job), source_of(LoadHeader(), map(values_from_wire, parts))
        await self._steps.compute(lambda: self._steps.whole_job().prepare_extension(spec, source))

    async def adopt_extension(self, timeline: int) -> None:
        """Take what was prepared into the job."""
        self._steps.job().adopt_extension(timeline=timeline)
        self._steps.dismiss_pushes()

    async def verify(self, uri: str, manifest: bytes) -> None:
        """Read this shard's share of a checkpoint and compare it with its digests; steps go on."""

        def verify() -> None:
            with CheckpointReader(uri, Manifest.unpack(manifest, uri)) as reader:
                reader.require_intact(self._index, self._config.num_shards)

        await asyncio.get_running_loop().run_in_executor(None, verify)

    async def restore(self, uri: str, manifest: bytes, timeline: int) -> None:
        """Take the state of a checkpoint that all shards have verified."""

        def restore() -> None:
            with CheckpointReader(uri, Manifest.unpack(manifest, uri)) as reader:
                self._steps.job().load(reader.source(), timeline=timeline)

        await self._steps.load(restore)

    async def hold(self) -> int:
        """See :meth:`Steps.hold`."""
        return self._steps.hold()

    async def settle(self, sequence: int, timeout_s: float) -> ShardStatus:
        """See :meth:`Steps.settle`."""
        return await self._steps.settle(sequence, timeout_s)

    async def release(self) -> None:
        """See :meth:`Steps.release`."""
        self._steps.release()

    async def snapshot(self, save_id: str) -> ShardStatus:
        """Keep the state for :meth:`save`; the service is held meanwhile. Returns where the shard stands."""
        snapshot: Snapshot = await self._steps.compute(lambda: self._steps.whole_job().snapshot())
        self._snapshots[save_id] = snapshot
        return snapshot.status

    async def save(self, save_id: str, uri: str) -> ShardFile:
        """Write this shard's file of a checkpoint, the state that :meth:`snapshot` kept; steps go on."""
        if save_id not in self._snapshots:
            raise NotRegisteredError(f"shard {self._index} has nothing kept to write to {uri}; save again")
        loop, name = asyncio.get_running_loop(), self._file_name(save_id)
        try:
            return await loop.run_in_executor(self._files, write_shard, self._snapshots[save_id], uri, name)
        finally:
            self._snapshots.pop(save_id, None)

    async def give_up_save(self, save_id: str, uri: str) -> None:
        """Free what a save kept that another shard could not write, and remove this shard's file of it."""
        if save_id in self._snapshots:
            self._snapshots.pop(save_id).close("another shard could not write its part")
        loop, name = asyncio.get_running_loop(), self._file_name(save_id)
        await loop.run_in_executor(self._files, remove_file, uri, name)

    async def export(self) -> tuple[list[tuple[int, str, int, WireTensor]], ShardStatus]:
        """Every owned piece as (param, slot, offset, values), and where the shard stands."""

        def export() -> tuple[list[tuple[int, str, int, WireTensor]], ShardStatus]:
            shard = self._steps.whole_job()
            pieces = [(piece.param, slot, piece.offset, to_wire(v)) for slot, piece, v in shard.buffers.export()]
            return pieces, shard.status()

        exported: tuple[list[tuple[int, str, int, WireTensor]], ShardStatus] = await self._steps.compute(export)
        return exported

    async def status(self) -> ShardStatus | None:
        """Where the shard stands; None without a job."""
        return None if self._steps.shard is None else self._steps.shard.status()

    # One step; called by workers

    async def reach(self, node: str, target: bytes) -> str | None:
        """Whether a worker's memory can be mapped here: None, or why it cannot.

        Args:
            node: Ray's id of the worker's node.
            target: Some memory of the worker's, to try.
        """
        here: str = ray.get_runtime_context().get_node_id()
        placement = unpack_target(target).placement
        if node != here or placement is None:
            return "on another node"
        try:
            open_segment(placement.address)
        except SegmentError as error:
            return str(error)
        return None

    async def exchange(
        self, request: bytes, gradient: Sequence[WireTensor] = (), reloaded: Mapping[int, WireTensor] | None = None
    ) -> tuple[Outcome, list[WireTensor]]:
        """Check a push, keep it, and answer when its step is decided; see :meth:`Steps.take`.

        Args:
            request: The push's header, where its gradient lies and where the parameters go.
            gradient: The gradient, where it lies in no memory that can be mapped here.
            reloaded: Parameters that were changed by hand.

        Returns:
            The result, or in its place why the push was refused or what befell the step: as a value, since Ray prints
            raised errors that nobody has fetched. After a COMMIT the parameters, unless they went to mapped memory.
        """
        try:
            exchange = unpack_exchange(request)
            header, shard = unpack_push(exchange.push), self._steps.job()
            shard.require_sender(header)  # before anything is mapped for it
            parts = tuple(map(from_wire, gradient))
            if exchange.gradient is not None:
                parts = self._mappings.tensors(header.rank, "gradient", exchange.gradient)
            changed = {index: from_wire(wire) for index, wire in (reloaded or {}).items()}
            push = Push(header, parts, changed, self._sink(header.rank, exchange.target))
            result = await self._steps.take(push, exchange.timeout_s)
            is_wanted = result.decision is Decision.COMMIT and push.sink is None
            return result, self._parameters(header.rank, exchange.target) if is_wanted else []
        except StepwellError as error:
            return error, []

    async def decided(self, timeline: int, sequence: int, timeout_s: float) -> StepResult | None:
        """See :meth:`Steps.decided`."""
        return await self._steps.decided(timeline, sequence, timeout_s)

    async def parameters(self, rank: int, target: bytes) -> list[WireTensor]:
        """A rank's part of the owned parameters, flat, per extent; empty if they went to mapped memory.

        They are as of after a step or load that is under way.
        """
        wanted, shard = unpack_target(target), self._steps.job()
        shard.members.require_rank(rank)
        sink = self._sink(rank, wanted)

        def parameters() -> list[WireTensor]:
            if sink is None:
                return self._parameters(rank, wanted)
            self._steps.whole_job().deliver(rank, sink)
            return []

        parts: list[WireTensor] = await self._steps.compute(parameters)
        return parts

    async def attend(self, generation: int, vote: int) -> None:
        """Vote on a step that another shard waits in, whoever is missing here; called by that shard.

        So a worker that died before it had reached all shards stops none of them for good. A shard that is held, or at
        something else, votes when it is free.

        Args:
            generation: Of the group.
            vote: The group's how manieth, so that a call which comes late is not taken for one to the next try.
        """
        self._steps.attend(generation, vote)

    # Within

    def _file_name(self, save_id: str) -> str:
        return shard_file_name(save_id, self._index, self._config.num_shards)

    def _sink(self, rank: int, target: Target) -> Sink | None:
        if target.placement is None:
            return None
        return Sink(target.part, self._mappings.tensors(rank, "parameters", target.placement))

    def _parameters(self, rank: int, target: Target) -> list[WireTensor]:
        dtypes = [dtype_from_name(name) for name in target.dtypes]
        return [to_wire(part) for part in self._steps.whole_job().parameters(dtypes, rank, target.part)]


def _device(config: ServiceConfig) -> torch.device:
    if config.num_gpus_per_shard == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise PlacementError(
            "Ray placed this shard on a GPU, but torch finds no CUDA device there; install a CUDA build of torch"
        )
    return torch.device("cuda", 0)
