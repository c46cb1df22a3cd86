"""The workers that a shard has admitted, and what each of them pushes and holds of the shard's tiles."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..optim import TILE_NUMEL
from .buffers import Buffers
from .clipping import check_clipping
from .coverage import Coverage, Holdings, Part, Range, Runs, coverage_of
from .errors import HyperparameterError, IncarnationError, MessageError
from .job import JobSpec
from .layout import Layout, ParamSpec
from .push import Push, check_gradient, check_hyper, unpack_present


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """One rank's worker.

    Attributes:
        incarnation: Names its process.
        holdings: What it registered to hold of a sharded model.
        pushed, held: Per extent, the runs of what it pushes and of what it holds, counted from the first owned tile.
        padding: Per extent, where padding lies in what it pushes, packed.
        has_left: Whether it has said goodbye.
    """

    incarnation: str
    holdings: Holdings | None
    pushed: Sequence[Runs]
    held: Sequence[Runs]
    padding: Sequence[Tensor]
    has_left: bool = False

    @property
    def pushed_numels(self) -> list[int]:
        """Per extent, how many elements it pushes."""
        return [int((runs[:, 1] - runs[:, 0]).sum()) for runs in self.pushed]

    def runs(self, part: Part) -> Sequence[Runs]:
        """One of the two."""
        return self.pushed if part == "pushed" else self.held

    def reloaded_range(self, index: int, param: ParamSpec) -> Range:
        """The part of a parameter that it sends when it was changed by hand."""
        return Range(0, param.numel) if self.holdings is None else self.holdings.pushed[index]


class Members:
    """The admitted workers of one job under one layout.

    Args:
        spec: The job.
        layout: Its flat space.
        buffers: The shard's memory, for the tiles that it owns.
    """

    def __init__(self, spec: JobSpec, layout: Layout, buffers: Buffers) -> None:
        self._spec, self._layout, self._buffers = spec, layout, buffers
        self._hyper_names = sorted(spec.rule.hyper(spec.rule.defaults()))
        self._by_rank: dict[int, Member] = {}

    def __getitem__(self, rank: int) -> Member:
        """The worker admitted as ``rank``.

        Raises:
            IncarnationError: If there is none.
        """
        if rank not in self._by_rank:
            raise IncarnationError(f"rank {rank}: no worker has registered as this rank since the job's last change")
        return self._by_rank[rank]

    @property
    def by_rank(self) -> Mapping[int, Member]:
        """All admitted workers."""
        return self._by_rank

    def admit(self, rank: int, incarnation: str, holdings: Holdings | None) -> bool:
        """Let a worker's process push as ``rank``; an earlier one no longer may. Whether there was another."""
        known = self._by_rank.get(rank)
        coverages = coverage_of(self._layout, self._spec.gradients, rank, self._spec.world_size, holdings)
        pushed, held = (self._own_runs(coverage) for coverage in coverages)
        padding = [extent.padding_in(runs) for extent, runs in zip(self._buffers.extents, pushed, strict=True)]
        self._by_rank[rank] = Member(incarnation, holdings, pushed, held, padding)
        return known is None or known.incarnation != incarnation

    def leave(self, rank: int) -> None:
        """Note that a worker has said goodbye; nothing if there is none."""
        if rank in self._by_rank:
            self._by_rank[rank] = dataclasses.replace(self._by_rank[rank], has_left=True)

    def require_incarnation(self, rank: int, incarnation: str) -> None:
        """Refuse a request of another process than the one admitted.

        Raises:
            IncarnationError: If it is of another, or none is admitted, or it has left.
        """
        known = self[rank]
        if known.incarnation != incarnation:
            raise IncarnationError(
                f"rank {rank}: expected a push of process {known.incarnation}, got one of {incarnation}; "
                "another process has registered as this rank since"
            )
        if known.has_left:
            raise IncarnationError(f"rank {rank}: process {incarnation} has left, or was dismissed; end it")

    def check_content(self, push: Push, *, is_heard: bool) -> None:
        """Refuse a push that the job or its rank's runs do not fit.

        Args:
            push: The push.
            is_heard: Whether its rank says what holds for the whole step, see :meth:`World.is_heard`.

        Raises:
            RequestError: One of its subclasses, by what is off.
            HyperparameterError: If a hyperparameter, scalar, limit or scale cannot be.
        """
        header = push.header
        check_hyper(header, self._hyper_names, self._spec.num_groups, is_heard=is_heard)
        check_clipping(header, is_heard=is_heard)
        unpack_present(header.present, len(self._spec.params))
        self._check_gradient(push)
        if push.sink is not None:
            push.sink.require_fits(self[header.rank].runs(push.sink.part), header.rank)
        self._check_reloaded(push, is_heard=is_heard)
        if header.scalars and not is_heard:
            raise MessageError(f"scalars: expected from rank 0 alone, got some from rank {header.rank}")
        try:
            self._spec.rule.check_scalars(header.scalars or {}, self._spec.num_groups)
        except ValueError as error:
            raise HyperparameterError(str(error)) from error

    def _check_gradient(self, push: Push) -> None:
        """Refuse a gradient that is not laid out as its rank's runs, or holds something between tensors."""
        rank, member = push.header.rank, self[push.header.rank]
        extents = check_gradient(push.gradient, member.pushed_numels, rank, may_be_cut=self._spec.gradients == "local")
        for pieces, padding in zip(extents, member.padding, strict=True):
            if any(bool(values.any()) for values in _between_tensors(pieces, padding)):
                raise MessageError(
                    f"gradient of rank {rank}: expected zeros between tensors; the layout is not the shard's"
                )

    def _check_reloaded(self, push: Push, *, is_heard: bool) -> None:
        """Refuse parameters changed by hand that are not the job's, not this rank's to send, or not finite."""
        rank, member = push.header.rank, self[push.header.rank]
        if push.reloaded and not is_heard and self._spec.gradients != "sharded":
            raise MessageError(f"reloaded parameters: expected from rank 0 alone, got some from rank {rank}")
        for index, value in push.reloaded.items():
            is_known = 0 <= index < len(self._spec.params)
            if not is_known or value.shape != (member.reloaded_range(index, self._spec.params[index]).numel,):
                raise MessageError(f"reloaded: parameter {index} of shape {list(value.shape)} is not one of the job's")
            if not bool(torch.isfinite(value).all()):
                raise MessageError(
                    f"reloaded: parameter {index} was changed by hand and holds inf or NaN; mend it first"
                )

    def _own_runs(self, coverage: Coverage) -> list[Runs]:
        owned = (extent.tiles for extent in self._buffers.extents)
        return [
            coverage.within(index, tiles.start * TILE_NUMEL, tiles.stop * TILE_NUMEL)[0]
            for index, tiles in enumerate(owned)
        ]


def _between_tensors(pieces: Sequence[Tensor], padding: Tensor) -> Iterator[Tensor]:
    """What an extent's pieces hold in the places of padding."""
    starts = [0, *itertools.accumulate(map(len, pieces))]
    edges = torch.searchsorted(padding, torch.tensor(starts, device="cpu")).tolist()
    for piece, start, first, last in zip(pieces, starts, edges, edges[1:], strict=False):
        if first < last:
            yield piece.index_select(0, (padding[first:last] - start).to(piece.device))
