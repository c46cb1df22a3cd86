"""Which coordinator a shard obeys: the one of the newest epoch that it has heard of.

See *Note: Epochs* in docs/design.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from ..sharding.errors import EpochError

P = ParamSpec("P")
R = TypeVar("R")


class Fence:
    """A shard's end of it.

    Args:
        shard: The shard's index, for messages.

    Attributes:
        epoch: Of the newest coordinator that the shard has heard of; 0 before the first one.
        changing: Held by what changes the shard's job or state.
    """

    def __init__(self, shard: int) -> None:
        self._shard = shard
        self.epoch = 0
        self.changing = asyncio.Lock()

    def begin(self, epoch: int) -> None:
        """Obey the coordinator of ``epoch`` from now on.

        Raises:
            EpochError: If another one of this epoch or a newer one is obeyed already.
        """
        if epoch <= self.epoch:
            raise EpochError(f"shard {self._shard}: expected an epoch after {self.epoch}, got {epoch}")
        self.epoch = epoch

    def require(self, epoch: int) -> None:
        """Refuse a coordinator that was replaced. A shard that was restarted takes the word of the first that comes.

        Raises:
            EpochError: If it is of an older epoch.
        """
        if epoch < self.epoch:
            raise EpochError(
                f"shard {self._shard}: expected a call of the coordinator of epoch {self.epoch}, got one of epoch "
                f"{epoch}, which was replaced. Ask the service's present coordinator"
            )
        self.epoch = epoch


class Fenced(Protocol):
    """What stands behind a fence."""

    fence: Fence


F = TypeVar("F", bound=Fenced)


def of_coordinator(
    method: Callable[Concatenate[F, P], Awaitable[R]],
) -> Callable[Concatenate[F, int, P], Coroutine[Any, Any, R]]:
    """Give a method the epoch of the coordinator that calls it as its first argument, checked before it begins."""

    async def checked(self: F, epoch: int, /, *args: P.args, **keywords: P.kwargs) -> R:
        self.fence.require(epoch)
        return await method(self, *args, **keywords)

    return _named_after(method, checked)


def change_of_coordinator(
    method: Callable[Concatenate[F, P], Awaitable[R]],
) -> Callable[Concatenate[F, int, P], Coroutine[Any, Any, R]]:
    """As :func:`of_coordinator`, for what changes the job or the state: one such call at a time.

    The epoch is checked when the method's turn has come. So who takes over waits for the changes that are under way,
    and none begins after it.
    """

    async def checked(self: F, epoch: int, /, *args: P.args, **keywords: P.kwargs) -> R:
        async with self.fence.changing:
            self.fence.require(epoch)
            return await method(self, *args, **keywords)

    return _named_after(method, checked)


def _named_after(method: Callable[..., Any], checked: Callable[P, R]) -> Callable[P, R]:
    # Not functools.wraps, after which Ray would take the method's arguments for those of what is called.
    checked.__name__, checked.__qualname__, checked.__doc__ = method.__name__, method.__qualname__, method.__doc__
    return checked
