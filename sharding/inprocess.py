"""Several shards in one process, in lockstep: the oracle of all other ways to run them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .buffers import StateSource
from .coverage import Holdings
from .errors import StepAbortedError
from .job import JobSpec
from .partials import sum_vectors
from .push import Push
from .reports import Receipt, StepResult
from .running import Reduction, RunningStep
from .shard import Shard
from .world import World


class ShardGroup:
    """All shards of one job, in this process.

    Args:
        spec: The job.
        num_shards: How many shards.
        device: Where they live.
        world: As for a shard.
    """

    def __init__(
        self,
        spec: JobSpec,
        *,
        num_shards: int = 1,
        device: torch.device | None = None,
        world: World | None = None,
    ) -> None:
        self._num_shards, self._device, self._world = num_shards, device, world
        self._lay_out(spec)

    def _lay_out(self, spec: JobSpec) -> None:
        self.spec = spec
        self.shards = [
            Shard(spec, shard=index, num_shards=self._num_shards, device=self._device, world=self._world)
            for index in range(self._num_shards)
        ]
        self._workers: dict[int, tuple[str, Holdings | None]] = {}

    def load(self, source: StateSource, *, timeline: int) -> None:
        """Load a whole state into every shard."""
        for shard in self.shards:
            shard.load(source, timeline=timeline)

    def admit(self, rank: int, incarnation: str, holdings: Holdings | None = None) -> None:
        """Let a worker's process push as ``rank``, and note what it holds of a sharded model."""
        for shard in self.shards:
            shard.admit(rank, incarnation, holdings)
        self._workers[rank] = incarnation, holdings

    def extend(self, spec: JobSpec, source: StateSource, holdings: Mapping[int, Holdings | None]) -> None:
        """Add the parameters that ``spec`` has beyond the job.

        Args:
            spec: The job with the added group.
            source: The added parameters' values.
            holdings: What each rank holds of all parameters now.
        """
        extended = self.spec.extended(spec)
        for shard in self.shards:
            shard.prepare_extension(extended, source)
        timeline = self.shards[0].timeline + 1
        for shard in self.shards:
            shard.adopt_extension(timeline=timeline)
        self.spec = extended
        for rank, (incarnation, _) in list(self._workers.items()):
            self.admit(rank, incarnation, holdings[rank])

    def take_batches(self, batches: tuple[int, ...]) -> None:
        """Lay the job out as a checkpoint's was, before it is loaded: batches fix the order of sums."""
        if batches != self.spec.batches:
            workers, timeline = self._workers, self.shards[0].timeline
            self._lay_out(dataclasses.replace(self.spec, batches=batches))
            for shard in self.shards:
                shard.history.begin(timeline)
            for rank, (incarnation, holdings) in workers.items():
                self.admit(rank, incarnation, holdings)

    def push(self, pushes: Sequence[Push]) -> StepResult | None:
        """Hand one worker's push to every shard, one part each; run the step if that completes it.

        Returns:
            The result once the step is decided, None while ranks are missing.
        """
        receipts = [shard.receive(push) for shard, push in zip(self.shards, pushes, strict=True)]
        if all(receipt is Receipt.COMPLETE for receipt in receipts):
            return self.run_step()
        header = pushes[0].header
        return self.shards[0].result(header.timeline, header.sequence)

    def run_step(self) -> StepResult:
        """Run the next step on every shard; with ranks missing it is given up.

        Raises:
            StepAbortedError: If it was given up.
        """
        result = run_in_lockstep([shard.step() for shard in self.shards])
        if result.error is not None:
            raise result.error
        return result

    def read(self, slot: str, param: int) -> Tensor:
        """One whole slot of one parameter, flattened, in its own dtype; empty for a parameter without elements."""
        parts = []
        for shard in self.shards:
            if slot in shard.buffers.key_state.names:
                exported = shard.buffers.export_key_state()
                parts += [values for name, piece, values in exported if (name, piece.param) == (slot, param)]
            else:
                for buffers in shard.buffers.extents:
                    parts += [buffers.read(slot, piece) for piece in buffers.pieces(slot) if piece.param == param]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=self.spec.params[param].state_dtype, device="cpu")


def run_in_lockstep(steps: Sequence[Reduction]) -> StepResult:
    """Drive every shard's step from reduction to reduction; if one fails, none is left half way.

    Raises:
        StepAbortedError: If the shards came to different results, which a bug alone can do.
    """
    try:
        running = [RunningStep(step) for step in steps]
        while all(each.vector is not None for each in running):
            total = sum_vectors([each.vector for each in running if each.vector is not None])
            for each in running:
                each.take(total)
    finally:
        for step in steps:
            step.close()
    results = [each.result for each in running if each.result is not None]
    if len(results) != len(steps) or len({result.decision for result in results}) != 1:
        raise StepAbortedError(f"the shards disagree: {[result.decision.value for result in results]}")
    return results[0]
