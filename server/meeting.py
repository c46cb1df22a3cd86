"""Where the shards of one generation meet: the store through which gloo's members find each other, without a server.

Each member tells all others what it sets, by a Ray call, and keeps what it is told. c10d's TCPStore would need a port,
and it looks up the name of whoever connects; where no name server answers at once, that took five seconds in every
tenth forming.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch._C._distributed_c10d import Store  # torch.distributed's, with types

Tell = Callable[[str, bytes], None]
"""Sends a key and its value to all other members."""


class Meeting(Store):
    """One member's view; called by gloo in the thread that forms the group, while others' values come in by another."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, bytes] = {}
        self._has_changed = threading.Condition()
        self._tell: Tell | None = None
        self._timeout_s, self._is_over = 0.0, False

    def attend(self, tell: Tell, timeout_s: float) -> None:
        """Be a member: tell the others from now on. What they have told before counts.

        Args:
            tell: Reaches them.
            timeout_s: Limit of each wait for them.
        """
        self._tell, self._timeout_s = tell, timeout_s

    def note(self, key: str, value: bytes) -> None:
        """Keep what a member has set."""
        with self._has_changed:
            self._values[key] = value
            self._has_changed.notify_all()

    def end(self) -> None:
        """Let nobody wait any more: there is a later generation."""
        with self._has_changed:
            self._is_over = True
            self._has_changed.notify_all()

    def set(self, key: str, value: str | bytes) -> None:
        """Set a value for all members; gloo sets bytes."""
        assert self._tell is not None, "a member attends before it sets anything"
        packed = value.encode() if isinstance(value, str) else bytes(value)
        self.note(key, packed)
        self._tell(key, packed)

    def get(self, key: str) -> bytes:
        """A value, once some member has set it.

        Raises:
            TimeoutError: If none did in time.
        """
        self.wait([key])
        return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all of ``keys`` are set.

        Raises:
            TimeoutError: If one is not in time, or the meeting was ended.
        """
        limit_s, wanted = self._timeout_s if timeout is None else timeout.total_seconds(), set(keys)
        with self._has_changed:
            self._has_changed.wait_for(lambda: self._is_over or self._values.keys() >= wanted, limit_s)
            missing = sorted(wanted - self._values.keys())
        if missing:
            why = "a later generation is being formed" if self._is_over else f"waited {limit_s:g} s"
            raise TimeoutError(f"{why}; other shards have not told {missing}")
