"""The coordinator's part in saves: when one begins, and when it is complete."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

from ..sharding.errors import CheckpointError, StepwellError
from ..sharding.folder import Destination, is_of_save
from ..sharding.job import JobSpec
from ..sharding.saved import SavedCheckpoint
from .changes import NUM_REMEMBERED
from .knowledge import ShardReport
from .shard_saves import SaveUnderWay
from .shards import Shards


class Saves:
    """All saves of a service. See *Note: Saving between two steps* in docs/design.md.

    Args:
        shards: The shards.
        changing: Held by what changes the job or its state.
        require_spec: The job, or an error that there is none.

    Attributes:
        saved: The checkpoint that was completed last, as far as anybody knows.
    """

    def __init__(self, shards: Shards, changing: asyncio.Lock, require_spec: Callable[[], JobSpec]) -> None:
        self._shards, self._changing, self._require_spec = shards, changing, require_spec
        self._beginning = asyncio.Lock()
        self.saved: SavedCheckpoint | None = None
        self._begun: dict[str, tuple[SaveUnderWay, asyncio.Task[None]]] = {}

    def learn(self, reports: Sequence[ShardReport]) -> None:
        """Take in which checkpoint was completed last."""
        known = [report.saved for report in reports if report.saved is not None]
        self.saved = max(known, key=lambda saved: (saved.timeline, saved.sequence), default=None)

    async def take_over(self, reports: Sequence[ShardReport]) -> None:
        """Go on with the saves of a coordinator before this one; one that not all shards have a part in is given up."""
        under_way = {save_id: save for report in reports for save_id, save in report.saves.items()}
        for save_id, save in under_way.items():
            if all(save_id in report.saves for report in reports):
                self._write(save_id, save)
            else:
                await self._part_from(save_id, save.uri)

    async def begin(self, save_id: str, uri: str, keep_last: int | None) -> tuple[bool, str, int]:
        """See :meth:`Coordinator.begin_save`."""
        async with self._beginning:
            if save_id in self._begun:
                under_way, _ = self._begun[save_id]
                return True, under_way.uri, under_way.step
            await self._wait_for_last()
            async with self._changing:
                spec = self._require_spec()
                try:
                    status = await self._shards.settle()
                    to = Destination.of(uri, keep_last, status.step)
                    if self.saved is not None and await asyncio.to_thread(self.saved.serves, to.uri, spec, status):
                        return False, to.uri, status.step
                    await self._shards.all("snapshot", save_id, to, what="the shards to keep their state")
                    self._write(save_id, SaveUnderWay(to.uri, status.step))
                finally:
                    await self._shards.release()
            return True, to.uri, status.step

    async def end(self, save_id: str, uri: str) -> None:
        """See :meth:`Coordinator.end_save`."""
        if save_id in self._begun:
            await asyncio.shield(self._begun[save_id][1])
        elif not await asyncio.to_thread(is_of_save, uri, save_id):
            raise CheckpointError(
                f"{uri}: the save did not outlive the service's coordinator, which was started again; save again"
            )

    @contextlib.asynccontextmanager
    async def at_rest(self) -> AsyncIterator[None]:
        """Within this block no save is under way, and none begins. To be entered before ``changing`` is held."""
        async with self._beginning:
            await self._wait_for_last()
            yield

    async def _wait_for_last(self) -> None:
        """Wait until nothing is written; what came of it is told to who asks for it."""
        tasks = [task for _, task in self._begun.values()]
        if tasks:
            await asyncio.wait(tasks)
        self._begun = dict(list(self._begun.items())[-NUM_REMEMBERED:])

    def _write(self, save_id: str, save: SaveUnderWay) -> None:
        self._begun[save_id] = save, asyncio.create_task(self._written(save_id, save.uri))

    async def _written(self, save_id: str, uri: str) -> None:
        """Have the shards write what they keep for a save, then the manifest."""
        try:
            files = await self._shards.all("save", save_id, uri, what=f"the shards to write {uri}")
            async with self._changing:  # a restore of the checkpoint that this one replaces may be reading its files
                what = f"the manifest of {uri}"
                self.saved = await self._shards.first("complete_save", save_id, uri, files, what=what)
        finally:
            with contextlib.suppress(StepwellError):  # what made the save fail is the news
                await self._part_from(save_id, uri)

    async def _part_from(self, save_id: str, uri: str) -> None:
        """Have the shards forget a save, and remove its files unless its checkpoint is there, or may be."""
        try:
            is_there = await asyncio.to_thread(is_of_save, uri, save_id)
        except CheckpointError:
            is_there = True
        if is_there:
            await self._shards.all("finish_save", save_id, self.saved, what="the shards to forget a save")
        else:
            await self._shards.all("give_up_save", save_id, uri, what="the shards to give a save up")
