"""Calls to a coordinator that is being started again, or has ended."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError

from stepwell.server import calls
from stepwell.sharding.errors import CheckpointError, EpochError, ServiceNotFoundError, ServiceTimeoutError

GONE = ActorUnavailableError("the actor is unavailable", None)


class Coordinator:
    """One whose calls end as they are told to, in order; the time that passes is told too."""

    def __init__(self, *answers: object, seconds_each: float = 0.0, has_ended: bool = True) -> None:
        self.has_ended = has_ended
        self.answers, self.asked, self.now = list(answers), list[tuple[str, tuple[object, ...]]](), 0.0
        self._seconds_each = seconds_each

    def __getattr__(self, name: str) -> Any:
        return mock.Mock(remote=lambda *args: self.asked.append((name, args)))

    def get(self, ref: object, *, timeout: float) -> object:
        assert timeout < 1000
        self.now += self._seconds_each
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def ask(self, *args: object) -> object:
        with (
            mock.patch("ray.get", self.get),
            mock.patch("time.monotonic", self.monotonic),
            mock.patch("time.sleep", self.sleep),
            mock.patch("stepwell.server.calls.has_ended", return_value=self.has_ended),
        ):
            return calls.ask(self, "save", *args, timeout_s=600.0, what="service 'trainer': a checkpoint")


def task_error(cause: Exception) -> Exception:
    untyped: Any = RayTaskError
    error: Exception = untyped("save", "traceback", cause).as_instanceof_cause()
    return error


def test_coordinator_that_is_said_to_have_died_is_waited_for_while_ray_starts_it_again() -> None:
    """As Ray says it of one that was on a node which was drained."""
    died = ActorDiedError()
    coordinator = Coordinator(died, died, GONE, "it is back", "done", has_ended=False)
    assert coordinator.ask("uri") == "done"


@pytest.mark.parametrize("first", [GONE, task_error(EpochError("replaced"))])
def test_call_is_made_again_when_the_coordinator_is_back(first: Exception) -> None:
    coordinator = Coordinator(first, GONE, GONE, "it is back", "done")
    assert coordinator.ask("uri") == "done"
    again = [("describe", ())] * 3
    assert coordinator.asked == [("save", ("uri",)), *again, ("save", ("uri",))]


def test_coordinator_that_does_not_come_back_is_told_with_service_call_and_wait() -> None:
    coordinator = Coordinator(GONE, seconds_each=0.5)
    with pytest.raises(ServiceTimeoutError, match=r"service 'trainer': a checkpoint \(`save`\): .* back within 120 s"):
        coordinator.ask()
    assert 100 < coordinator.now <= 121
    assert 80 < len(coordinator.asked) < 120, "pauses grow to a second"


def test_service_that_has_ended_is_told_at_once() -> None:
    for answers in ([ActorDiedError()], [GONE, ActorDiedError()]):
        with pytest.raises(ServiceNotFoundError, match=r"service 'trainer': a checkpoint.* the service has ended"):
            Coordinator(*answers).ask()


def test_error_of_the_service_and_its_limit_are_told_and_nothing_is_asked_again() -> None:
    coordinator = Coordinator(task_error(CheckpointError("/x: the disk is full")))
    with pytest.raises(CheckpointError, match="/x: the disk is full"):
        coordinator.ask()
    with pytest.raises(ServiceTimeoutError, match="waited 600 s for service 'trainer': a checkpoint"):
        Coordinator(GetTimeoutError()).ask()
    assert len(coordinator.asked) == 1
