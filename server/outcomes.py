"""Who is told what of which step: futures of outcomes, on a shard actor's event loop."""

from __future__ import annotations

import asyncio

from ..sharding.errors import StepwellError
from ..sharding.reports import StepResult

Outcome = StepResult | StepwellError
PushKey = tuple[int, int, str, int]
"""Timeline, sequence number, incarnation and attempt."""


class Outcomes:
    """What will be told to those who wait: of the step under way, of the next one, of each rank's push."""

    def __init__(self) -> None:
        self._of_step: asyncio.Future[Outcome] | None = None
        self._of_next: asyncio.Future[Outcome] | None = None
        self._of_push: dict[int, tuple[PushKey, asyncio.Future[Outcome]]] = {}

    @property
    def next(self) -> asyncio.Future[Outcome]:
        """Of the step that has not begun."""
        if self._of_next is None:
            self._of_next = asyncio.get_running_loop().create_future()
        return self._of_next

    @property
    def first(self) -> asyncio.Future[Outcome]:
        """What will be told first: of the step that is under way, else of the next one."""
        running = self._of_step
        return running if running is not None and not running.done() else self.next

    def promise(self, rank: int, key: PushKey) -> asyncio.Future[Outcome]:
        """Of a push that was taken in for the next step; a repeat is told what the first one is."""
        known, outcome = self._of_push.get(rank, (None, None))
        if outcome is None or outcome.done() or known != key:
            outcome = self.next
            self._of_push[rank] = key, outcome
        return outcome

    def begin(self) -> asyncio.Future[Outcome]:
        """The next step is under way now; whoever runs it sets what is returned."""
        self._of_step, self._of_next = self.next, None
        return self._of_step

    def dismiss(self, error: StepwellError) -> None:
        """Tell an error to all who wait for the step that has not begun."""
        waiting, self._of_next = self.next, None
        waiting.set_result(error)
