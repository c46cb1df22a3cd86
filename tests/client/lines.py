"""Transports for tests: one that fails as declared, and one that many workers of this process share."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar
from unittest import mock

from torch import Tensor

from stepwell.client.flat import FlatBuffer
from stepwell.client.inprocess import InProcessService, InProcessTransport
from stepwell.client.transport import Transport
from stepwell.server.messages import LoadHeader, Registration
from stepwell.sharding.coverage import Holdings
from stepwell.sharding.errors import ServiceTimeoutError, StepAbortedError
from stepwell.sharding.inprocess import ShardGroup
from stepwell.sharding.job import JobSpec
from stepwell.sharding.layout import Layout
from stepwell.sharding.pieces import PieceValues
from stepwell.sharding.push import Push, PushHeader
from stepwell.sharding.reports import ShardStatus, StepResult
from stepwell.sharding.vote import Decision

WAIT_S = 30.0

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Fault:
    """The ``call``-th call (from 1) of ``method`` raises ``error``, before or after it has done its work."""

    method: str
    call: int
    when: Literal["before", "after"]
    error: BaseException


class FaultyTransport(Transport):
    """A transport with declared faults.

    Args:
        inner: Does the work.
        faults: What goes wrong.

    Attributes:
        headers: Of every push that was tried.
        reloaded: Parameter indices that each of them carried.
    """

    def __init__(self, inner: Transport, *faults: Fault) -> None:
        self.service, self.reads_in_place = inner.service, inner.reads_in_place
        self._inner, self._faults = inner, faults
        self._num_calls: dict[str, int] = {}
        self.headers: list[PushHeader] = []
        self.reloaded: list[set[int]] = []

    def register(self, spec: JobSpec, rank: int, incarnation: str, holdings: Holdings | None) -> Registration:
        return self._run("register", lambda: self._inner.register(spec, rank, incarnation, holdings))

    def attach(self, layout: Layout, rank: int) -> None:
        self._inner.attach(layout, rank)

    def load(self, values: PieceValues, header: LoadHeader) -> Registration:
        return self._run("load", lambda: self._inner.load(values, header))

    def hand_in(self, values: PieceValues) -> Registration:
        return self._run("hand_in", lambda: self._inner.hand_in(values))

    def extend(self, spec: JobSpec, holdings: Holdings | None, values: PieceValues) -> Registration:
        return self._run("extend", lambda: self._inner.extend(spec, holdings, values))

    def wait_until_loaded(self, after_timeline: int) -> Registration:
        return self._run("wait_until_loaded", lambda: self._inner.wait_until_loaded(after_timeline))

    def refresh(self, rank: int, incarnation: str) -> Registration:
        return self._run("refresh", lambda: self._inner.refresh(rank, incarnation))

    def step(
        self, header: PushHeader, gradient: FlatBuffer, reloaded: Mapping[int, Tensor], params: FlatBuffer
    ) -> StepResult:
        self.headers.append(header)
        self.reloaded.append(set(reloaded))
        return self._run("step", lambda: self._inner.step(header, gradient, reloaded, params))

    def decided(self, timeline: int, sequence: int) -> StepResult | None:
        return self._run("decided", lambda: self._inner.decided(timeline, sequence))

    def read_parameters(self, params: FlatBuffer) -> None:
        self._run("read_parameters", lambda: self._inner.read_parameters(params))

    def read_state(self) -> tuple[dict[tuple[int, str], Tensor], ShardStatus]:
        return self._run("read_state", self._inner.read_state)

    def close(self, rank: int, world_size: int) -> None:
        self._inner.close(rank, world_size)

    def _run(self, method: str, work: Callable[[], T]) -> T:
        number = self._num_calls[method] = self._num_calls.get(method, 0) + 1
        faults = {fault.when: fault for fault in self._faults if (fault.method, fault.call) == (method, number)}
        if "before" in faults:
            raise faults["before"].error
        done = work()
        if "after" in faults:
            raise faults["after"].error
        return done


class SharedShards:
    """The shards of one job and the workers that wait for them, each in a thread of its own.

    Args:
        num_shards: Shards.
        missing: What a push does while ranks are missing: ``"wait"`` for them, ``"give up"`` the step, or ``"fail"``
            with the push in the shards' inboxes, as a worker does whose connection broke.
    """

    def __init__(self, *, num_shards: int = 1, missing: Literal["wait", "give up", "fail"] = "wait") -> None:
        self.service = _SharedService(num_shards=num_shards)
        self.missing = missing
        self.changed = threading.Condition()
        self.brought: dict[int, Any] = {}
        self.num_acts = 0

    def wait_for_push(self, *, rank: int, attempt: int) -> None:
        """Wait until this attempt of a rank lies in every shard's inbox."""

        def has_come() -> bool:
            held = [shard._inbox._pushes.get(rank) for shard in self.service.group.shards]
            return all(push is not None and push.header.attempt == attempt for push in held)

        with self.changed:
            assert self.changed.wait_for(has_come, timeout=WAIT_S)


class _SharedService(InProcessService):
    """As its base, but for several workers."""

    def register(self, spec: JobSpec) -> ShardGroup:
        spec = dataclasses.replace(spec, kernel=self._kernel)
        if self._group is None:
            self._group = ShardGroup(spec, num_shards=self._num_shards)
        self._group.spec.require_same(spec, whose="a worker")
        return self._group


class SharedTransport(InProcessTransport):
    """One worker's line to :class:`SharedShards`."""

    reads_in_place = False

    def __init__(self, shared: SharedShards, rank: int) -> None:
        super().__init__(shared.service)
        self._shared, self._rank = shared, rank

    def register(self, spec: JobSpec, rank: int, incarnation: str, holdings: Holdings | None) -> Registration:
        with self._shared.changed:
            registration = super().register(spec, rank, incarnation, holdings)
            return dataclasses.replace(registration, needs_parameters=registration.timeline == 0)

    def hand_in(self, values: PieceValues) -> Registration:
        def load(parts: Mapping[int, PieceValues]) -> None:
            self._load(list(parts.values()), LoadHeader())

        self._together(values, load)
        return self._registration()

    def extend(self, spec: JobSpec, holdings: Holdings | None, values: PieceValues) -> Registration:
        def extend(asked: Mapping[int, tuple[Holdings | None, PieceValues]]) -> None:
            holdings_of = {rank: its_holdings for rank, (its_holdings, _) in asked.items()}
            self._extend(spec, holdings_of, [its_values for _, its_values in asked.values()])

        self._together((holdings, values), extend)
        return self._registration()

    def _together(self, brought: T, act: Callable[[Mapping[int, T]], None]) -> None:
        """Act once every rank has brought something."""
        with self._shared.changed:
            everything, number = self._shared.brought, self._shared.num_acts
            everything[self._rank] = brought
            if len(everything) == self.service.group.spec.world_size:
                act(everything)
                self._shared.brought, self._shared.num_acts = {}, number + 1
                self._shared.changed.notify_all()
            self._wait(lambda: self._shared.num_acts > number)

    def load(self, values: PieceValues, header: LoadHeader) -> Registration:
        with self._shared.changed:
            registration = super().load(values, header)
            self._shared.changed.notify_all()
            return registration

    def wait_until_loaded(self, after_timeline: int) -> Registration:
        with self._shared.changed:
            self._wait(lambda: self.service.group.shards[0].timeline > after_timeline)
            return self._registration()

    def step(
        self, header: PushHeader, gradient: FlatBuffer, reloaded: Mapping[int, Tensor], params: FlatBuffer
    ) -> StepResult:
        group = self.service.group
        with self._shared.changed:
            pushes = [
                Push(header, tuple(gradient.shard_parts(self._layout, index, len(group.shards))), reloaded)
                for index in range(len(group.shards))
            ]
            group.push(pushes)
            self._shared.changed.notify_all()
            if not self._is_taken(header) and self._shared.missing == "give up":
                group.run_step()
            if not self._is_taken(header) and self._shared.missing == "fail":
                raise ServiceTimeoutError("the line broke while the push waited for other ranks")
            self._wait(lambda: self._is_taken(header))
            result = self.decided(header.timeline, header.sequence)
            assert result is not None
            if result.decision is Decision.COMMIT:
                self.read_parameters(params)
            return result

    def _is_taken(self, header: PushHeader) -> bool:
        """Whether the step is decided; an ABORT is that of an attempt before this one."""
        result = self.decided(header.timeline, header.sequence)
        return result is not None and result.decision is not Decision.ABORT

    def _wait(self, condition: Callable[[], bool]) -> None:
        if not self._shared.changed.wait_for(condition, timeout=WAIT_S):
            raise StepAbortedError("the test's other workers did not come")


@contextmanager
def reached_by(make: Callable[[int], Transport]) -> Iterator[None]:
    """Within this block an optimizer of rank r reaches its service by the transport ``make(r)``."""

    def resolve(service: object, *, rank: int, **_: object) -> Transport:
        return make(rank)

    with mock.patch("stepwell.client.optimizer.resolve_service", resolve):
        yield
