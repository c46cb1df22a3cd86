"""Changes of a shard's state that are prepared first and taken later, when every shard has prepared them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable

from ..sharding.errors import NotRegisteredError

NUM_REMEMBERED = 64
"""How many of the last requests are known for repeats."""


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """A load, a restore or an added group; see *Note: Changes that are all or nothing* in docs/design.md.

    Attributes:
        timeline: The one that it begins.
        request: Names what was asked for, so that who asks again gets it once.
        take: Does it, in the thread for arithmetic. It begins the timeline at its very end.
    """

    timeline: int
    request: str
    take: Callable[[], None]


class Changes:
    """What a shard has prepared, and what it has taken.

    Args:
        shard: The shard's index, for messages.
    """

    def __init__(self, shard: int) -> None:
        self._shard = shard
        self._prepared: Change | None = None
        self._taken: collections.deque[str] = collections.deque(maxlen=NUM_REMEMBERED)

    @property
    def prepared(self) -> int | None:
        """The timeline of the change that waits to be taken; None if none does."""
        return None if self._prepared is None else self._prepared.timeline

    @property
    def taken(self) -> tuple[str, ...]:
        """The requests of the changes that were taken last."""
        return tuple(self._taken)

    def recall(self, taken: Iterable[str]) -> None:
        """Take over what the process before this one had taken."""
        self._taken.extend(taken)

    def prepare(self, change: Change) -> None:
        """Keep a change until it is taken or dropped, in place of the one before."""
        self._prepared = change

    def drop(self) -> None:
        """Drop what was not taken."""
        self._prepared = None

    def pop(self, timeline: int) -> Change:
        """The change that begins ``timeline``, which is to be taken now.

        Raises:
            NotRegisteredError: If it was not prepared here.
        """
        change, self._prepared = self._prepared, None
        if change is None or change.timeline != timeline:
            raise NotRegisteredError(
                f"shard {self._shard} has nothing prepared for timeline {timeline}; restore the service from its last "
                "checkpoint with service.restore(URI)"
            )
        return change

    def note(self, change: Change) -> None:
        """Remember that a change was taken."""
        self._taken.append(change.request)
