"""A limit of time that begins once, and ends with something to do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Countdown:
    """Lives on an event loop.

    Args:
        limit_s: Seconds from its beginning to its end.
        then: Called at the end.
    """

    def __init__(self, limit_s: float, then: Callable[[], None]) -> None:
        self._limit_s, self._then = limit_s, then
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Begin, unless it has begun."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._limit_s, self._end)

    def stop(self) -> None:
        """Be as if it had not begun."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _end(self) -> None:
        self._timer = None
        self._then()
