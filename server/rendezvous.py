"""A point where every rank arrives before something is done, once for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any, Generic, TypeVar

from ..sharding.errors import ServiceTimeoutError

Brought = TypeVar("Brought")
Result = TypeVar("Result")


class Rendezvous(Generic[Brought, Result]):
    """Collects what each rank brings; when the last one is in, acts once and gives all the same result or error.

    Args:
        act: Called with what every rank brought.
        what: Names the wait in messages.
    """

    def __init__(self, act: Callable[[Mapping[int, Brought]], Coroutine[Any, Any, Result]], *, what: str) -> None:
        self._act, self._what = act, what
        self._brought: dict[int, tuple[Brought]] = {}
        self._acting: asyncio.Future[asyncio.Task[Result]] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nobody waits here."""
        return not self._brought

    def forget(self, rank: int) -> None:
        """Drop what a rank brought: another process has taken its place."""
        self._brought.pop(rank, None)

    def forget_all(self) -> None:
        """Drop what every rank brought; who waits, waits in vain."""
        self._brought, self._acting = {}, None

    async def arrive(self, rank: int, brought: Brought, *, ranks: Collection[int], timeout_s: float) -> Result:
        """Wait for the other ranks, then for the result. A rank that comes again replaces what it brought.

        Args:
            rank: Who arrives.
            brought: With what.
            ranks: All that are to come.
            timeout_s: How long it waits for them.

        Raises:
            ServiceTimeoutError: If ranks are missing after ``timeout_s``; the message names them.
        """
        if self._acting is None:
            self._acting = asyncio.get_running_loop().create_future()
        acting = self._acting
        self._brought[rank] = mine = (brought,)
        if self._brought.keys() >= set(ranks):
            everything = {rank: its for rank, (its,) in self._brought.items()}
            self._brought, self._acting = {}, None
            acting.set_result(asyncio.create_task(self._act(everything)))
        try:
            task = await asyncio.wait_for(asyncio.shield(acting), timeout_s)
        except TimeoutError as error:
            missing = sorted(set(ranks) - self._brought.keys())
            if self._brought.get(rank) is mine:
                del self._brought[rank]
            raise ServiceTimeoutError(f"waited {timeout_s:g} s for {self._what}; missing ranks: {missing}") from error
        return await asyncio.shield(task)
