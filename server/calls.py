"""Waiting for Ray: every wait has a limit, and every failure becomes one of our errors."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

from ..sharding.errors import EpochError, ServiceNotFoundError, ServiceTimeoutError, ShardLostError, StepwellError

RECONNECT_TIMEOUT_S = 120.0
"""How long who calls a coordinator waits for one that is being started again."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
"""Between two tries; each is twice the one before."""
PROBE_S = 0.1
"""Between two calls to an actor that is being started again."""

untyped_ray: Any = ray  # some of its functions have no types


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
            # Not what the call has others do for it: a shard's step goes on, though nobody waits for it.
            ray.cancel(ref, recursive=False)
        raise
    return [replies[ref] for ref in refs]


async def gather(refs: Sequence[Any], *, timeout_s: float, what: str) -> list[Any]:
    """As :func:`wait_for`, on an actor's event loop."""
    try:
        return list(await asyncio.wait_for(asyncio.gather(*refs), timeout_s))
    except (RayTaskError, RayActorError, TimeoutError) as error:
        raise translate(error, timeout_s=timeout_s, what=what) from None


async def until_started(actor: Any, *, timeout_s: float, what: str) -> None:
    """Wait until an actor answers that may be being started again.

    A call to one that is fails a second after it was made, unless the actor is there by then, and is answered at once
    when it is. So calls are made every now and then, whatever becomes of those before.

    Args:
        actor: Its handle.
        timeout_s: Limit for the first answer.
        what: Names the wait in messages.

    Raises:
        ShardLostError: If the actor has ended for good, or is no shard any more.
        ServiceTimeoutError: If the limit ran out.
    """
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def probe() -> None:
        try:
            await actor.status.remote()
        except ActorUnavailableError:
            return
        except (RayTaskError, ActorDiedError, ShardLostError) as error:
            is_over = not isinstance(error, ActorDiedError) or await asyncio.to_thread(has_ended, actor)
            if is_over and not ended.done():
                ended.set_exception(translate(error, timeout_s=timeout_s, what=what))
        else:
            if not ended.done():
                ended.set_result(None)

    probes, deadline = set[asyncio.Task[None]](), asyncio.get_running_loop().time() + timeout_s
    while not ended.done():
        if asyncio.get_running_loop().time() > deadline:
            raise translate(TimeoutError(), timeout_s=timeout_s, what=what)
        probes.add(asyncio.create_task(probe()))
        await asyncio.wait([ended], timeout=PROBE_S)
    await ended


def has_ended(actor: Any) -> bool:
    """Whether an actor that is said to have died has ended for good; asks Ray.

    Calls to an actor on a node that was drained fail in this way while Ray starts it on another node, too.
    """
    state: str = untyped_ray._private.state.actors(actor._actor_id.hex()).get("State", "DEAD")
    return state == "DEAD"


async def until_ended(call: Any) -> None:
    """Wait for a call that may take for ever, or until its actor's process has ended, or has by now."""
    with contextlib.suppress(RayActorError, ShardLostError):
        await call


def ask(coordinator: Any, method: str, *args: Any, timeout_s: float, what: str) -> Any:
    """Call a method of a service's coordinator; once more if it was started again meanwhile.

    Asking twice does no harm: what a coordinator is asked for is done once, and its successors know.

    Args:
        coordinator: Its handle.
        method: The method.
        args: What it takes.
        timeout_s: Limit for the answer.
        what: Names the service and the wait in messages.

    Raises:
        StepwellError: Whatever the service raised.
        ServiceTimeoutError: If the limit ran out, or no coordinator came back within :data:`RECONNECT_TIMEOUT_S`.
        ServiceNotFoundError: If the service has ended.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        call = getattr(coordinator, method).remote(*args)
        try:
            return ray.get(call, timeout=max(deadline - time.monotonic(), 0.0))
        except (ActorUnavailableError, ActorDiedError, EpochError) as error:
            if isinstance(error, ActorDiedError) and has_ended(coordinator):
                raise _ended(what) from None
            _await_coordinator(coordinator, f"{what} (`{method}`)")
        except (RayTaskError, GetTimeoutError) as error:
            raise translate(error, timeout_s=timeout_s, what=what) from None


def _await_coordinator(coordinator: Any, what: str) -> None:
    """Wait until a coordinator answers that is being started again."""
    deadline, pause_s = time.monotonic() + RECONNECT_TIMEOUT_S, FIRST_PAUSE_S
    while True:
        try:
            ray.get(coordinator.describe.remote(), timeout=max(deadline - time.monotonic(), 0.0))
            return
        except (ActorUnavailableError, ActorDiedError, GetTimeoutError) as error:
            if isinstance(error, ActorDiedError) and has_ended(coordinator):
                raise _ended(what) from None
            if time.monotonic() + pause_s > deadline:
                raise ServiceTimeoutError(
                    f"{what}: the coordinator is gone, and none was back within {RECONNECT_TIMEOUT_S:g} s; training "
                    "goes on without it. See whether the cluster has room for it, and ask again"
                ) from None
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _ended(what: str) -> ServiceNotFoundError:
    return ServiceNotFoundError(f"{what}: the service has ended; start it again with `stepwell up` or stepwell.launch")


def translate(error: BaseException, *, timeout_s: float, what: str) -> BaseException:
    """The error of ours that a failed wait means."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return cause if isinstance(cause, StepwellError) else error
    if isinstance(error, StepwellError):
        return error
    if isinstance(error, RayActorError):
        return ShardLostError(
            f"a process of the service died while waiting for {what}. Restore its last checkpoint: "
            "service.restore(URI), then optimizer.refresh() on every rank; or stepwell.launch(..., restore=URI)"
        )
    return ServiceTimeoutError(f"waited {timeout_s:g} s for {what}; see `stepwell status`")
