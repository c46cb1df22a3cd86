"""Shards as Ray actors, reached from any node of the cluster through Ray's object store, with flat numpy arrays."""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from torch import Tensor

from ..server.calls import wait_for
from ..server.config import COLLECTIVE_MARGIN_S
from ..server.messages import (
    LoadHeader,
    Registration,
    from_wire,
    pack_holdings,
    pack_job,
    pack_push,
    to_wire,
    values_to_wire,
)
from ..server.service import Service
from ..sharding.coverage import Holdings
from ..sharding.errors import ServiceError, ShardLostError, StepwellError
from ..sharding.job import JobSpec
from ..sharding.layout import Layout, dtype_name
from ..sharding.pieces import PieceValues
from ..sharding.push import PushHeader
from ..sharding.reports import ShardStatus, StepResult
from ..sharding.vote import Decision
from .flat import FlatBuffer
from .transport import Transport, join_pieces

STATE_TIMEOUT_S = 1800.0
LEAVE_TIMEOUT_S = 15.0


class ObjectStoreTransport(Transport):
    """The line to a :class:`stepwell.Service`.

    Args:
        service: The service.
        owned: Whether closing ends the service: so for one that was embedded in this process.
    """

    def __init__(self, service: Service, *, owned: bool = False) -> None:
        self.service: Service = service
        self._owned, self._is_closed = owned, False
        self._step_timeout_s = service.config.worker_timeout_s + 2 * COLLECTIVE_MARGIN_S

    def register(self, spec: JobSpec, rank: int, incarnation: str, holdings: Holdings | None) -> Registration:
        """See :class:`Transport`."""
        # Not left to the optimizer, which may be gone long before the process ends, while other ranks still train.
        atexit.register(self.close, rank, spec.world_size)
        packed = pack_job(spec), rank, incarnation, pack_holdings(holdings)
        return self._ask_where("register", *packed, what="the registration")

    def attach(self, layout: Layout, rank: int) -> None:
        """See :class:`Transport`."""
        self._layout, self._rank = layout, rank

    def load(self, values: PieceValues, header: LoadHeader) -> Registration:
        """See :class:`Transport`."""
        return self._ask_where("load", _put(values), header, what="the shards to take the state")

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

    def refresh(self) -> Registration:
        """See :class:`Transport`."""
        return self._ask_where("refresh", what="the coordinator")

    def step(
        self, header: PushHeader, gradient: FlatBuffer, reloaded: Mapping[int, Tensor], params: FlatBuffer
    ) -> StepResult:
        """See :class:`Transport`."""
        shards, request = self.service.shards, pack_push(header)
        changed = {index: to_wire(value) for index, value in reloaded.items()}
        dtypes = [dtype_name(part.dtype) for part in params.parts]
        pushes, pulls = [], []
        for index, shard in enumerate(shards):
            parts = gradient.shard_parts(self._layout, index, len(shards))
            pushes.append(shard.push.remote(request, [to_wire(part) for part in parts], changed))
            pulls.append(
                shard.pull.remote(
                    header.timeline,
                    header.sequence,
                    header.rank,
                    header.incarnation,
                    header.attempt,
                    dtypes,
                    params.part,
                    self._step_timeout_s,
                )
            )
        try:
            _require_none(
                wait_for(
                    pushes, timeout_s=STATE_TIMEOUT_S, what=f"the shards to take the push of step {header.sequence}"
                )
            )
        except StepwellError:
            for pull in pulls:
                ray.cancel(pull)
            raise
        replies = self._wait(pulls, what=f"step {header.sequence}")
        _require_none([reply for reply, _ in replies])
        _require_none([reply.error for reply, _ in replies])
        result: StepResult = replies[0][0]
        if result.decision is Decision.COMMIT:
            self._fill(params, [parts for _, parts in replies])
        return result

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
        calls = [shard.decided.remote(timeline, sequence, self._step_timeout_s) for shard in self.service.shards]
        results: list[StepResult | None] = self._wait(calls, what=f"the result of step {sequence}")
        return results, [result for result in results if result is not None and result.decision is not Decision.ABORT]

    def read_parameters(self, params: FlatBuffer) -> None:
        """See :class:`Transport`."""
        dtypes = [dtype_name(part.dtype) for part in params.parts]
        calls = [shard.parameters.remote(dtypes, self._rank, params.part) for shard in self.service.shards]
        self._fill(params, self._wait(calls, what="the parameters"))

    def read_state(self) -> tuple[dict[tuple[int, str], Tensor], ShardStatus]:
        """See :class:`Transport`."""
        replies = self._wait([shard.export.remote() for shard in self.service.shards], what="the state")
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
                self._ask("wait_until_left", others, LEAVE_TIMEOUT_S, what="the other ranks")
            else:
                self._ask("leave", rank, what="the coordinator")
        if self._owned:
            self.service.shutdown()

    def _fill(self, params: FlatBuffer, replies: Sequence[Sequence[Any]]) -> None:
        for index, parts in enumerate(replies):
            targets = params.shard_parts(self._layout, index, len(replies))
            for target, wire in zip(targets, parts, strict=True):
                target.copy_(from_wire(wire))

    def _wait(self, calls: Sequence[Any], *, what: str) -> list[Any]:
        return wait_for(calls, timeout_s=self._step_timeout_s + COLLECTIVE_MARGIN_S, what=what)

    def _ask_where(self, method: str, *args: Any, what: str) -> Registration:
        registration: Registration = self._ask(method, *args, what=what)
        return registration

    def _ask(self, method: str, *args: Any, what: str) -> Any:
        call = getattr(self.service.coordinator, method).remote(*args)
        # Longer than the coordinator itself waits for other ranks, as it can name them.
        timeout_s = STATE_TIMEOUT_S + self.service.config.worker_timeout_s
        return wait_for([call], timeout_s=timeout_s, what=f"service {self.service.name!r}: {what}")[0]


def _put(values: PieceValues) -> list[Any]:
    """A reference to the values, in a list so that Ray hands it on as it is; empty for none."""
    return [ray.put(values_to_wire(values))] if values else []


def _require_none(replies: Sequence[Any]) -> None:
    """Raise the first error among the shards' replies."""
    for reply in replies:
        if isinstance(reply, StepwellError):
            raise reply
