"""The shards' own process group: one private gloo group per generation."""

from __future__ import annotations

import re
import threading
import time
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store  # torch.distributed's, with types

from ..sharding.errors import ShardLostError
from ..sharding.reports import StepResult
from ..sharding.running import RunningStep

c10d: Any = dist  # torch has no types for its stores and groups

POLL_S = 0.05
"""How soon a wait notices that its group was closed."""

SHORT_BYTES = 2**16
"""Vectors up to this length go from every shard to every other at once, and one wait is all; longer ones go round a
ring, with two waits for each other shard and fewer bytes."""


class Generation(NamedTuple):
    """One incarnation of the shards' group; later ones are greater.

    Attributes:
        epoch: Of the coordinator that formed it.
        number: How manieth it formed.
    """

    epoch: int
    number: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.number}"


NO_GENERATION = Generation(0, 0)


class Collective:
    """All-reduces among the shards of one generation.

    Args:
        generation: Of the group; each has its own keys.
        shard: This shard's index.
        num_shards: How many shards there are.
        host: This shard's own address, at which it listens; whatever ``$GLOO_SOCKET_IFNAME`` says.
        meeting: Where the members find each other, of this generation alone; see :class:`Meeting`.
        forming_timeout_s: Limit for all shards to come together.
        timeout_s: Limit of one all-reduce, the wait for the slowest shard included.

    Raises:
        ShardLostError: If they did not come together.
    """

    def __init__(
        self,
        generation: Generation,
        shard: int,
        num_shards: int,
        *,
        host: str,
        meeting: Store,
        forming_timeout_s: float,
        timeout_s: float,
    ) -> None:
        self.generation = generation
        self._timeout_s = timeout_s
        self._num_shards, self._is_alone = num_shards, num_shards == 1
        self._lock = threading.Lock()
        self._group: Any = None
        self._meeting = meeting  # the group refers to it, but does not keep what Python adds to a store
        if not self._is_alone:
            try:
                self._group = _form(meeting, shard, num_shards, host, forming_timeout_s)
            except (RuntimeError, TimeoutError) as error:
                raise ShardLostError(
                    f"shard {shard}: the {num_shards} shards of generation {generation} did not come together within "
                    f"{forming_timeout_s:g} s: {_first_line(error)}. This one is to be reached at {host}, its node's "
                    "address in Ray, at any port: see that the nodes reach each other there, or start Ray on another "
                    "network with --node-ip-address"
                ) from None

    @property
    def is_open(self) -> bool:
        """Whether the group can be used: not after :meth:`close` or a failure."""
        return self._is_alone or self._group is not None

    def all_reduce(self, vector: Tensor) -> Tensor:
        """Sum ``vector`` over all shards, in place, and return it.

        Raises:
            ShardLostError: If another shard died or did not come within the limit, or the group was closed. The group
                is closed then.
        """
        if self._is_alone:
            return vector
        if vector.nbytes <= SHORT_BYTES:
            reason = self._try_exchange(vector)
        else:
            reason = self._try("allreduce", [vector], c10d.AllreduceOptions())
        if reason is not None:
            self.close()
            raise ShardLostError(
                f"a shard lost its peers during an all-reduce of generation {self.generation} "
                f"(limit {self._timeout_s:g} s): {reason}"
            )
        return vector

    def close(self) -> None:
        """Leave the group, from any thread; whoever waits for this shard is told, here and on the other shards.

        A neighbour sees the connections close, and those who wait for the neighbour when it leaves in turn. So nothing
        may keep the group alive after this: no local variable in a traceback.
        """
        with self._lock:
            left, self._group = [self._group], None
        # A group ends when the operation that is under way does, so not in the caller's time.
        threading.Thread(target=left.clear, daemon=True).start()

    def _try_exchange(self, vector: Tensor) -> str | None:
        """All-reduce in one exchange, each shard adding up for itself; returns why it failed, if it did."""
        copies = vector.expand(self._num_shards, *vector.shape).contiguous()
        vectors = torch.empty_like(copies)
        reason = self._try("alltoall_base", vectors, copies, [], [], c10d.AllToAllOptions())
        if reason is None:
            torch.sum(vectors, dim=0, out=vector)
        return reason

    def _try(self, operation: str, *args: Any) -> str | None:
        """Run an operation of the group; returns why it failed, if it did.

        Args:
            operation: Its name.
            args: What it takes, options last.
        """
        args[-1].timeout = timedelta(seconds=self._timeout_s)
        deadline = time.monotonic() + self._timeout_s
        with self._lock:
            work = None if self._group is None else getattr(self._group, operation)(*args)
        while work is not None and self._group is not None:
            is_last_try = work.is_completed() or time.monotonic() > deadline
            try:
                work.wait(timedelta(seconds=POLL_S))
            except RuntimeError as error:
                if is_last_try:
                    return _first_line(error)
            else:
                return None
        return "the group was closed"


def drive(step: RunningStep, collective: Collective | None) -> StepResult:
    """Run a step to its end, all-reducing whatever it waits for.

    Raises:
        ShardLostError: If a sum does not come; the step rests where it is.
    """
    try:
        while step.vector is not None:
            if collective is None:
                raise ShardLostError("the shards have no process group; restart the service")
            step.take(collective.all_reduce(step.vector.clone()))
    except BaseException:
        if collective is not None:
            collective.close()  # the others must not wait for this shard
        raise
    assert step.result is not None, "it waits for nothing any more"
    return step.result


def _form(meeting: Store, shard: int, num_shards: int, host: str, timeout_s: float) -> Any:
    limit = timedelta(seconds=timeout_s)
    options = c10d.ProcessGroupGloo._Options()
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = limit
    group = c10d.ProcessGroupGloo(meeting, shard, num_shards, options)
    group.barrier().wait(limit)
    return group


def _first_line(error: Exception) -> str:
    """What gloo says, without where in its sources and what it advises its own users."""
    line = str(error).strip().splitlines()[0]
    return re.sub(r"^\[\S+\]\s*", "", line).split(". This is typically")[0]
