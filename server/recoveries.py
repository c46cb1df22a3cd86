"""What bringing shards back took."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, slots=True)
class Recovery:
    """How shards were brought back.

    Attributes:
        shards: Which.
        seconds: What it took, by part: ``restart`` until their processes had been started again and had imported torch,
            ``rebuild`` until they were what they had been, ``rest`` until all had left their group, ``form`` until the
            next one stood, ``resume`` until all had gone on with the step under way.
    """

    shards: tuple[int, ...]
    seconds: Mapping[str, float]

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in self.seconds.items())
        return f"shards {list(self.shards)} are back after {sum(self.seconds.values()):.2f} s: {parts}"


@dataclasses.dataclass(frozen=True, slots=True)
class Recoveries:
    """How often shards were brought back, and the last time."""

    count: int = 0
    last: Recovery | None = None


class Parts:
    """Seconds by part, one after the other; on an event loop."""

    def __init__(self) -> None:
        self._clock = asyncio.get_running_loop().time
        self._began, self.seconds = self._clock(), dict[str, float]()

    def end(self, part: str) -> None:
        """The part that is named has ended, and the next one begins."""
        now = self._clock()
        self.seconds[part], self._began = now - self._began, now
