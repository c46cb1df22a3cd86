"""Requests that come while others are served are served together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from ..sharding.errors import StepwellError

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class Together(Generic[Asked, Answer]):
    """Collects what is asked until its turn has come, and serves all of it at once; lives on an event loop.

    So thousands of workers that come at the same time cost one round of calls to the shards, and not one each.

    Args:
        turn: Held while something is served.
        serve: Called with all that was asked before its turn came, in that order; gives an answer or an error for each.
    """

    def __init__(
        self, turn: asyncio.Lock, serve: Callable[[Sequence[Asked]], Awaitable[Sequence[Answer | StepwellError]]]
    ) -> None:
        self._turn, self._serve = turn, serve
        self._waiting: list[Asked] = []
        self._serving: asyncio.Task[Sequence[Answer | StepwellError]] | None = None

    async def ask(self, asked: Asked) -> Answer:
        """Wait for the answer.

        Raises:
            StepwellError: The error that is the answer, or with which serving has failed.
        """
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve_waiting())
        serving, place = self._serving, len(self._waiting)
        self._waiting.append(asked)
        answer = (await asyncio.shield(serving))[place]
        if isinstance(answer, StepwellError):
            raise answer
        return answer

    async def _serve_waiting(self) -> Sequence[Answer | StepwellError]:
        async with self._turn:
            waiting, self._waiting, self._serving = self._waiting, [], None
            return await self._serve(waiting)
