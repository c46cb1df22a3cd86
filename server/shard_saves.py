"""A shard's part in the saves that are under way."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..sharding.checkpoint import write_shard
from ..sharding.errors import CheckpointError, NotRegisteredError
from ..sharding.files import remove_file
from ..sharding.folder import Destination
from ..sharding.job import JobSpec
from ..sharding.manifest import ShardFile, build_manifest, shard_file_name
from ..sharding.saved import SavedCheckpoint
from ..sharding.snapshot import Snapshot


@dataclasses.dataclass(slots=True)
class Part:
    """What a shard keeps of one save.

    Attributes:
        to: Where the checkpoint goes.
        spec: The job as it was.
        snapshot: The state as it was.
        written: The shard's file, once it was asked for.
    """

    to: Destination
    spec: JobSpec
    snapshot: Snapshot
    written: asyncio.Future[ShardFile] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class SaveUnderWay:
    """What a coordinator needs to know of a save to go on with it: where it goes, and how many steps are in it."""

    uri: str
    step: int


class ShardSaves:
    """The saves that a shard has a part in, from its snapshot until the coordinator says that all is done.

    A coordinator that takes over finds them here and goes on with them. One thread does all that touches files, so
    that a save is given up after what is being written, never beside it.

    Args:
        shard: The shard's index.
        num_shards: How many there are.

    Attributes:
        saved: The checkpoint that was completed last, if this shard was told.
    """

    def __init__(self, shard: int, num_shards: int) -> None:
        self._shard, self._num_shards = shard, num_shards
        self._files = ThreadPoolExecutor(max_workers=1, thread_name_prefix="files")
        self._parts: dict[str, Part] = {}
        self.saved: SavedCheckpoint | None = None

    @property
    def under_way(self) -> Mapping[str, SaveUnderWay]:
        """The saves under way, by their names."""
        return {save_id: SaveUnderWay(part.to.uri, part.snapshot.status.step) for save_id, part in self._parts.items()}

    def keep(self, save_id: str, to: Destination, spec: JobSpec, snapshot: Snapshot) -> None:
        """Begin to take part in a save."""
        self._parts[save_id] = Part(to, spec, snapshot)

    async def write(self, save_id: str, uri: str) -> ShardFile:
        """Write this shard's file; who asks again is told of the same one.

        Raises:
            NotRegisteredError: If nothing is kept for this save.
            CheckpointError: If it cannot be written.
        """
        part = self._part(save_id, uri)
        if part.written is None:
            name = self._name(save_id)
            part.written = asyncio.ensure_future(self._on_files(lambda: write_shard(part.snapshot, uri, name)))
        return await asyncio.shield(part.written)

    async def complete(self, save_id: str, uri: str, files: Sequence[ShardFile]) -> None:
        """Write the manifest, after which the checkpoint is there; called on the first shard alone.

        Raises:
            NotRegisteredError: If nothing is kept for this save.
            CheckpointError: If it cannot be written.
        """
        part = self._part(save_id, uri)
        status = part.snapshot.status
        await self._on_files(lambda: part.to.complete(build_manifest(part.spec, files, status)))
        self.saved = None
        with contextlib.suppress(CheckpointError):  # it is there, and only a repeat of this save not known for one
            self.saved = await self._on_files(lambda: SavedCheckpoint.just_written(uri, part.spec, status))

    def finish(self, save_id: str, saved: SavedCheckpoint | None) -> None:
        """Forget a save: the checkpoint is complete.

        Args:
            save_id: Its name.
            saved: The checkpoint that was completed last, if anybody knows.
        """
        self.saved = saved
        part = self._parts.pop(save_id, None)
        if part is not None:
            part.snapshot.close("the save is over")

    async def give_up(self, save_id: str, uri: str) -> None:
        """Free what a save keeps here, and remove this shard's file of it."""
        part = self._parts.pop(save_id, None)
        if part is not None:
            part.snapshot.close("the save was given up")
        await self._on_files(lambda: remove_file(uri, self._name(save_id)))

    def _part(self, save_id: str, uri: str) -> Part:
        if save_id not in self._parts:
            raise NotRegisteredError(f"shard {self._shard} has nothing kept to write to {uri}; save again")
        return self._parts[save_id]

    async def _on_files(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._files, work)

    def _name(self, save_id: str) -> str:
        return shard_file_name(save_id, self._shard, self._num_shards)
