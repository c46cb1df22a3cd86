"""Who is told what of which step: futures of outcomes, on a shard actor's event loop."""

from __future__ import annotations

import asyncio
import dataclasses

from ..sharding.errors import AttemptError, StepwellError
from ..sharding.push import PushKey
from ..sharding.reports import StepResult

Outcome = StepResult | StepwellError


@dataclasses.dataclass(frozen=True, slots=True)
class _Promise:
    """What the sender of a push is told: what comes of its step, unless another push takes this one's place."""

    key: PushKey
    of_step: asyncio.Future[Outcome]
    told: asyncio.Future[Outcome]

    def keep(self, of_step: asyncio.Future[Outcome]) -> None:
        """Tell it."""
        self.told.set_result(of_step.result())


class Outcomes:
    """What will be told to those who wait: of the step under way, of the next one, of each rank's push.

    One push of each rank waits. So who tries a step again and again while another rank is slow leaves nothing behind.
    """

    def __init__(self) -> None:
        self._of_step: asyncio.Future[Outcome] | None = None
        self._of_next: asyncio.Future[Outcome] | None = None
        self._of_push: dict[int, _Promise] = {}

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
        held = self._of_push.get(rank)
        if held is None or held.of_step.done() or held.told.done() or held.key != key:
            self.withdraw(rank, AttemptError(f"rank {rank}: a newer attempt at this step has come; that one counts"))
            held = _Promise(key, self.next, asyncio.get_running_loop().create_future())
            held.of_step.add_done_callback(held.keep)
            self._of_push[rank] = held
        return held.told

    def withdraw(self, rank: int, error: StepwellError) -> None:
        """Tell an error to who waits with a rank's push for the step that has not begun: it is not held any more."""
        held = self._of_push.get(rank)
        if held is not None and held.of_step is self._of_next and not held.told.done():
            held.of_step.remove_done_callback(held.keep)
            held.told.set_result(error)

    def begin(self) -> asyncio.Future[Outcome]:
        """The next step is under way now; whoever runs it sets what is returned."""
        self._of_step, self._of_next = self.next, None
        return self._of_step

    def dismiss(self, error: StepwellError) -> None:
        """Tell an error to all who wait for the step that has not begun."""
        waiting, self._of_next = self.next, None
        waiting.set_result(error)
