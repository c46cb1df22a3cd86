"""Trying again for a while, and saying so."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from ..sharding.errors import CheckpointRestoreNeededError, ServiceTimeoutError, ShardLostError, StepwellError

logger = logging.getLogger("stepwell")

T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 0.2
"""Between two tries; each is twice the one before. A pause may begin just when the shard is back."""


class Patience:
    """How long to go on with something that fails, while what makes it fail is being mended.

    Args:
        limit_s: Seconds; 0 if nothing mends it.
        what: Names it in messages, such as ``"rank 0, step 7"``.
    """

    def __init__(self, limit_s: float, what: str) -> None:
        self._limit_s, self._what = limit_s, what
        self._began, self._pause_s, self._num_tries = time.monotonic(), FIRST_PAUSE_S, 0

    def go_on_with(self, action: Callable[[], T]) -> T:
        """Do something, again as long as a shard is lost."""
        while True:
            try:
                return action()
            except ShardLostError as error:
                self.wait(error)

    def wait(self, error: StepwellError) -> None:
        """Wait before another try, after one that ended with ``error``.

        Raises:
            StepwellError: ``error`` itself, if nothing mends it.
            ServiceTimeoutError: If it has been long enough.
        """
        if self._limit_s == 0 or isinstance(error, CheckpointRestoreNeededError):
            raise error
        self._num_tries += 1
        waited_s = time.monotonic() - self._began
        if waited_s + self._pause_s > self._limit_s:
            raise ServiceTimeoutError(
                f"{self._what}: given up after {self._num_tries} tries in {waited_s:.0f} s; the last one: {error}"
            ) from error
        if self._num_tries == 1:
            happened, _, _ = str(error).partition(". ")  # behind it stands what to do if nobody did it
            logger.warning("%s: waiting for the service to bring back what it has lost (%s)", self._what, happened)
        time.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def done(self) -> None:
        """Say that it has succeeded, if it was to be waited for."""
        if self._num_tries:
            logger.warning("%s: going on after %.1f s", self._what, time.monotonic() - self._began)


def patiently(action: Callable[[], T], limit_s: float, what: str) -> T:
    """Do something, with shards that are lost once they are back; see :class:`Patience`."""
    patience = Patience(limit_s, what)
    done = patience.go_on_with(action)
    patience.done()
    return done
