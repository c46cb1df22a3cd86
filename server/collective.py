"""The shards' own process group: one private gloo group per generation."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from ..sharding.errors import ShardLostError


class GroupStore:
    """The rendezvous of one generation, hosted by the first shard; it binds a free port before it is announced.

    Args:
        host: The address that the other shards reach this one at.
        timeout_s: Limit for every wait on it.
    """

    def __init__(self, host: str, timeout_s: float) -> None:
        limit = timedelta(seconds=timeout_s)
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit)
        self.address = (host, self._store.port)


class Collective:
    """All-reduces among the shards of one generation.

    Args:
        generation: Number of the group; each has its own keys.
        shard: This shard's index.
        num_shards: How many shards there are.
        host: This shard's own address.
        store_address: Where the generation's :class:`GroupStore` listens.
        forming_timeout_s: Limit for all shards to come together.
        timeout_s: Limit of one all-reduce, the wait for the slowest shard included.
    """

    def __init__(
        self,
        generation: int,
        shard: int,
        num_shards: int,
        *,
        host: str,
        store_address: tuple[str, int],
        forming_timeout_s: float,
        timeout_s: float,
    ) -> None:
        self.generation = generation
        self._timeout_s = timeout_s
        self._group: dist.ProcessGroupGloo | None = None
        if num_shards == 1:
            return
        store = dist.TCPStore(*store_address, is_master=False, timeout=timedelta(seconds=forming_timeout_s))
        self._store = dist.PrefixStore(f"generation-{generation}", store)
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = timedelta(seconds=forming_timeout_s)
        self._group = dist.ProcessGroupGloo(self._store, shard, num_shards, options)
        self._group.barrier().wait(timedelta(seconds=forming_timeout_s))

    def all_reduce(self, vector: Tensor) -> Tensor:
        """Sum ``vector`` over all shards, in place, and return it.

        Raises:
            ShardLostError: If another shard died or did not come within the limit. The group is of no use afterwards.
        """
        if self._group is None:
            return vector
        try:
            options = dist.AllreduceOptions()
            options.timeout = timedelta(seconds=self._timeout_s)
            self._group.allreduce([vector], options).wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ShardLostError(
                f"a shard lost its peers during an all-reduce of generation {self.generation} "
                f"(limit {self._timeout_s:g} s): {reason}. Restore the service from its last checkpoint."
            ) from error
        return vector
