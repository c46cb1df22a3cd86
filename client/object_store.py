"""Shards as Ray actors, reached from any node of the cluster.

A step is one call to each shard. Gradients and parameters lie in memory that worker and shard both have mapped, where
they are on one node; else they travel through Ray's object store, as flat numpy arrays.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import sys
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
import torch
from torch import Tensor

from ..server.calls import wait_for, wait_for_all
from ..server.config import COLLECTIVE_MARGIN_S
from ..server.messages import (
    Exchange,
    LoadHeader,
    PieceHeader,
    Registration,
    Target,
    pack_exchange,
    pack_holdings,
    pack_job,
    pack_piece,
    pack_push,
    pack_target,
)
from ..server.service import Service
from ..server.shards import STATE_TIMEOUT_S
from ..server.wire import WireTensor, from_wire, to_wire, values_to_wire
from ..sharding.coverage import Holdings
from ..sharding.errors import SegmentError, ServiceError, ShardLostError, ShardsMovedError, StepwellError
from ..sharding.job import JobSpec
from ..sharding.layout import Layout, dtype_name
from ..sharding.pieces import PieceValues
from ..sharding.push import PushHeader
from ..sharding.reports import ShardStatus, StepResult
from ..sharding.segments import Placement, allocate
from ..sharding.vote import Decision
from .flat import FlatBuffer, allocate_zeros
from .node_memory import NodeMemory
from .streaming import PieceStream
from .transport import Transport, join_pieces

logger = logging.getLogger("stepwell")

LEAVE_TIMEOUT_S = 15.0
RECOVERY_TIMEOUT_S = 300.0


class ObjectStoreTransport(Transport):
    """The line to a :class:`stepwell.Service`.

    Args:
        service: The service.
        owned: Whether closing ends the service: so for one that was embedded in this process.
    """

    def __init__(self, service: Service, *, owned: bool = False) -> None:
        self.service: Service = service
        self._shards = service.shards  # as this line knows them; the service's may be newer
        self._owned, self._is_closed, self._may_have_moved = owned, False, False
        self._step_timeout_s = service.config.worker_timeout_s + 2 * COLLECTIVE_MARGIN_S
        self.is_elastic = service.config.elastic
        self._memory = NodeMemory()
        self.recovery_timeout_s = RECOVERY_TIMEOUT_S if service.config.redundancy else 0.0
        self._stream: PieceStream | None = None
        self._placements: weakref.WeakKeyDictionary[FlatBuffer, list[Placement | None]] = weakref.WeakKeyDictionary()

    def register(self, spec: JobSpec, rank: int, incarnation: str, holdings: Holdings | None) -> Registration:
        """See :class:`Transport`."""
        self._incarnation = incarnation
        # Not left to the optimizer, which may be gone long before the process ends, while other ranks still train.
        atexit.register(self.close, rank, spec.world_size)
        packed = pack_job(spec), rank, incarnation, pack_holdings(holdings)
        return self._ask_where("register", *packed, what="the registration")

    def attach(self, layout: Layout, rank: int) -> None:
        """See :class:`Transport`."""
        self._layout, self._rank = layout, rank

    def allocate(self, sizes: Sequence[tuple[int, torch.dtype]], device: torch.device) -> list[Tensor]:
        """See :class:`Transport`; shared with the shards of this node.

        Raises:
            SegmentError: If there is not enough memory.
        """
        shared = self._memory.allocate(sizes, device)
        return allocate_zeros(sizes, device) if shared is None else shared

    def stream(self, gradient: FlatBuffer) -> PieceStream | None:
        """See :class:`Transport`."""
        self._stream = None
        if not all(self._memory.is_near):
            num_shards, is_near = len(self._shards), self._memory.is_near_now
            self._stream = PieceStream(self._layout, num_shards, gradient, is_near=is_near, send=self._send_piece)
        return self._stream

    def load(self, values: PieceValues, header: LoadHeader) -> Registration:
        """See :class:`Transport`."""
        return self._ask_where("load", _put(values), header, uuid.uuid4().hex, what="the shards to take the state")

    def hand_in(self, values: PieceValues) -> Registration:
        """See :class:`Transport`."""
        return self._ask_where("hand_in", self._rank, _put(values), what="all ranks to hand in their parameters")

    def extend(self, spec: JobSpec, holdings: Holdings | None, values: PieceValues) -> Registration:
        """See :class:`Transport`."""
        asked = pack_job(spec), self._rank, pack_holdings(holdings), _put(values)
        return self._ask_where("extend", *asked, what="all ranks to add a parameter group")

    def wait_until_loaded(self, after_timeline: int) -> Registration:
        """See :class:`Transport`."""
        timeout_s = self.service.config.worker_timeout_s
        return self._ask_where("wait_for_timeline", after_timeline, timeout_s, what="rank 0 to load its state")

    def refresh(self, rank: int, incarnation: str) -> Registration:
        """See :class:`Transport`."""
        return self._ask_where("refresh", rank, incarnation, what="the coordinator")

    def step(
        self, header: PushHeader, gradient: FlatBuffer, reloaded: Mapping[int, Tensor], params: FlatBuffer
    ) -> StepResult:
        """See :class:`Transport`."""
        self._look_again()
        changed = {index: to_wire(value) for index, value in reloaded.items()}
        try:
            replies = self._exchange(header, gradient, changed, params)
        except SegmentError:
            # It may have been brought back on another node since this process looked; the others know a repeat.
            before = list(self._memory.is_near)
            self._look_around()
            if self._memory.is_near == before:
                raise
            replies = self._exchange(header, gradient, changed, params)
        except ShardLostError as error:
            if self._have_moved():
                raise ShardsMovedError(
                    f"step {header.sequence} went to shards whose place others have taken"
                ) from error
            raise
        for reply, _, _ in replies:
            if reply.error is not None:
                raise reply.error
        result: StepResult = replies[0][0]
        if result.decision is Decision.COMMIT:
            self._fill(params, [parts for _, parts, _ in replies])
        self.kept_from = min((kept_from for _, _, kept_from in replies), default=sys.maxsize)
        return result

    def _exchange(
        self, header: PushHeader, gradient: FlatBuffer, changed: Mapping[int, WireTensor], params: FlatBuffer
    ) -> list[tuple[Any, list[WireTensor], int]]:
        """Push to every shard; what each of them replies."""
        push, calls = pack_push(header), []
        self._await_pieces(header.sequence)
        for index, shard in enumerate(self._shards):
            place, target = self._placement(gradient, index), self._target(params, index)
            ahead, parts = ((), []) if place is not None else self._left_to_send(gradient, index)
            request = pack_exchange(Exchange(push, place, target, self._step_timeout_s, ahead))
            # Nothing but the request in the common case: each argument more costs Ray time.
            wires = list(map(to_wire, parts))
            calls.append(shard.exchange.remote(request, *([wires, changed] if wires or changed else [])))
        limit_s = self._step_timeout_s + COLLECTIVE_MARGIN_S
        return wait_for_all(calls, refusal=_refusal, timeout_s=limit_s, what=f"step {header.sequence}")

    def _await_pieces(self, sequence: int) -> None:
        """Wait until the shards have what was sent ahead: what is named in a push and is not there then is lost."""
        if self._stream is not None:
            what = f"the shards to take the gradient of step {sequence}"
            for error in self._wait(self._stream.finish(self._step_timeout_s, what=what), what=what):
                if error is not None:
                    raise error

    def _send_piece(self, shard: int, piece: int, serial: int, values: Tensor) -> Any:
        """See :data:`Send`."""
        header = pack_piece(PieceHeader(self._rank, self._incarnation, piece, serial))
        return self._shards[shard].hold_piece.remote(header, to_wire(values))

    def _left_to_send(self, gradient: FlatBuffer, shard: int) -> tuple[tuple[int, ...], list[Tensor]]:
        """What of a gradient goes with its push, and :attr:`Exchange.ahead`."""
        ahead, left = ((), []) if self._stream is None else self._stream.ahead_of(shard)
        return (ahead, left) if any(ahead) else ((), self._parts(gradient, shard))

    def decided(self, timeline: int, sequence: int) -> StepResult | None:
        """See :class:`Transport`."""
        results, taken = self._ask_decided(timeline, sequence)
        if 0 < len(taken) < len(results):
            # Some were asked just before the last push reached them. A step that is taken has begun on all of them, so
            # that now they wait for it too.
            results, taken = self._ask_decided(timeline, sequence)
        if 0 < len(taken) < len(results):
            raise ShardLostError(
                f"step {sequence} was taken by {len(taken)} of {len(results)} shards; the others failed in it. "
                "Restore the service from its last checkpoint with service.restore(URI), then call refresh()"
            )
        return taken[0] if taken else None

    def _ask_decided(self, timeline: int, sequence: int) -> tuple[list[StepResult | None], list[StepResult]]:
        """What each shard says of a step, and what those say that took it."""
        outcomes: list[StepResult | StepwellError | None] = self._ask_shards(
            lambda _, shard: shard.decided.remote(timeline, sequence, self._step_timeout_s),
            what=f"the result of step {sequence}",
        )
        results = []
        for outcome in outcomes:
            # From one that was a shard when this process looked, and is a spare now.
            if isinstance(outcome, ShardLostError) and self._have_moved():
                return self._ask_decided(timeline, sequence)
            if isinstance(outcome, StepwellError):
                raise outcome
            results.append(outcome)
        return results, [result for result in results if result is not None and result.decision is not Decision.ABORT]

    def read_parameters(self, params: FlatBuffer) -> None:
        """See :class:`Transport`."""
        self._look_again()
        replies = self._ask_shards(
            lambda index, shard: shard.parameters.remote(self._rank, pack_target(self._target(params, index))),
            what="the parameters",
        )
        self._fill(params, replies)

    def read_state(self) -> tuple[dict[tuple[int, str], Tensor], ShardStatus]:
        """See :class:`Transport`."""
        replies = self._ask_shards(lambda _, shard: shard.export.remote(), what="the state")
        pieces = [
            (param, slot, offset, from_wire(wire)) for exported, _ in replies for param, slot, offset, wire in exported
        ]
        return join_pieces(pieces), replies[0][1]

    def close(self, rank: int, world_size: int) -> None:
        """See :class:`Transport`. Who owns the service waits a while for the other ranks before ending it."""
        atexit.unregister(self.close)
        if self._is_closed or not ray.is_initialized():
            return
        self._is_closed = True
        with contextlib.suppress(ServiceError):  # who is gone already needs no goodbye
            if self._owned:
                others = [other for other in range(world_size) if other != rank]
                limits = {"timeout_s": 2 * LEAVE_TIMEOUT_S}
                self.service.ask("wait_until_left", others, LEAVE_TIMEOUT_S, what="the other ranks", **limits)
            else:
                self.service.ask("leave", rank, self._incarnation, what="the coordinator", timeout_s=LEAVE_TIMEOUT_S)
                calls = [shard.forget.remote(rank) for shard in self._shards]
                wait_for(calls, timeout_s=LEAVE_TIMEOUT_S, what="the shards to forget this worker")
        if self._owned:
            self.service.shutdown()

    def _fill(self, params: FlatBuffer, replies: Sequence[Sequence[Any]]) -> None:
        """Take what shards sent; those that write to this worker's memory have sent nothing."""
        for index, parts in enumerate(replies):
            if self._placement(params, index) is None:
                for target, wire in zip(self._parts(params, index), parts, strict=True):
                    target.copy_(from_wire(wire))

    def _parts(self, buffer: FlatBuffer, shard: int) -> list[Tensor]:
        return buffer.shard_parts(self._layout, shard, len(self._shards))

    def _placement(self, buffer: FlatBuffer, shard: int) -> Placement | None:
        """Where a shard finds its part of a buffer; None if it has to travel."""
        if not self._memory.is_near[shard]:
            return None
        if buffer not in self._placements:
            shards = range(len(self._shards))
            self._placements[buffer] = [self._memory.placement(self._parts(buffer, index)) for index in shards]
        return self._placements[buffer][shard]

    def _target(self, params: FlatBuffer, shard: int) -> Target:
        dtypes = tuple(dtype_name(part.dtype) for part in params.parts)
        return Target(params.part, dtypes, self._placement(params, shard))

    def _look_again(self) -> None:
        """Look around, if a shard was lost since, as it may come back on another node."""
        if self._may_have_moved:
            self._look_around()
            self._may_have_moved = False

    def _look_around(self) -> None:
        """Find out which shards can map this process's memory; a restarted one may be on another node."""
        try:
            self._take_up(self._shards)
        except ShardLostError:
            if not self._have_moved():
                raise

    def _take_up(self, shards: list[Any]) -> None:
        """Call these shards from now on, once they have said whether they can map this process's memory."""
        try:
            segment, _ = allocate([])
        except SegmentError as error:
            why_not: list[str | None] = [str(error)] * len(shards)
        else:
            node: str = ray.get_runtime_context().get_node_id()
            probe = pack_target(Target("held", (), Placement(segment.address, ())))
            calls = [shard.reach.remote(node, probe) for shard in shards]
            why_not = self._wait(calls, what="the shards to look for shared memory")
        if self._stream is not None:
            self._stream.turn_to(len(shards), self._step_timeout_s)
        self._memory.note(why_not)
        self._shards = shards
        self._placements.clear()

    def _wait(self, calls: Sequence[Any], *, what: str) -> list[Any]:
        return wait_for(calls, timeout_s=self._step_timeout_s + COLLECTIVE_MARGIN_S, what=what)

    def _ask_shards(self, call: Callable[[int, Any], Any], *, what: str) -> list[Any]:
        """Call all shards, ``call(index, shard)``, and wait; anew if others have taken their place."""
        while True:
            calls = [call(index, shard) for index, shard in enumerate(self._shards)]
            try:
                return self._wait(calls, what=what)
            except ShardLostError:
                if not self._have_moved():
                    raise

    def _have_moved(self) -> bool:
        """After shards were lost: whether others have taken their place, which are called from now on.

        Else they may come back on another node.
        """
        found = self.service.find_shards()
        if found == self._shards:
            self._may_have_moved = True
            return False
        self._take_up(found)
        logger.warning("service %r: going on with %d other shards", self.service.name, len(found))
        return True

    def _ask_where(self, method: str, *args: Any, what: str) -> Registration:
        # Longer than the coordinator itself waits for other ranks, as it can name them.
        timeout_s = STATE_TIMEOUT_S + self.service.config.worker_timeout_s
        registration: Registration = self.service.ask(method, *args, what=what, timeout_s=timeout_s)
        self._look_around()
        return registration


def _put(values: PieceValues) -> list[Any]:
    """A reference to the values, in a list so that Ray hands it on as it is; empty for none."""
    return [ray.put(values_to_wire(values))] if values else []


def _refusal(reply: tuple[StepResult | StepwellError, Any, int]) -> StepwellError | None:
    """Why a shard refused a push, if it did."""
    return reply[0] if isinstance(reply[0], StepwellError) else None
