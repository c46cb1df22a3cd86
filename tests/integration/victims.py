"""A service's processes, to be killed."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import ray

import stepwell
from stepwell.server.config import NAMESPACE
from tests.integration.processes import pid_of

LIMIT_S = 120.0
Name = int | str
"""A shard's number, "keeper" (the first one) or "coordinator"."""


class Victims:
    """Who can be killed of a service that is redundant.

    Args:
        service: The service.
    """

    def __init__(self, service: stepwell.Service) -> None:
        self._service = service
        self._actors: dict[Name, Any] = dict(enumerate(service.shards))
        self._actors["coordinator"] = service.coordinator
        self._actors["keeper"] = ray.get_actor(service.config.keeper_name(0), namespace=NAMESPACE)
        self._pids: dict[Name, int] = {}
        self.await_successors()

    def actor(self, name: Name) -> Any:
        """One's handle."""
        return self._actors[name]

    def pids(self) -> dict[Name, int]:
        """Everybody's process, as of when successors were awaited last."""
        return dict(self._pids)

    def kill(self, *names: Name) -> None:
        """Kill some, as they were when their successors were awaited last."""
        for name in names:
            os.kill(self._pids[name], signal.SIGKILL)

    def await_successors(self) -> None:
        """Wait until all answer, spares too, so that all can be killed."""
        self._actors.update(enumerate(self._service.find_shards()))
        deadline = time.monotonic() + LIMIT_S
        while (standby := self._service.status()["standby"])["ready"] < standby["wanted"]:
            assert time.monotonic() < deadline, f"expected spares within {LIMIT_S:g} s, got {standby}"
            time.sleep(0.05)
        self._pids = {name: _pid_of(actor) for name, actor in self._actors.items()}


def await_copies(service: stepwell.Service, num_each: int = 1) -> list[dict[str, Any]]:
    """Wait until so many keepers have a copy of each shard; what they have.

    Where a shard has no copy yet, a step must have been taken.
    """
    deadline = time.monotonic() + LIMIT_S
    while True:
        shards: list[dict[str, Any]] = service.status()["redundancy"]["shards"]
        whole = [[each for each in kept.values() if each["step"] is not None] for kept in shards]
        if all(len(each) >= num_each for each in whole):
            return shards
        assert time.monotonic() < deadline, f"expected {num_each} copies of each shard, got {shards}"
        time.sleep(0.05)


def _pid_of(actor: Any) -> int:
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            return pid_of(actor)
        except ray.exceptions.RayActorError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
