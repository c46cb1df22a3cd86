"""The shards' own group: one connection between any two that exchange, anew for each generation.

The vectors are small, and a step waits for each of its reductions. So a vector goes straight from the thread that has
it to the thread that waits for it: no thread of a library stands between them.
"""

from __future__ import annotations

import contextlib
import hmac
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..sharding.errors import ShardLostError
from ..sharding.reports import StepResult
from ..sharding.shard import Reduction

Address = tuple[str, int]

KEY_BYTES = 16
EAGER_BYTES = 2**15
"""What the system takes of a vector without anybody reading it; both may then send before they receive."""

_HELLO = struct.Struct(f"<{KEY_BYTES}sqq")


class Listener:
    """Where a shard is reached by those that come after it, while the group forms; on a free port.

    Args:
        host: The shard's own address.
    """

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.create_server((host, 0), family=family)
        self.address: Address = (host, self.socket.getsockname()[1])


class Collective:
    """All-reduces among the shards of one generation.

    Args:
        generation: Number of the group.
        shard: This shard's index.
        listener: Where it is reached.
        addresses: Where each shard is, this one included.
        key: What they know one another by, ``KEY_BYTES`` of it: whoever else connects is sent away.
        forming_timeout_s: Limit for all shards to come together.
        timeout_s: Limit of one all-reduce, the wait for the slowest shard included.

    Raises:
        ShardLostError: If they did not come together.
    """

    def __init__(
        self,
        generation: int,
        shard: int,
        *,
        listener: Listener,
        addresses: Sequence[Address],
        key: bytes,
        forming_timeout_s: float,
        timeout_s: float,
    ) -> None:
        self.generation = generation
        self._shard, self._num_shards, self._timeout_s = shard, len(addresses), timeout_s
        self._peers: dict[int, socket.socket] = {}
        self._is_closed = False
        self._lock = threading.Lock()
        try:
            with listener.socket:
                deadline = time.monotonic() + forming_timeout_s
                for peer, line in _connect(generation, shard, listener, addresses, key, deadline):
                    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._peers[peer] = line
        except OSError as error:
            self.close()
            raise ShardLostError(
                f"shard {shard}: the {self._num_shards} shards of generation {generation} did not come together "
                f"within {forming_timeout_s:g} s: {error}"
            ) from None

    @property
    def is_open(self) -> bool:
        """Whether the group can be used: not after :meth:`close` or a failure. Who is alone always can."""
        return not self._is_closed or self._num_shards == 1

    def all_reduce(self, vector: Tensor) -> Tensor:
        """Sum ``vector`` over all shards, in place, and return it.

        The order in which two terms meet depends on the number of shards; see *Note: Partials and totals*.

        Args:
            vector: Contiguous, on the CPU, of one shape and dtype on all shards.

        Raises:
            ShardLostError: If another shard died or did not come within the limit, or the group was closed. The group
                is closed then.
        """
        try:
            with self._lock:
                self._sum(vector, time.monotonic() + self._timeout_s)
        except OSError as error:
            reason = "the group was closed" if self._is_closed else str(error)
            self.close()
            raise ShardLostError(
                f"a shard lost its peers during an all-reduce of generation {self.generation} "
                f"(limit {self._timeout_s:g} s): {reason}. Restore the service from its last checkpoint."
            ) from None
        return vector

    def close(self) -> None:
        """Leave the group, from any thread; whoever waits for this shard is told, here and on the other shards.

        A neighbour sees the connections close, and those who wait for the neighbour when it leaves in turn.
        """
        self._is_closed = True
        for line in self._peers.values():
            with contextlib.suppress(OSError):  # it may be closed on the other side, or by another thread
                line.shutdown(socket.SHUT_RDWR)
        # Not before the all-reduce that this has ended is out of it: the descriptor may be another's by then.
        with self._lock:
            for line in self._peers.values():
                line.close()

    def _sum(self, vector: Tensor, deadline: float) -> None:
        """Recursive doubling; shards beyond the last power of two hand their vectors in first, and get the sum."""
        other = torch.empty_like(vector)
        ours, theirs = (each.numpy().reshape(-1).view(np.uint8).data for each in (vector, other))
        size = _power_of_two_at_most(self._num_shards)
        partner = self._shard ^ size
        if self._shard >= size:
            self._send(partner, ours, deadline)
            self._receive(partner, ours, deadline)
            return
        if partner < self._num_shards:
            self._receive(partner, theirs, deadline)
            vector += other
        for peer in _doubling(self._shard, size):
            if self._shard < peer or len(ours) <= EAGER_BYTES:
                self._send(peer, ours, deadline)
                self._receive(peer, theirs, deadline)
            else:
                self._receive(peer, theirs, deadline)
                self._send(peer, ours, deadline)
            vector += other
        if partner < self._num_shards:
            self._send(partner, ours, deadline)

    def _send(self, peer: int, data: memoryview, deadline: float) -> None:
        line = self._line(peer, deadline)
        try:
            line.sendall(data)
        except TimeoutError:
            raise TimeoutError(f"shard {peer} took nothing") from None

    def _receive(self, peer: int, data: memoryview, deadline: float) -> None:
        while data:
            try:
                num_bytes = self._line(peer, deadline).recv_into(data)
            except TimeoutError:
                raise TimeoutError(f"shard {peer} sent nothing") from None
            if num_bytes == 0:
                raise ConnectionError(f"shard {peer} closed its connection")
            data = data[num_bytes:]

    def _line(self, peer: int, deadline: float) -> socket.socket:
        line = self._peers[peer]
        line.settimeout(_left(deadline))
        return line


def drive(step: Reduction, collective: Collective | None) -> StepResult:
    """Run a step to its end, all-reducing whatever it yields."""
    try:
        vector = next(step)
        if collective is None:
            raise ShardLostError("the shards have no process group; restart the service")
        while True:
            vector = step.send(collective.all_reduce(vector))
    except StopIteration as stop:
        result: StepResult = stop.value
        return result
    except BaseException:
        if collective is not None:
            collective.close()  # the others must not wait for this shard
        raise
    finally:
        step.close()


def _connect(
    generation: int, shard: int, listener: Listener, addresses: Sequence[Address], key: bytes, deadline: float
) -> Iterator[tuple[int, socket.socket]]:
    """The connections to all with whom a shard exchanges vectors: it calls those before it, and is called by others."""
    peers = _partners(shard, len(addresses))
    for peer in (each for each in peers if each < shard):
        line = socket.create_connection(addresses[peer], timeout=_left(deadline))
        line.sendall(_HELLO.pack(key, generation, shard))
        yield peer, line
    awaited = {peer for peer in peers if peer > shard}
    while awaited:
        listener.socket.settimeout(_left(deadline))
        line, _ = listener.socket.accept()
        line.settimeout(_left(deadline))
        caller = _caller(line, key, generation)
        if caller in awaited:
            awaited.remove(caller)
            yield caller, line
        else:
            line.close()


def _caller(line: socket.socket, key: bytes, generation: int) -> int | None:
    """Which shard of this group has called; None if it is none of them."""
    try:
        hello = line.recv(_HELLO.size, socket.MSG_WAITALL)
    except OSError:  # whoever it was has gone, or says nothing
        return None
    known, theirs, shard = _HELLO.unpack(hello) if len(hello) == _HELLO.size else (b"", 0, None)
    return shard if hmac.compare_digest(known, key) and theirs == generation else None


def _partners(shard: int, num_shards: int) -> list[int]:
    """With whom a shard exchanges vectors, see :meth:`Collective._sum`."""
    size = _power_of_two_at_most(num_shards)
    beyond = [shard ^ size] if shard ^ size < num_shards else []
    return beyond if shard >= size else [*beyond, *_doubling(shard, size)]


def _doubling(shard: int, size: int) -> list[int]:
    return [shard ^ 1 << bit for bit in range(size.bit_length() - 1)]


def _power_of_two_at_most(value: int) -> int:
    return 1 << (value.bit_length() - 1)


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 1e-3)
