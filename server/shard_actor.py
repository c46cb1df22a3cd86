"""A shard as a Ray actor: an event loop that never blocks, and one thread for arithmetic."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
import torch

from ..sharding.checkpoint import CheckpointReader, ShardFile, read_manifest, shard_file_name, write_shard
from ..sharding.compiling import Kernel, resolve_kernel
from ..sharding.coverage import Gradients, Part
from ..sharding.errors import (
    NotRegisteredError,
    PlacementError,
    ServiceError,
    ServiceTimeoutError,
    StepwellError,
    TimelineError,
)
from ..sharding.layout import dtype_from_name
from ..sharding.push import Push
from ..sharding.reports import Receipt, ShardStatus, StepResult
from ..sharding.shard import Shard
from ..sharding.vote import Decision
from ..sharding.warm_up import warm_up
from .collective import Collective, GroupStore, drive
from .config import COLLECTIVE_MARGIN_S, ServiceConfig
from .messages import (
    LoadHeader,
    WireTensor,
    WireValues,
    from_wire,
    source_of,
    to_wire,
    unpack_holdings,
    unpack_job,
    unpack_push,
    values_from_wire,
)
from .outcomes import Outcome, Outcomes, PushKey


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
        self._shard: Shard | None = None
        self._store: GroupStore | None = None
        self._collective: Collective | None = None
        self._peers: list[Any] = []
        self._data = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._step: asyncio.Task[None] | None = None
        self._sequence_of_step = 0
        self._is_loading = False
        self._outcomes = Outcomes()
        self._patience: asyncio.TimerHandle | None = None
        self._held_after: int | None = None
        self._num_votes = 0
        self._attended: tuple[int, int] | None = None
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
        if self._collective is not None:
            if generation <= self._collective.generation:
                raise ServiceError(f"expected a generation after {self._collective.generation}, got {generation}")
            self._collective.close()
        self._num_votes, self._attended = 0, None
        self._peers = [shard for index, shard in enumerate(shards) if index != self._index]
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

    async def generation(self) -> int:
        """The generation of a group that this shard can use; 0 if there is none."""
        return self._generation if self._collective is not None and self._collective.is_open else 0

    # The job and its state; called by the coordinator

    async def kernel(self) -> Kernel:
        """How passes can run here."""
        kernel: Kernel = await self._compute(lambda: resolve_kernel(self._config.kernel, self._device))
        return kernel

    async def register(self, job: bytes) -> None:
        """Lay out a job, allocate its buffers and compile its kernels."""
        spec = unpack_job(job)
        self._shard = None  # else there would be memory for two

        def lay_out() -> Shard:
            warm_up(spec, self._device)
            return Shard(spec, shard=self._index, num_shards=self._config.num_shards, device=self._device)

        self._shard = await self._compute(lay_out)

    async def admit(self, rank: int, incarnation: str, holdings: bytes) -> None:
        """Let a worker's process push as ``rank``."""
        shard = self._job()
        shard.admit(rank, incarnation, unpack_holdings(holdings, shard.spec.params))

    async def set_workers(self, world_size: int, gradients: Gradients) -> None:
        """Change number and kind of the workers."""
        self._job().set_workers(world_size, gradients)

    async def load(self, header: LoadHeader, timeline: int, *parts: WireValues) -> None:
        """Take a state that workers hold, a part each."""
        source = source_of(header, map(values_from_wire, parts))
        await self._load(lambda: self._job().load(source, timeline=timeline))

    async def prepare_extension(self, job: bytes, *parts: WireValues) -> None:
        """Make room for parameters that are added to the job."""
        spec, source = unpack_job(job), source_of(LoadHeader(), map(values_from_wire, parts))
        await self._compute(lambda: self._whole_job().prepare_extension(spec, source))

    async def adopt_extension(self, timeline: int) -> None:
        """Take what was prepared into the job."""
        self._job().adopt_extension(timeline=timeline)
        self._dismiss_pushes()

    async def restore(self, uri: str, timeline: int) -> None:
        """Take the state of a checkpoint."""

        def restore() -> None:
            with CheckpointReader(uri, read_manifest(uri)) as reader:
                self._job().load(reader.source(), timeline=timeline)

        await self._load(restore)

    async def hold(self) -> int:
        """Begin no step after the one that is under way; returns the step to wait for, see :meth:`settle`."""
        sequence = 0 if self._shard is None else self._shard.sequence
        # Not one more than `sequence`: the other thread may have counted the step before its task has ended here.
        self._held_after = self._sequence_of_step if self._is_stepping else sequence
        return self._held_after

    async def settle(self, sequence: int, timeout_s: float) -> ShardStatus:
        """Run steps up to ``sequence``, no further, and wait for them; returns where the shard stands then.

        A step that is given up counts as done.
        """
        self._held_after = sequence
        deadline = asyncio.get_running_loop().time() + timeout_s
        self._start_if_complete()
        while self._whole_job().sequence < sequence or self._is_stepping:
            left = deadline - asyncio.get_running_loop().time()
            outcome = await self._wait(self._outcomes.first, sequence, max(left, 0.001))
            if outcome.decision is Decision.ABORT:
                self._held_after = self._whole_job().sequence
                break
        return self._whole_job().status()

    async def release(self) -> None:
        """Go on with steps after a :meth:`hold`."""
        self._held_after = None
        self._start_if_complete()

    async def save(self, uri: str, save_id: str) -> ShardFile:
        """Write this shard's file of a checkpoint; the service is held meanwhile."""
        name = shard_file_name(save_id, self._index, self._config.num_shards)
        file: ShardFile = await self._compute(lambda: write_shard(self._whole_job().buffers, uri, name))
        return file

    async def export(self) -> tuple[list[tuple[int, str, int, WireTensor]], ShardStatus]:
        """Every owned piece as (param, slot, offset, values), and where the shard stands."""

        def export() -> tuple[list[tuple[int, str, int, WireTensor]], ShardStatus]:
            shard = self._whole_job()
            pieces = [(piece.param, slot, piece.offset, to_wire(v)) for slot, piece, v in shard.buffers.export()]
            return pieces, shard.status()

        exported: tuple[list[tuple[int, str, int, WireTensor]], ShardStatus] = await self._compute(export)
        return exported

    async def status(self) -> ShardStatus | None:
        """Where the shard stands; None without a job."""
        return None if self._shard is None else self._shard.status()

    # One step; called by workers

    async def push(
        self, request: bytes, gradient: Sequence[WireTensor], reloaded: Mapping[int, WireTensor] | None = None
    ) -> str | StepwellError:
        """Check a push, keep it and acknowledge it at once; start the step when it is complete.

        Returns:
            What became of it, or why it was refused. As a value: Ray prints raised errors that nobody has fetched.
        """
        try:
            return self._receive(request, gradient, reloaded or {}).value
        except StepwellError as error:
            return error

    async def pull(
        self,
        timeline: int,
        sequence: int,
        rank: int,
        incarnation: str,
        attempt: int,
        dtypes: Sequence[str],
        wanted: Part,
        timeout_s: float,
    ) -> tuple[Outcome, list[WireTensor]]:
        """Wait for the decision of step ``sequence``; its result and, after a COMMIT, the owned parameters.

        May come before the push that it belongs to, or after the decision.

        Returns:
            In place of the result an error, as for :meth:`push`: SequenceError, if it is not the last step or the next
            one or the service was restored meanwhile; AttemptError or IncarnationError, if the step was taken with
            another push of this rank; ServiceTimeoutError; ShardLostError, if another shard was lost.
        """
        try:
            result = await self._result((timeline, sequence, incarnation, attempt), rank, timeout_s)
            return result, self._parameters(dtypes, rank, wanted) if result.decision is Decision.COMMIT else []
        except StepwellError as error:
            return error, []

    async def decided(self, timeline: int, sequence: int, timeout_s: float) -> StepResult | None:
        """The result of step ``sequence`` if it was taken; waits for one that is under way, for no other."""
        if self._is_stepping:
            await self._wait(self._outcomes.first, sequence, timeout_s)
        return self._job().result(timeline, sequence)

    async def parameters(self, dtypes: Sequence[str], rank: int, wanted: Part) -> list[WireTensor]:
        """A rank's part of the owned parameters, flat, per extent, in the wanted dtypes.

        They are as of after a step or load that is under way.
        """
        parts: list[WireTensor] = await self._compute(lambda: self._parameters(dtypes, rank, wanted))
        return parts

    async def attend(self, generation: int, vote: int) -> None:
        """Vote on a step that another shard waits in, whoever is missing here; called by that shard.

        So a worker that died before it had reached all shards stops none of them for good. A shard that is held, or at
        something else, votes when it is free.

        Args:
            generation: Of the group.
            vote: The group's how manieth, so that a call which comes late is not taken for one to the next try.
        """
        self._attended = generation, vote
        self._start_if_complete()

    # Within

    def _parameters(self, dtypes: Sequence[str], rank: int, wanted: Part) -> list[WireTensor]:
        parts = self._whole_job().parameters([dtype_from_name(name) for name in dtypes], rank, wanted)
        return [to_wire(part) for part in parts]

    def _receive(self, request: bytes, gradient: Sequence[WireTensor], reloaded: Mapping[int, WireTensor]) -> Receipt:
        header = unpack_push(request)
        parts = tuple(from_wire(wire) for wire in gradient)
        changed = {index: from_wire(wire) for index, wire in reloaded.items()}
        receipt = self._job().receive(Push(header, parts, changed))
        if receipt is not Receipt.DECIDED:
            key = (header.timeline, header.sequence, header.incarnation, header.attempt)
            self._outcomes.promise(header.rank, key)
        if receipt is Receipt.COMPLETE:
            self._start_if_complete()
        elif receipt is Receipt.WAITING:
            self._wait_for_missing()
        return receipt

    async def _result(self, key: PushKey, rank: int, timeout_s: float) -> StepResult:
        timeline, sequence, incarnation, attempt = key
        result = self._job().result(timeline, sequence)
        outcome = self._outcomes.of_push(rank, key)
        if outcome is not None:
            # Not `result`, which the other thread may have left there before the step's task has ended here.
            result = await self._wait(outcome, sequence, timeout_s)
        elif result is None:
            result = await self._wait(self._outcomes.next, sequence, timeout_s)
        if result.decision is not Decision.ABORT:
            self._job().require_taken(rank, incarnation, attempt)
        return result

    def _job(self) -> Shard:
        if self._shard is None:
            raise NotRegisteredError(
                f"shard {self._index} holds no job; it may have been restarted. "
                "Register the job, or restore its last checkpoint."
            )
        return self._shard

    def _whole_job(self) -> Shard:
        """As :meth:`_job`, for who reads slots: refuses if a step or a load was cut off in the middle of them."""
        shard = self._job()
        shard.result(shard.timeline, shard.sequence)
        return shard

    @property
    def _generation(self) -> int:
        return 0 if self._collective is None else self._collective.generation

    @property
    def _is_stepping(self) -> bool:
        return self._step is not None and not self._step.done()

    async def _load(self, load: Callable[[], None]) -> None:
        """Take a state; no step begins before it is there."""
        self._is_loading = True
        try:
            await self._compute(load)
        finally:
            self._is_loading = False
            if not self._job().is_waiting:
                self._dismiss_pushes()
            self._start_if_complete()

    async def _compute(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._data, work)

    async def _wait(self, outcome: asyncio.Future[Outcome], sequence: int, timeout_s: float) -> StepResult:
        try:
            result = await asyncio.wait_for(asyncio.shield(outcome), timeout_s)
        except TimeoutError as error:
            missing = self._job().missing_ranks
            raise ServiceTimeoutError(
                f"shard {self._index}: step {sequence} was not decided within {timeout_s:g} s; "
                f"missing ranks: {missing or 'none, the shards are still at it'}"
            ) from error
        if isinstance(result, StepwellError):
            raise result
        return result

    def _dismiss_pushes(self) -> None:
        """Tell the senders of pushes that a new timeline has swept away."""
        self._stop_waiting_for_missing()
        self._outcomes.dismiss(
            TimelineError(
                "the service was restored or loaded before this step began. "
                "Call refresh() on every rank to take over its parameters and step number."
            )
        )

    def _wait_for_missing(self) -> None:
        if self._patience is None:
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(self._config.worker_timeout_s, self._give_up)

    def _stop_waiting_for_missing(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
        self._patience = None

    def _give_up(self) -> None:
        """Vote the step down if it still lacks a rank when its time is over."""
        self._patience = None
        shard = self._shard
        if shard is not None and shard.is_waiting:
            if self._may_start(shard):
                self._start(shard)
            else:
                self._wait_for_missing()

    def _start_if_complete(self) -> None:
        shard = self._shard
        if shard is not None and self._is_free(shard):
            is_complete = shard.is_waiting and not shard.missing_ranks
            if is_complete or self._attended == (self._generation, self._num_votes + 1):
                self._start(shard)

    def _may_start(self, shard: Shard) -> bool:
        return shard.is_waiting and self._is_free(shard)

    def _is_free(self, shard: Shard) -> bool:
        is_held = self._held_after is not None and shard.sequence >= self._held_after
        return not (self._is_stepping or self._is_loading or is_held)

    def _start(self, shard: Shard) -> None:
        self._stop_waiting_for_missing()
        self._num_votes += 1
        told = self._outcomes.begin()
        self._sequence_of_step = shard.sequence + 1
        shard.begin()
        self._step = asyncio.get_running_loop().create_task(self._run_step(shard, told))

    async def _run_step(self, shard: Shard, told: asyncio.Future[Outcome]) -> None:
        loop = asyncio.get_running_loop()
        calling = loop.call_later(self._config.worker_timeout_s, self._call_peers, self._generation, self._num_votes)
        outcome: Outcome = ServiceError(f"shard {self._index} failed in a step; its log has the traceback")
        try:
            outcome = await self._compute(lambda: drive(shard.step(), self._collective))
        except ServiceError as error:
            outcome = error
        finally:
            calling.cancel()
            told.set_result(outcome)
            # The next step's pushes may have come in already.
            loop.call_soon(self._start_if_complete)

    def _call_peers(self, generation: int, vote: int) -> None:
        for peer in self._peers:
            peer.attend.remote(generation, vote)


def _device(config: ServiceConfig) -> torch.device:
    if config.num_gpus_per_shard == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise PlacementError(
            "Ray placed this shard on a GPU, but torch finds no CUDA device there; install a CUDA build of torch"
        )
    return torch.device("cuda", 0)
