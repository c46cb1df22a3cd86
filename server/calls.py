"""Waiting for Ray: every wait has a limit, and every failure becomes one of our errors."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from ..sharding.errors import ServiceTimeoutError, ShardLostError, StepwellError


def wait_for(refs: Sequence[Any], *, timeout_s: float, what: str) -> list[Any]:
    """Wait for actor calls, outside of an event loop.

    Args:
        refs: Ray object references.
        timeout_s: Limit for all of them together.
        what: Names the wait in messages, such as ``"the shards to take the push of step 3"``.

    Raises:
        StepwellError: Whatever the service raised.
        ServiceTimeoutError: If the limit ran out.
        ShardLostError: If an actor died.
    """
    try:
        results: list[Any] = ray.get(list(refs), timeout=timeout_s)
    except (RayTaskError, RayActorError, GetTimeoutError) as error:
        raise translate(error, timeout_s=timeout_s, what=what) from None
    return results


def wait_for_all(
    refs: Sequence[Any], *, refusal: Callable[[Any], StepwellError | None], timeout_s: float, what: str
) -> list[Any]:
    """As :func:`wait_for`, but the first reply that is a refusal is raised at once and the other calls are cancelled.

    Args:
        refs: Ray object references.
        refusal: The error in a reply, if it is a refusal.
        timeout_s: Limit for all of them together.
        what: Names the wait in messages.
    """
    deadline, left, replies = time.monotonic() + timeout_s, list(refs), {}
    try:
        while left:
            ready, left = ray.wait(left, timeout=max(deadline - time.monotonic(), 0.0))
            if not ready:
                raise translate(GetTimeoutError(), timeout_s=timeout_s, what=what)
            for ref in ready:
                replies[ref] = wait_for([ref], timeout_s=timeout_s, what=what)[0]
                error = refusal(replies[ref])
                if error is not None:
                    raise error
    except StepwellError:
        for ref in left:
            ray.cancel(ref)
        raise
    return [replies[ref] for ref in refs]


async def gather(refs: Sequence[Any], *, timeout_s: float, what: str) -> list[Any]:
    """As :func:`wait_for`, on an actor's event loop."""
    try:
        return list(await asyncio.wait_for(asyncio.gather(*refs), timeout_s))
    except (RayTaskError, RayActorError, TimeoutError) as error:
        raise translate(error, timeout_s=timeout_s, what=what) from None


def resolved(ref: Any, *, what: str) -> Future[None]:
    """An actor call without a result as a future of this process, which has no limit of its own."""
    resolved_future: Future[None] = Future()

    def resolve(call: Future[None]) -> None:
        error = call.exception()
        if error is None:
            resolved_future.set_result(None)
        else:
            resolved_future.set_exception(translate(error, timeout_s=math.inf, what=what))

    ref.future().add_done_callback(resolve)
    return resolved_future


def translate(error: BaseException, *, timeout_s: float, what: str) -> BaseException:
    """The error of ours that a failed wait means."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return cause if isinstance(cause, StepwellError) else error
    if isinstance(error, RayActorError):
        return ShardLostError(
            f"a process of the service died while waiting for {what}. Restore its last checkpoint: "
            "service.restore(URI), then optimizer.refresh() on every rank; or stepwell.launch(..., restore=URI)"
        )
    return ServiceTimeoutError(f"waited {timeout_s:g} s for {what}; see `stepwell status`")
