"""Declared faults: who of a service dies, at which point, after which step.

The same declaration serves processes that Ray runs and those that :mod:`tests.server.simulated` does: :func:`arm` hooks
an actor that lives, from outside, so that the code under test knows nothing of it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import ray

from stepwell.sharding.errors import ShardLostError

SHARD_POINTS = (
    "asking log",  # the pushes are in, and the keeper is about to hear of them
    "asked log",  # the step is logged
    "voting",  # before the first sum
    "voted",  # this shard has the vote's sum
    "summing",  # before the second sum, of rules with sums
    "summed",
    "applying",  # slots are about to move
    "applied",
    "answering",  # the step is taken, and its worker does not know yet
    "copying",
    "asking keep",  # the copy is written, and the keeper has the one before
    "asked keep",
)
"""In a step, or just after it."""

RECOVERY_POINTS = ("resting", "joining", "joined", "resuming")
"""While others are brought back; and in every forming."""

SAVING_POINTS = ("writing", "written")
"""In a save, before and after this shard's file."""

REBUILDING_POINTS = ("asking fetch", "asked fetch", "rebuilt")
"""While this shard itself is brought back."""

KEEPER_POINTS = ("log", "logged", "keep", "kept", "fetch")

SPARE_POINTS = ("becoming", "became")
"""Before it is a lost shard, and before it has said that it is."""

COORDINATOR_POINTS = ("rebuild", "rest", "join", "resume")
"""Before it has the shards do this, as one of them is brought back."""

COORDINATOR_SAVING_POINTS = ("snapshot", "save", "complete_save", "finish_save")
"""Before it has the shards do this, in a save."""

LOSE = "lose"
DIE = "die"
NODE = "node"


@dataclasses.dataclass(frozen=True)
class Fault:
    """One event.

    Attributes:
        who: A shard's number, "keeper", "spare" or "coordinator".
        point: One of those above.
        after: It waits until this many steps were taken.
        what: The process dies; or its whole node does, under Ray; or it loses the sum that it has just had, as if the
            group had broken before.
    """

    who: int | str
    point: str
    after: int = 0
    what: str = DIE

    def __str__(self) -> str:
        return f"{self.who}-{self.point}{'' if self.what == DIE else '-' + self.what}".replace(" ", "-")


def fail_at(shard: int, step: int, point: str, *, what: str = DIE) -> Fault:
    """A shard's fault within a step, or in the first one after it that comes to this point."""
    return Fault(shard, point, after=step - 1, what=what)


def shard_faults(shard: int, step: int) -> list[Fault]:
    """All that can befall a shard in a step, or just after it."""
    lost = [fail_at(shard, step, point, what=LOSE) for point in ("voted", "summed")]
    return [fail_at(shard, step, point) for point in SHARD_POINTS] + lost


def shard_pairs(step: int) -> list[tuple[Fault, ...]]:
    """Two shards, at each two points, whichever is first."""
    both = itertools.product(shard_faults(0, step), shard_faults(1, step))
    return [(first, second) for first, second in both if first.point <= second.point]


def matrix(step: int) -> list[tuple[Fault, ...]]:
    """Every point alone, and each two of what a service is made of."""
    shards = shard_faults(1, step)
    others = [Fault("coordinator", point, step - 1) for point in COORDINATOR_POINTS]
    others += [Fault("keeper", point, step - 1) for point in KEEPER_POINTS]
    return [*((fault,) for fault in shards), *shard_pairs(step), *itertools.product(shards, others)]


def node_losses(step: int) -> list[tuple[Fault, ...]]:
    """A shard's node at every point, alone and with the coordinator."""
    lost = [fail_at(1, step, point, what=NODE) for point in SHARD_POINTS]
    coordinator = Fault("coordinator", "rebuild", step - 1)
    return [*((fault,) for fault in lost), *((fault, coordinator) for fault in lost)]


class Armed:
    """An actor with faults that are to come; each happens once.

    Args:
        faults: Its own ones.
        die: Ends the process, and whatever else dies of a fault; does not return.
        happened: Told of each fault before it happens.
        num_steps: How many steps were taken, as far as the actor can know.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        die: Callable[[Fault], None],
        happened: Callable[[Fault], None],
        num_steps: Callable[[], float],
    ) -> None:
        self._faults, self._die, self._happened, self._num_steps = list(faults), die, happened, num_steps

    def at(self, point: str) -> None:
        """The actor has come to a point."""
        for fault in self._faults:
            if fault.point == point and self._num_steps() >= fault.after:
                self._faults.remove(fault)
                self._happened(fault)
                if fault.what == LOSE:
                    raise ShardLostError("a declared fault: the sum was lost")
                self._die(fault)

    def hook(self, owner: Any, method: str, before: str | None = None, after: str | None = None) -> None:
        """Come to points before and after a method of ``owner``."""
        original = getattr(owner, method)

        @functools.wraps(original)
        async def asynchronous(*args: Any, **keywords: Any) -> Any:
            if before:
                self.at(before)
            result = await original(*args, **keywords)
            if after:
                self.at(after)
            return result

        @functools.wraps(original)
        def plain(*args: Any, **keywords: Any) -> Any:
            if before:
                self.at(before)
            result = original(*args, **keywords)
            if after:
                self.at(after)
            return result

        setattr(owner, method, asynchronous if inspect.iscoroutinefunction(original) else plain)


def num_steps_of(shard: Any) -> float:
    """How many steps a shard's actor has taken; any number, as one that is being brought back."""
    if shard._steps.shard is None:
        return float("inf") if shard._was_restarted else -1
    return float(shard._steps.shard.sequence)


def arm_shard(actor: Any, armed: Armed) -> None:
    """Hook a shard's actor."""
    steps, redundancy = actor._steps, actor._redundancy
    armed.hook(redundancy, "log", "asking log", "asked log")
    armed.hook(redundancy, "fetch", "asking fetch", "asked fetch")
    armed.hook(redundancy, "_copy", "copying")
    armed.hook(redundancy, "come_back", "rebuilt")
    armed.hook(actor._saves, "write", "writing", "written")
    armed.hook(steps, "take", after="answering")
    armed.hook(steps, "rest", "resting")
    armed.hook(steps, "leave_group", "joining")
    armed.hook(steps, "resume", "resuming")
    enter_group, begin_step, arrange = steps.enter_group, steps._begin_step, redundancy.arrange

    def enter(collective: Any) -> None:
        armed.at("joined")
        _hook_sums(steps, collective, armed)
        enter_group(collective)

    def begin(shard: Any, *args: Any, **keywords: Any) -> None:
        if not hasattr(shard, "is_armed"):
            shard.is_armed = True
            armed.hook(shard._kernels, "apply", "applying", "applied")
        begin_step(shard, *args, **keywords)

    def arranged(to: Any) -> None:
        arrange(to)
        _hook_lines(redundancy, armed)

    steps.enter_group, steps._begin_step, redundancy.arrange = enter, begin, arranged
    _hook_lines(redundancy, armed)
    if steps.collective is not None:
        _hook_sums(steps, steps.collective, armed)


def _hook_lines(redundancy: Any, armed: Armed) -> None:
    """Hook what goes to keepers."""
    for line in redundancy._lines.values():
        if not hasattr(line, "is_armed"):
            line.is_armed = True
            armed.hook(line, "keep", "asking keep", "asked keep")


def _hook_sums(steps: Any, collective: Any, armed: Armed) -> None:
    all_reduce = collective.all_reduce

    def reduce(vector: Any) -> Any:
        # The vote is the first sum of a step, whatever was known of it when the step went on.
        is_vote = not steps.shard.standing().sums.get(steps.shard.sequence + 1)
        armed.at("voting" if is_vote else "summing")
        total = all_reduce(vector)
        armed.at("voted" if is_vote else "summed")
        return total

    collective.all_reduce = reduce


def arm_keeper(keeper: Any, armed: Armed) -> None:
    """Hook a keeper."""
    armed.hook(keeper, "log", "log", "logged")
    armed.hook(keeper, "keep", "keep", "kept")
    armed.hook(keeper, "fetch", "fetch")


def arm_coordinator(coordinator: Any, armed: Armed) -> None:
    """Hook a coordinator."""
    shards = coordinator._shards
    call = shards._call

    async def called(handles: Any, method: str, *args: Any, **keywords: Any) -> Any:
        if method in COORDINATOR_POINTS + COORDINATOR_SAVING_POINTS:
            armed.at(method)
        return await call(handles, method, *args, **keywords)

    shards._call = called


def arm_spare(seat: Any, armed: Armed) -> None:
    """Hook a spare."""
    armed.hook(seat, "become", "becoming", "became")


ARM = {"keeper": arm_keeper, "coordinator": arm_coordinator, "spare": arm_spare}


def arm_here(actor: Any, faults: Sequence[Fault], num_steps: float) -> None:
    """Hook an actor that Ray runs, from within its process; where there is no shard to ask, after ``num_steps``."""
    name = faults[0].who
    taken = functools.partial(num_steps_of, actor) if isinstance(name, int) else lambda: num_steps
    armed = Armed(faults, _die_here, lambda _: None, taken)
    ARM.get(str(name), arm_shard)(actor, armed)
    if name == "keeper":
        _let_ray_call(actor, ("log", "keep", "fetch"))


def _die_here(fault: Fault) -> None:
    if fault.what == NODE:
        os.kill(os.getppid(), signal.SIGKILL)  # the node's raylet, with which all of its processes end
    os.kill(os.getpid(), signal.SIGKILL)


def _let_ray_call(actor: Any, methods: Sequence[str]) -> None:
    """Have Ray call methods as the actor has them now: it took them from its class when the actor was made."""
    manager: Any = ray._private.worker.global_worker.function_actor_manager
    for info in manager._function_execution_info.values():
        executor = info.function
        for cell, variable in zip(executor.__closure__ or (), executor.__code__.co_freevars, strict=True):
            if variable == "method" and executor.name in methods:
                cell.cell_contents = functools.partial(_call_now, executor.name)


def _call_now(method: str, actor: Any, *args: Any, **keywords: Any) -> Any:
    return getattr(actor, method)(*args, **keywords)
