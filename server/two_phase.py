"""A change of the state on all shards, prepared first and taken then: all of them take it, or none does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from ..sharding.job import JobSpec
from .knowledge import Knowledge
from .shards import Shards


async def change_state(
    shards: Shards,
    known: Knowledge,
    prepare: str,
    *args: Any,
    request: str,
    rest: Callable[[], Awaitable[object]],
    spec: JobSpec | None = None,
) -> None:
    """See *Note: Changes that are all or nothing* in docs/design.md. Called by the coordinator, one at a time.

    Args:
        shards: The shards.
        known: What the coordinator knows, which is changed too.
        prepare: The shards' method that prepares it.
        args: What that takes behind timeline and request.
        request: Names what was asked for.
        rest: Brings the shards to rest; they stay held.
        spec: The job afterwards, if it changes too.
    """
    timeline = known.timeline + 1
    try:
        await shards.all(prepare, timeline, request, *args, what="the shards to prepare a new state")
        await rest()
        known.timeline = timeline
        await shards.all("adopt", timeline, what="the shards to take the new state")
        known.spec = spec or known.spec
    finally:
        await shards.release()
    known.is_loaded = True
    known.requests.append(request)
