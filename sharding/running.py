"""One shard's step under way, driven from sum to sum."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from torch import Tensor

from .reports import StepResult

Reduction = Generator[Tensor, Tensor, StepResult]
"""Yields a vector, is sent its sum over all shards, returns the result."""


class RunningStep:
    """A step that rests wherever it waits for a sum, as long as it takes to come: under another group, if need be.

    Args:
        step: Of :meth:`Shard.step`; it runs up to its first vector.

    Attributes:
        vector: What is to be summed over all shards next, and must not be written; None once the step is done.
        result: What came of it; None until then.
    """

    def __init__(self, step: Reduction) -> None:
        self._step: Generator[Tensor, Any, StepResult] = step
        self.vector: Tensor | None = None
        self.result: StepResult | None = None
        self._send(None)

    def take(self, total: Tensor) -> None:
        """Go on with the sum of :attr:`vector` over all shards."""
        assert self.vector is not None, "asked for a step that waits"
        self._send(total)

    def close(self) -> None:
        """Give the step up; after a COMMIT the shard's state is lost with it."""
        self._step.close()

    def _send(self, total: Tensor | None) -> None:
        try:
            self.vector = self._step.send(total)
        except StopIteration as stop:
            self.vector, self.result = None, stop.value
