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

LIMIT_S = 60.0
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

    def await_copies(self) -> None:
        """Wait until the keeper has a copy of every shard; where it has none, a step must have been taken since."""
        keeper, deadline = self._actors["keeper"], time.monotonic() + LIMIT_S
        shards = {name for name in self._actors if isinstance(name, int)}
        while True:
            holdings = ray.get(keeper.holdings.remote(), timeout=LIMIT_S)
            if missing := shards - {shard for shard, holding in holdings.items() if holding.step is not None}:
                assert time.monotonic() < deadline, f"expected copies of {missing} within {LIMIT_S:g} s, got none"
                time.sleep(0.05)
            else:
                return


def _pid_of(actor: Any) -> int:
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            return pid_of(actor)
        except ray.exceptions.RayActorError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
