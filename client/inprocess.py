"""Shards in the training process itself: no Ray, no start-up, no copies. For a single worker."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..server.config import default_kernel
from ..server.messages import LoadHeader, Registration, source_of
from ..sharding.checkpoint import CheckpointReader, write_shard
from ..sharding.chronicle import Columns
from ..sharding.compiling import KernelChoice, resolve_kernel
from ..sharding.coverage import Holdings
from ..sharding.delivery import Sink
from ..sharding.errors import JobMismatchError, NotRegisteredError, StepAbortedError
from ..sharding.files import remove_file
from ..sharding.folder import Checkpoint, Destination, list_checkpoints, read_complete
from ..sharding.inprocess import ShardGroup
from ..sharding.job import JobSpec
from ..sharding.layout import Layout
from ..sharding.manifest import build_manifest, check_restorable, shard_file_name, tell_of_other_kernels
from ..sharding.pending_save import PendingSave
from ..sharding.pieces import PieceValues
from ..sharding.push import Push, PushHeader
from ..sharding.reports import ShardStatus, StepResult
from ..sharding.saved import SavedCheckpoint
from ..sharding.snapshot import Snapshot
from ..sharding.warm_up import warm_up
from .flat import FlatBuffer
from .transport import Transport, join_pieces


class InProcessService:
    """A service whose shards are objects of this process. It serves one optimizer.

    Args:
        num_shards: Shards; more than one is of use in tests alone.
        device: Where they live.
        kernel: How kernels run, see :func:`stepwell.launch`.

    Raises:
        ValueError: If ``num_shards`` is less than 1, or ``kernel`` is unknown.
        KernelError: If kernels are to be compiled and there is no compiler.
    """

    name = "inprocess"

    def __init__(
        self, *, num_shards: int = 1, device: torch.device | None = None, kernel: KernelChoice | None = None
    ) -> None:
        if num_shards < 1:
            raise ValueError(f"num_shards: expected at least 1, got {num_shards}")
        self._num_shards, self._device = num_shards, device or torch.device("cpu")
        self._kernel = resolve_kernel(default_kernel() if kernel is None else kernel, self._device)
        self._group: ShardGroup | None = None
        self._saved: SavedCheckpoint | None = None
        self._pending: PendingSave | None = None
        self._saving, self._replacing = threading.Lock(), threading.Lock()

    def status(self) -> dict[str, Any]:
        """As :meth:`stepwell.Service.status`."""
        shards = [shard.status() for shard in self.group.shards]
        first, spec = shards[0], self.group.spec
        return {
            "name": self.name,
            "num_shards": self._num_shards,
            "generation": "1.1",
            "epoch": 1,
            "restarts": 0,
            "elastic": False,
            "rule": spec.rule.name,
            "world_size": first.world.size,
            "ranks": list(first.world.ranks),
            "excluded": dict(first.world.excluded),
            "num_params": len(spec.params),
            "numel": sum(param.numel for param in spec.params),
            "step": first.step,
            "skipped_steps": first.skipped_steps,
            "sequence": first.sequence,
            "timeline": first.timeline,
            "scalars": dict(first.scalars),
            "kernel": first.kernel_identity,
            "size_bytes": [shard.size_bytes for shard in shards],
        }

    def history(self, last: int | None = None) -> Columns:
        """As :meth:`stepwell.Service.history`."""
        return self.group.shards[0].history.chronicle.columns(last)

    @overload
    def save(self, uri: str, *, keep_last: int | None = None, wait: Literal[True] = True) -> int: ...

    @overload
    def save(self, uri: str, *, keep_last: int | None = None, wait: Literal[False]) -> PendingSave: ...

    def save(self, uri: str, *, keep_last: int | None = None, wait: bool = True) -> int | PendingSave:
        """As :meth:`stepwell.Service.save`."""
        with self._saving:
            save = self._begin_save(uri, keep_last)
        if wait:
            return save.result()
        save.watch(ends_with_process=True)
        return save

    def restore(self, uri: str) -> int:
        """As :meth:`stepwell.Service.restore`; call ``optimizer.refresh()`` afterwards."""
        with self._replacing:
            manifest = read_complete(uri)
            check_restorable(manifest, self.group.spec, uri)
            with CheckpointReader(uri, manifest) as reader:
                reader.require_intact()
                self.group.take_batches(manifest.spec.batches)
                self.group.load(reader.source(), timeline=self.group.shards[0].timeline + 1)
        tell_of_other_kernels(manifest, self.group.shards[0].status().kernel_identity, uri)
        return manifest.step

    def checkpoints(self, uri: str) -> list[Checkpoint]:
        """As :meth:`stepwell.Service.checkpoints`."""
        return list_checkpoints(uri)

    def shutdown(self) -> None:
        """Forget the state, once a checkpoint of it that is being written is complete."""
        if self._pending is not None:
            self._pending.finish()
        self._group, self._saved = None, None

    def _begin_save(self, uri: str, keep_last: int | None) -> PendingSave:
        if self._pending is not None:
            self._pending.wait()
        spec, shards = self.group.spec, self.group.shards
        status = shards[0].status()
        to = Destination.of(uri, keep_last, status.step)
        if self._saved is not None and self._saved.serves(to.uri, spec, status):
            return PendingSave.complete(to.uri, status.step)
        write = functools.partial(self._write, [shard.snapshot() for shard in shards], to, spec)
        self._pending = PendingSave.in_thread(to.uri, status.step, write)
        return self._pending

    def _write(self, snapshots: Sequence[Snapshot], to: Destination, spec: JobSpec) -> None:
        """Write a checkpoint of what was kept, on a thread of its own."""
        save_id = uuid.uuid4().hex[:12]
        names = [shard_file_name(save_id, index, len(snapshots)) for index in range(len(snapshots))]
        is_complete = False
        try:
            files = [write_shard(snapshot, to.uri, name) for snapshot, name in zip(snapshots, names, strict=True)]
            with self._replacing:  # a restore of a checkpoint that this one replaces may be reading its files
                to.complete(build_manifest(spec, files, snapshots[0].status))
            is_complete = True
            self._saved = SavedCheckpoint.just_written(to.uri, spec, snapshots[0].status)
        finally:
            if not is_complete:
                for snapshot, name in zip(snapshots, names, strict=True):
                    snapshot.close("another shard could not write its part")
                    remove_file(to.uri, name)

    @property
    def group(self) -> ShardGroup:
        """The shards.

        Raises:
            NotRegisteredError: Before an optimizer has registered.
        """
        if self._group is None:
            raise NotRegisteredError("this in-process service has no job yet; give it to an optimizer")
        return self._group

    def register(self, spec: JobSpec) -> ShardGroup:
        """Lay out a job; called by the optimizer.

        Raises:
            JobMismatchError: If it serves another optimizer already, or there is more than one worker.
        """
        if self._group is not None:
            raise JobMismatchError("this in-process service has an optimizer already; make one service for each")
        if spec.world_size != 1:
            raise JobMismatchError(
                f"service 'inprocess' is for a single worker, got world_size {spec.world_size}; "
                "leave service out, or start one with `stepwell up NAME`"
            )
        spec = dataclasses.replace(spec, kernel=self._kernel)
        warm_up(spec, self._device)
        self._group = ShardGroup(spec, num_shards=self._num_shards, device=self._device)
        return self._group


class InProcessTransport(Transport):
    """The line to an :class:`InProcessService`.

    Args:
        service: The service.
    """

    reads_in_place = True

    def __init__(self, service: InProcessService) -> None:
        self.service: InProcessService = service

    def register(self, spec: JobSpec, rank: int, incarnation: str, holdings: Holdings | None) -> Registration:
        """See :class:`Transport`."""
        self.service.register(spec).admit(rank, incarnation, holdings)
        return self._registration(needs_parameters=True)

    def attach(self, layout: Layout, rank: int) -> None:
        """See :class:`Transport`."""
        self._layout, self._rank = layout, rank

    def load(self, values: PieceValues, header: LoadHeader) -> Registration:
        """See :class:`Transport`."""
        return self._load([values], header)

    def hand_in(self, values: PieceValues) -> Registration:
        """See :class:`Transport`; there is no other rank to wait for."""
        return self._load([values], LoadHeader())

    def extend(self, spec: JobSpec, holdings: Holdings | None, values: PieceValues) -> Registration:
        """See :class:`Transport`; there is no other rank to wait for."""
        self._extend(spec, {self._rank: holdings}, [values])
        return self._registration()

    def wait_until_loaded(self, after_timeline: int) -> Registration:
        """See :class:`Transport`; there is no other rank to wait for."""
        return self._registration()

    def refresh(self, rank: int, incarnation: str) -> Registration:
        """See :class:`Transport`."""
        return self._registration()

    def step(
        self, header: PushHeader, gradient: FlatBuffer, reloaded: Mapping[int, Tensor], params: FlatBuffer
    ) -> StepResult:
        """See :class:`Transport`."""
        shards = self.service.group.shards
        pushes = [
            Push(
                header,
                tuple(gradient.shard_pieces(self._layout, index, len(shards))),
                reloaded,
                Sink(params.part, tuple(params.shard_parts(self._layout, index, len(shards)))),
            )
            for index in range(len(shards))
        ]
        with _uninterrupted():
            result = self.service.group.push(pushes)
        if result is None:
            raise StepAbortedError(f"step {header.sequence}: the shards hold different pushes of it; call step() again")
        return result

    def decided(self, timeline: int, sequence: int) -> StepResult | None:
        """See :class:`Transport`."""
        return self.service.group.shards[0].result(timeline, sequence)

    def read_parameters(self, params: FlatBuffer) -> None:
        """See :class:`Transport`."""
        shards = self.service.group.shards
        for index, shard in enumerate(shards):
            shard.deliver(self._rank, Sink(params.part, tuple(params.shard_parts(self._layout, index, len(shards)))))

    def read_state(self) -> tuple[dict[tuple[int, str], Tensor], ShardStatus]:
        """See :class:`Transport`."""
        shards = self.service.group.shards
        pieces = [
            (piece.param, slot, piece.offset, values.cpu())
            for shard in shards
            for slot, piece, values in shard.buffers.export()
        ]
        return join_pieces(pieces), shards[0].status()

    def close(self, rank: int, world_size: int) -> None:
        """See :class:`Transport`."""
        self.service.shutdown()

    def _load(self, parts: Sequence[PieceValues], header: LoadHeader) -> Registration:
        group = self.service.group
        group.load(source_of(header, parts), timeline=group.shards[0].timeline + 1)
        return self._registration()

    def _extend(self, spec: JobSpec, holdings: Mapping[int, Holdings | None], parts: Sequence[PieceValues]) -> None:
        self.service.group.extend(spec, source_of(LoadHeader(), parts), holdings)

    def _registration(self, *, needs_parameters: bool = False) -> Registration:
        group = self.service.group
        return Registration.of(group.spec, group.shards[0].status(), needs_parameters=needs_parameters)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold a Ctrl-C back until the block is done: a step that is cut off half-way loses the state with it."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if held:
        handler(*held[0])
