"""A process that is a shard, or a spare one: what a shard needs is imported, for the day when one is lost.

The actors of a service with a standby are *seats*. Each is told which shard it is; one that Ray has started again is
told by the coordinator, or stays a spare. See *Note: A standby* in docs/design.md.
"""

from __future__ import annotations

import asyncio
import dataclasses
import uuid

import ray
import torch

from ..sharding.compiling import take_compiled_code
from ..sharding.errors import ShardLostError
from ..sharding.warm_up import warm_up
from .config import ServiceConfig
from .messages import unpack_job
from .shard_actor import ShardActor
from .signals import end_at_sigterm


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """What a seat says of itself.

    Attributes:
        shard: The index of the shard that it is; None for a spare.
        epoch: Of the newest coordinator that this shard has heard of.
        incarnation: Names the process.
        is_warm: Whether a job's kernels are loaded.
    """

    shard: int | None
    epoch: int
    incarnation: str
    is_warm: bool


class Seat(ShardActor):
    """A shard's actor, once it knows which; until then every call for a shard is refused as to one that is lost.

    Args:
        config: The service's.
        shard: Which shard its first process is; None for a spare.
        is_successor: As for :class:`CoordinatedShard`.
    """

    def __init__(self, config: ServiceConfig, shard: int | None, is_successor: bool = False) -> None:
        self._shard: int | None = None
        self._incarnation, self._is_warm, self._settings = uuid.uuid4().hex, False, config
        torch.set_num_threads(max(1, round(config.num_cpus_per_shard)))  # kernels are compiled for so many
        end_at_sigterm()
        if shard is not None and not ray.get_runtime_context().was_current_actor_reconstructed:
            self._sit_down(shard, is_successor)

    def __getattr__(self, name: str) -> object:
        """What a shard has and a spare has not; called by who has an old handle, or learns of a loss only now."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise ShardLostError("this process was started again and is no shard now; ask the coordinator for the shards")

    async def claim(self) -> Claim:
        """Which shard this is."""
        epoch = 0 if self._shard is None else self.fence.epoch
        return Claim(self._shard, epoch, self._incarnation, self._is_warm)

    async def warm(self, job: bytes, code: bytes) -> None:
        """Load a job's kernels, which are compiled already as ``code``, and all that they need."""

        def warm() -> None:
            spec, device = unpack_job(job), torch.device("cpu")
            take_compiled_code(code)
            warm_up(spec, device)
            warm_up(spec, device, is_delivered=False)  # the steps of a log

        await asyncio.get_running_loop().run_in_executor(None, warm)
        self._is_warm = True

    async def become(self, shard: int) -> None:
        """Be a shard that was lost, as if Ray had started it again; asking twice does no harm.

        Raises:
            ShardLostError: If this is another shard by now.
        """
        if self._shard is None:
            self._sit_down(shard, is_successor=True)
        if self._shard != shard:
            raise ShardLostError(f"expected a spare for shard {shard}, got one that is shard {self._shard} by now")

    def _sit_down(self, shard: int, is_successor: bool) -> None:
        super().__init__(self._settings, shard, is_successor)
        self._shard = shard
