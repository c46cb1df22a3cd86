"""Two workers whose every message a test writes and sends itself, beside the same job in one process."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import ray
import torch

import stepwell
from stepwell.optim import Rule
from stepwell.server.messages import (
    Exchange,
    LoadHeader,
    Registration,
    Target,
    pack_exchange,
    pack_holdings,
    pack_job,
    pack_push,
)
from stepwell.server.wire import from_wire, to_wire
from stepwell.sharding.buffers import MASTER
from stepwell.sharding.push import Push
from stepwell.sharding.reports import StepResult
from tests.zoo import Problem, Run, State

LIMIT_S = 60.0
MOMENT_S = 0.2

Reply = StepResult | stepwell.StepwellError


class HandJob:
    """A job on a service's shards, and the oracle that takes the same steps.

    Args:
        service: The service.
        problem: What to train.
        rule: With what.
        world_size: How many workers.
    """

    def __init__(self, service: stepwell.Service, problem: Problem, rule: Rule, *, world_size: int = 2) -> None:
        self.service = service
        self.oracle = Run(problem, rule, num_shards=len(service.shards), world_size=world_size)
        self.timeline = 0
        for rank in range(world_size):
            self.register(rank)
        self.load()

    def load(self) -> None:
        """Load the initial parameters."""
        values = {
            (index, MASTER.name, 0): to_wire(self.oracle.problem.initial(index))
            for index in range(len(self.oracle.problem.tensors))
        }
        self.timeline = self.ask("load", [ray.put(values)], LoadHeader(), uuid.uuid4().hex).timeline

    def ask(self, method: str, *arguments: Any) -> Registration:
        """Ask the coordinator."""
        call = getattr(self.service.coordinator, method).remote(*arguments)
        registration: Registration = ray.get(call, timeout=LIMIT_S)
        return registration

    def register(self, rank: int, incarnation: str | None = None) -> Registration:
        job, name = pack_job(self.oracle.group.spec), incarnation or f"worker-{rank}"
        return self.ask("register", job, rank, name, pack_holdings(None))

    def pushes(self, rank: int, **changes: Any) -> list[Push]:
        """What a rank would push now, a part for each shard; see :meth:`tests.zoo.Run.pushes`."""
        return self.oracle.pushes(rank, **{"timeline": self.timeline, **changes})

    def send(self, pushes: Sequence[Push], shards: Sequence[int] | None = None) -> list[Any]:
        """Send each shard its part, all of them unless ``shards`` says otherwise; references to what they answer.

        They have all been received when this returns.
        """
        chosen = range(len(pushes)) if shards is None else shards
        sent = [
            self.send_bytes(shard, pack_push(pushes[shard].header), [to_wire(part) for part in pushes[shard].gradient])
            for shard in chosen
        ]
        # An actor's event loop begins calls in the order in which they come from one process.
        ray.get([self.service.shards[shard].status.remote() for shard in chosen], timeout=LIMIT_S)
        return sent

    def send_bytes(self, shard: int, push: Any, gradient: Sequence[Any]) -> Any:
        """Send a shard what may be a push; the reference to its answer."""
        target = Target("held", ("float32",))
        request = pack_exchange(Exchange(push, None, target, LIMIT_S))
        return self.service.shards[shard].exchange.remote(request, gradient)

    def step(self, attempt: int = 0) -> None:
        """One step on both sides."""
        sent = [self.send(self.pushes(rank, attempt=attempt)) for rank in range(self.oracle.world_size)]
        expected = self.oracle.step(attempt=attempt)
        assert [reply for refs in sent for reply in answers(refs)] == [expected] * sum(map(len, sent))

    def state(self) -> State:
        """Every slot of every shard, as its actor exports it."""
        exports = ray.get([shard.export.remote() for shard in self.service.shards], timeout=LIMIT_S)
        pieces = sorted(
            (
                (slot, param, offset, from_wire(wire))
                for exported, _ in exports
                for param, slot, offset, wire in exported
            ),
            key=lambda piece: piece[:3],
        )
        names = {slot for slot, _, _, _ in pieces}
        indices = range(len(self.oracle.problem.tensors))
        empty = torch.zeros(0)
        status = exports[0][1]
        return State(
            slots={
                name: [
                    torch.cat([empty, *(values for slot, param, _, values in pieces if (slot, param) == (name, index))])
                    for index in indices
                ]
                for name in names
            },
            scalars=dict(status.scalars),
            step_counts=tuple(status.step_counts),
            counters=(status.sequence, status.step, status.skipped_steps),
        )


def answers(refs: Sequence[Any]) -> list[Reply]:
    """What shards answer; waits for it."""
    return [reply for reply, *_ in ray.get(list(refs), timeout=LIMIT_S)]


def are_waiting(refs: Sequence[Any]) -> bool:
    """Whether no shard has answered, a moment after it was asked."""
    return not ray.wait(list(refs), num_returns=len(refs), timeout=MOMENT_S)[0]
