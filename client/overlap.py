"""Gradients that are copied within backward, by hooks, as soon as each has been accumulated."""

from __future__ import annotations

import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .gathering import Seen
from .streaming import PieceStream

logger = logging.getLogger("stepwell")

MIN_NUMEL = 2**15
"""A hook costs about ten microseconds, in which so many elements are copied: smaller gradients are left to the step."""

MAX_USELESS_STEPS = 3
"""After so many steps in a row in which every gradient had changed since its hook, there are no more hooks."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Copied:
    """A gradient that was copied, and what tells whether it still is what it was."""

    param: Tensor
    grad: Tensor
    version: int
    seen: Seen

    @property
    def is_valid(self) -> bool:
        """Whether the parameter has this very gradient, and nothing has written it since."""
        return self.param.grad is self.grad and self.grad._version == self.version


class EarlyCopies:
    """Hooks that copy gradients while backward still has them in the cache.

    Args:
        params: The parameters whose gradients are to be copied, by place in the buffer.
        copy: Copies a gradient to a place of the buffer.
        stream: Is told of each copy; None if gradients are only pushed.

    Attributes:
        copy: As above.
        may_copy: Whether the buffer is free: the shards may read it from a push until its step is settled.
    """

    def __init__(
        self, params: Mapping[int, Tensor], copy: Callable[[int, Tensor], Seen], stream: PieceStream | None = None
    ) -> None:
        self.may_copy = True
        self.copy, self._stream = copy, stream
        # A small gradient that was left to the step would keep the piece that it is in.
        min_numel = MIN_NUMEL if stream is None else 1
        self._copied: dict[int, _Copied] = {}
        self._num_useless = 0
        # Parameters outlive their optimizer, and what they refer to lives with them.
        mine = weakref.ref(self)
        self._handles: list[RemovableHandle] = []
        for place, param in params.items():
            if param.requires_grad and param.numel() >= min_numel:
                hook = functools.partial(_on_accumulated, mine, place)
                self._handles.append(param.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def take(self) -> dict[int, Seen]:
        """The copies that are as good as ones made now: place to what a look has left. All are forgotten.

        Else they would keep gradients alive that nobody else needs.
        """
        copied, self._copied = self._copied, {}
        taken = {place: each.seen for place, each in copied.items() if each.is_valid}
        if copied:
            self._num_useless = 0 if taken else self._num_useless + 1
            if self._num_useless == MAX_USELESS_STEPS:
                self.close()
                logger.info(
                    "overlap: in %d steps every gradient was changed after backward's hook, as by clipping, a gradient "
                    "scaler's unscale_ or DistributedDataParallel; from now on step() copies them",
                    MAX_USELESS_STEPS,
                )
        return taken

    def forget(self) -> None:
        """Take no copy that was made so far, as something may have changed gradients unseen."""
        self._copied = {place: dataclasses.replace(each, version=-1) for place, each in self._copied.items()}

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._copied = [], {}

    def on_accumulated(self, place: int, param: Tensor) -> None:
        """Copy a gradient that backward has just finished with; again, if another backward adds to it."""
        grad = param.grad
        if self.may_copy and grad is not None and grad.layout is torch.strided:
            self._copied[place] = _Copied(param, grad, grad._version, self.copy(place, grad))
            if self._stream is not None:
                self._stream.written(place)


def _on_accumulated(reference: weakref.ref[EarlyCopies], place: int, param: Tensor) -> None:
    copies = reference()
    if copies is not None:
        with torch.no_grad():
            copies.on_accumulated(place, param)
