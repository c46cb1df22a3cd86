"""A shard as a Ray actor: an event loop that never blocks, and one thread for arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ray

from ..sharding.chronicle import Columns
from ..sharding.delivery import Sink
from ..sharding.errors import SegmentError, StepwellError
from ..sharding.layout import dtype_from_name
from ..sharding.push import Push
from ..sharding.reports import ShardStatus
from ..sharding.segments import open_segment
from ..sharding.vote import Decision
from .collective import Generation
from .keeper_line import Received
from .messages import Target, unpack_exchange, unpack_piece, unpack_push, unpack_target
from .outcomes import Outcome
from .succeeding_shard import SucceedingShard
from .wire import WireTensor, from_wire, to_wire


class ShardActor(SucceedingShard):
    """A coordinated shard with what workers call; see :class:`CoordinatedShard` for its arguments."""

    # Asked by anybody

    async def forget(self, rank: int) -> None:
        """Give up the memory of a worker that leaves; called by the worker."""
        self._mappings.forget(rank)
        self._ahead.forget(rank)

    async def export(self) -> tuple[list[tuple[int, str, int, WireTensor]], ShardStatus]:
        """Every owned piece as (param, slot, offset, values), and where the shard stands.

        Raises:
            ShardLostError: If a step rests, until lost shards are back.
        """

        def export() -> tuple[list[tuple[int, str, int, WireTensor]], ShardStatus]:
            shard = self._steps.whole_job()
            pieces = [(piece.param, slot, piece.offset, to_wire(v)) for slot, piece, v in shard.buffers.export()]
            return pieces, shard.status()

        exported: tuple[list[tuple[int, str, int, WireTensor]], ShardStatus] = await self._steps.read(export)
        return exported

    async def status(self) -> ShardStatus | None:
        """Where the shard stands; None without a job."""
        return None if self._steps.shard is None else self._steps.shard.status()

    async def chronicle(self, last: int | None) -> Columns:
        """The last rows of the run's history, None for all; empty without a job."""
        return {} if self._steps.shard is None else self._steps.shard.history.chronicle.columns(last)

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

    async def hold_piece(self, header: bytes, piece: WireTensor) -> StepwellError | None:
        """Hold a piece of a gradient for the exchange that will name it; an error as a value, as there."""
        try:
            self._ahead.hold(unpack_piece(header), piece, self._steps.job().members)
        except StepwellError as error:
            return error
        return None

    async def exchange(
        self, request: bytes, gradient: Sequence[WireTensor] = (), reloaded: Mapping[int, WireTensor] | None = None
    ) -> tuple[Outcome, list[WireTensor], int]:
        """Check a push, keep it, and answer when its step is decided; see :meth:`Steps.take`.

        Args:
            request: The push's header, where its gradient lies and where the parameters go.
            gradient: The gradient, where it lies in no memory that can be mapped here; without the pieces that came
                ahead of it.
            reloaded: Parameters that were changed by hand.

        Returns:
            The result, or in its place why the push was refused or what befell the step: as a value, since Ray prints
            raised errors that nobody has fetched. After a COMMIT the parameters, unless they went to mapped memory. The
            first step whose gradients must stay in their memory, as they would be needed if this shard were lost.
        """
        try:
            exchange = unpack_exchange(request)
            await self._steps.await_load(exchange.timeout_s)
            header, shard = unpack_push(exchange.push), self._steps.job()
            self._steps.require_reached(header.sequence)
            shard.require_sender(header)  # before anything is mapped for it
            gradient = self._ahead.merge(header.rank, exchange.ahead, gradient)
            parts = tuple(map(from_wire, gradient))
            if exchange.gradient is not None:
                parts = self._mappings.tensors(header.rank, "gradient", exchange.gradient)
            changed = {index: from_wire(wire) for index, wire in (reloaded or {}).items()}
            push = Push(header, parts, changed, self._sink(header.rank, exchange.target))
            received = Received(request, parts, exchange.gradient, reloaded or {})
            result = await self._steps.take(push, received, exchange.timeout_s)
            await self._redundancy.room(shard, exchange.timeout_s)
            is_wanted = result.decision is Decision.COMMIT and push.sink is None
            parameters = self._parameters(header.rank, exchange.target) if is_wanted else []
            return result, parameters, self._redundancy.kept_from(header.rank, header.sequence)
        except StepwellError as error:
            self._steps.tally.refuse()
            return error, [], 0

    async def decided(self, timeline: int, sequence: int, timeout_s: float) -> Outcome | None:
        """See :meth:`Steps.decided`; an error as a value, as in :meth:`exchange`."""
        try:
            await self._steps.await_load(timeout_s)
            return await self._steps.decided(timeline, sequence, timeout_s)
        except StepwellError as error:
            return error

    async def parameters(self, rank: int, target: bytes) -> list[WireTensor]:
        """A rank's part of the owned parameters, flat, per extent; empty if they went to mapped memory.

        They are as of after a step or load that is under way.

        Raises:
            ShardLostError: If a step rests, until lost shards are back.
        """
        wanted, shard = unpack_target(target), self._steps.job()
        shard.world.require(rank)
        sink = self._sink(rank, wanted)

        def parameters() -> list[WireTensor]:
            if sink is None:
                return self._parameters(rank, wanted)
            self._steps.whole_job().deliver(rank, sink)
            return []

        parts: list[WireTensor] = await self._steps.read(parameters)
        return parts

    async def attend(self, generation: Generation, vote: int) -> None:
        """Vote on a step that another shard waits in, whoever is missing here; called by that shard.

        So a worker that died before it had reached all shards stops none of them for good. A shard that is held, or at
        something else, votes when it is free.

        Args:
            generation: Of the group.
            vote: The group's how manieth, so that a call which comes late is not taken for one to the next try.
        """
        self._steps.attend(generation, vote)

    def _sink(self, rank: int, target: Target) -> Sink | None:
        if target.placement is None:
            return None
        return Sink(target.part, self._mappings.tensors(rank, "parameters", target.placement))

    def _parameters(self, rank: int, target: Target) -> list[WireTensor]:
        dtypes = [dtype_from_name(name) for name in target.dtypes]
        return [to_wire(part) for part in self._steps.whole_job().parameters(dtypes, rank, target.part)]
