"""A service in this process: actors that die and are started again as Ray's are, in some milliseconds.

Coordinator, shards, keeper and client are the real ones. What is simulated is Ray (actors on one event loop, whose
arguments and results are copied) and the shards' sums, which the actors' own threads take through this process's
memory.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError
from torch import Tensor
from torch._C._distributed_c10d import Store

import stepwell
from stepwell.server.collective import Generation
from stepwell.server.config import ServiceConfig
from stepwell.server.coordinator import Coordinator
from stepwell.server.keeper import Keeper
from stepwell.server.resizing import OneSet
from stepwell.server.seat import Seat
from stepwell.server.shard_actor import ShardActor
from stepwell.server.standby import ActorState
from stepwell.sharding.errors import ShardLostError
from stepwell.sharding.partials import sum_vectors
from tests.faults import ARM, Armed, Fault, arm_shard, num_steps_of

FORMING_TIMEOUT_S = 30.0
LIMIT_S = 60.0


class Killed(BaseException):
    """Ends whatever a process was at."""


class Ref(concurrent.futures.Future[Any]):
    """An answer that is to come, for threads and for event loops.

    Args:
        caller: The life that asks; None for a worker's.
    """

    __hash__ = object.__hash__

    def __init__(self, caller: Life | None) -> None:
        super().__init__()
        self.caller = caller

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.shield(asyncio.wrap_future(self)).__await__()


HOLDER = "holder"
"""Among what is copied already, the life of the process that gets the copy."""


class Handle:
    """A process as another one, or a worker, calls it."""

    def __init__(self, process: Process, life: Life | None) -> None:
        self._process, self._life = process, life

    @property
    def _actor_id(self) -> int | str:
        """Ray's name for it."""
        return self._process.name

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return SimpleNamespace(remote=functools.partial(self._process.call, self._life, method))

    def __eq__(self, other: object) -> bool:
        """Of the same process, as Ray compares handles."""
        return isinstance(other, Handle) and self._process is other._process

    def __hash__(self) -> int:
        return hash(self._process)

    def __deepcopy__(self, memo: dict[Any, Any]) -> Handle:
        """In a process that it is handed to, it is that process's."""
        return Handle(self._process, memo.get(HOLDER, self._life))


class Life:
    """A process from one start to its death.

    Args:
        name: The process's.
    """

    def __init__(self, name: int | str) -> None:
        self.name, self.is_over = name, False


Disturb = Callable[[int | str, int | str, str], str]
"""What becomes of a call, by who calls, whom and what: "", "drop call", "drop reply", "double" or "delay"."""
DELAY_S = 0.03


class Process:
    """An actor's processes, one after the other.

    Args:
        cluster: Where it runs.
        name: A shard's number, or what it is.
        make: Makes the actor, of handles that this life holds; told whether it is started again.
    """

    def __init__(self, cluster: Cluster, name: int | str, make: Callable[[Process, bool], Any]) -> None:
        self._cluster, self.name, self._make = cluster, name, make
        self._unanswered = set[Ref]()
        self.num_restarts = -1
        self.start()

    def start(self) -> None:
        """Start a process for the actor, the first one or the next."""
        self.num_restarts += 1
        self.life = Life(self.name)
        context = mock.Mock(was_current_actor_reconstructed=self.num_restarts > 0)
        context.get_node_id.return_value = "node"
        with mock.patch("ray.get_runtime_context", return_value=context):
            self.actor = self._make(self, self.num_restarts > 0)
        self._cluster.arm(self)

    def handle(self, life: Life | None = None) -> Handle:
        """For another process, or for a worker."""
        return Handle(self, life)

    def call(self, caller: Life | None, method: str, *args: Any) -> Ref:
        """Call the actor; who has died calls nobody any more, and is told nothing."""
        ref = Ref(caller)
        if caller is None or not caller.is_over:
            what = self._cluster.disturb("worker" if caller is None else caller.name, self.name, method)
            self._cluster.loop.call_soon_threadsafe(self._carry, what, ref, method, copy.deepcopy(args))
        return ref

    def die(self) -> None:
        """Die within what it is at, in whichever thread."""
        self.life.is_over = True  # first: the loop may be done with all of it before this thread goes on
        self._cluster.loop.call_soon_threadsafe(self.kill)
        raise Killed

    def kill(self) -> None:
        """Be killed from outside, and be started again a moment later; on the event loop."""
        self.life.is_over = True
        parts = vars(self.actor)  # a spare has none
        steps = parts.get("_steps")
        if steps is not None and steps.collective is not None:
            steps.collective.close()
        for meeting in parts.get("_meetings", {}).values():
            meeting.end()
        for task in (*getattr(parts.get("_watch"), "_tasks", []), getattr(parts.get("_standby"), "_task", None)):
            if task is not None:
                task.cancel()
        for ref in self._unanswered:
            _answer(ref, error=_unavailable())
        self._unanswered = set()
        self._cluster.loop.call_later(0.01, self.start)

    def _carry(self, what: str, ref: Ref, method: str, args: Sequence[Any]) -> None:
        """Deliver a call as far as the network lets it through."""
        if what in ("drop call", "drop reply"):
            self._cluster.loop.call_soon(_answer_lost, ref)
        if what == "double":
            self._deliver(Ref(ref.caller), method, copy.deepcopy(args))
        if what == "delay":
            self._cluster.loop.call_later(DELAY_S, self._deliver, ref, method, args)
        elif what != "drop call":
            self._deliver(ref, method, args)

    def _deliver(self, ref: Ref, method: str, args: Sequence[Any]) -> None:
        if self.life.is_over:
            _answer(ref, error=_unavailable())
            return
        self._unanswered.add(ref)
        memo: dict[Any, Any] = {HOLDER: self.life}
        task = asyncio.ensure_future(getattr(self.actor, method)(*copy.deepcopy(args, memo)))
        task.add_done_callback(functools.partial(self._answered, ref, self.life))

    def _answered(self, ref: Ref, life: Life, task: asyncio.Future[Any]) -> None:
        error = None if task.cancelled() else task.exception()  # looked at, or asyncio would tell of it
        if not life.is_over and not task.cancelled() and not isinstance(error, Killed):
            self._unanswered.discard(ref)
            memo: dict[Any, Any] = {HOLDER: ref.caller}
            _answer(ref, error=error) if error else _answer(ref, copy.deepcopy(task.result(), memo))


def _unavailable() -> ActorUnavailableError:
    return ActorUnavailableError("its process has ended", None)


def _answer_lost(ref: Ref) -> None:
    _answer(ref, error=ActorUnavailableError("the network lost it", None))


def _answer(ref: Ref, value: Any = None, *, error: BaseException | None = None) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):  # nobody waits for it any more
        ref.set_exception(error) if error else ref.set_result(value)


class Group:
    """What the members of one generation sum up."""

    def __init__(self, num_shards: int) -> None:
        self._num_shards, self._has_changed = num_shards, threading.Condition()
        self._vectors: list[dict[int, Tensor]] = []
        self._num_summed: dict[int, int] = {}
        self._is_broken = False

    def reduce(self, shard: int, vector: Tensor) -> Tensor:
        with self._has_changed:
            number = self._num_summed.setdefault(shard, 0)
            if self._is_broken:
                raise ShardLostError("a peer has left the group")
            while len(self._vectors) <= number:
                self._vectors.append({})
            vectors = self._vectors[number]
            vectors[shard] = vector.clone()
            self._has_changed.notify_all()
            self._has_changed.wait_for(lambda: self._is_broken or len(vectors) == self._num_shards, LIMIT_S)
            if len(vectors) < self._num_shards:
                raise ShardLostError("a peer has left the group")
            self._num_summed[shard] += 1
        return vector.copy_(sum_vectors([vectors[index] for index in sorted(vectors)]))

    def close(self) -> None:
        with self._has_changed:
            self._is_broken = True
            self._has_changed.notify_all()


class Collective:
    """Of this process's memory, in place of one of sockets."""

    def __init__(
        self, groups: dict[Generation, Group], generation: Generation, shard: int, num_shards: int, **options: Any
    ) -> None:
        self.generation, self._shard, self.is_open = generation, shard, True
        meeting: Store = options["meeting"]
        try:
            meeting.set(str(shard), "here")
            meeting.wait([str(index) for index in range(num_shards)])
        except TimeoutError as error:
            raise ShardLostError(f"shard {shard}: generation {generation} did not come together: {error}") from None
        self._group = groups.setdefault(generation, Group(num_shards))

    def all_reduce(self, vector: Tensor) -> Tensor:
        try:
            return self._group.reduce(self._shard, vector)
        except ShardLostError:
            self.close()
            raise

    def close(self) -> None:
        self.is_open = False
        self._group.close()


class OneSetInThisProcess(OneSet):
    """Knows who is being started again."""

    async def states(self, actors: Sequence[Any]) -> list[ActorState]:
        lives = [actor._process.life for actor in actors]
        return [ActorState.LOST if life.is_over else ActorState.RUNS for life in lives]


class Cluster:
    """One service's processes, and the faults that are to come.

    Args:
        num_shards: Shards.
        faults: Declared ones; each happens once, to the process that comes to it first.
        config: Further settings.

    Attributes:
        disturb: The network.
        to_come, happened: The faults.
    """

    def __init__(self, num_shards: int, faults: Sequence[Fault] = (), **config: Any) -> None:
        self.config = ServiceConfig(
            "test", num_shards=num_shards, kernel="eager", **{"worker_timeout_s": LIMIT_S, **config}
        )
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda *_: None)  # who waits for a call that fails may be dead, as with Ray
        self.to_come, self.happened = list(faults), list[Fault]()
        self.disturb: Disturb = lambda caller, callee, method: ""
        self.groups: dict[Generation, Group] = {}
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def start(self) -> stepwell.Service:
        """Start all processes; the service as a worker has it."""
        self._thread.start()
        self.do(self._start)
        service = stepwell.Service(self.config, self.coordinator.handle(), [each.handle() for each in self.shards])
        service.ask("start", what="it to start")
        return service

    def stop(self) -> None:
        """End them all."""
        self.do(self._stop)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(LIMIT_S)
        self.loop.close()

    def do(self, action: Callable[[], Any]) -> Any:
        """Do something on the event loop, from outside."""

        async def doing() -> Any:
            return action()

        return self.wait_for(doing())

    def wait_for(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Wait for something on the event loop, from outside."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(LIMIT_S)

    def arm(self, process: Process) -> None:
        """Hook a process that has been started."""
        if isinstance(process.actor, Seat):
            self._arm_seat(process, process.actor)
        else:
            self._arm_as(process, process.name)

    def _arm_as(self, process: Process, name: int | str) -> None:
        """Hook a process for the faults of who it is by now."""
        faults = [fault for fault in self.to_come if fault.who == name]
        num_steps = functools.partial(num_steps_of, process.actor) if isinstance(name, int) else self._num_steps
        armed = Armed(faults, lambda _: process.die(), self._note, num_steps)
        ARM.get(str(name), arm_shard)(process.actor, armed)

    def _arm_seat(self, process: Process, seat: Seat) -> None:
        """Hook one that is a shard, or may be one."""
        if seat._shard is not None:
            self._arm_as(process, seat._shard)
            return
        self._arm_as(process, "spare")
        sit_down = seat._sit_down

        def sit_down_armed(shard: int, is_successor: bool) -> None:
            sit_down(shard, is_successor)
            self._arm_as(process, shard)

        seat.__dict__["_sit_down"] = sit_down_armed

    def _num_steps(self) -> float:
        actors = [process.actor for process in self.shards]
        return max((num_steps_of(actor) for actor in actors if "_steps" in vars(actor)), default=-1)

    def _note(self, fault: Fault) -> None:
        self.to_come.remove(fault)
        self.happened.append(fault)

    def _start(self) -> None:
        self.shards = list[Process]()
        self.keeper = Process(self, "keeper", lambda *_: Keeper())
        self.shards = [
            Process(self, index, functools.partial(self._shard, index)) for index in range(self.config.num_shards)
        ]
        self.spares = [
            Process(self, f"spare {index}", functools.partial(self._shard, None))
            for index in range(self.config.standby)
        ]
        self.coordinator = Process(self, "coordinator", self._make_coordinator)

    def _stop(self) -> None:
        for process in (self.coordinator, *self.shards, *self.spares):
            with mock.patch.object(self.loop, "call_later"):
                process.kill()

    def _shard(self, index: int | None, *_: object) -> ShardActor:
        if self.config.standby or index is None:
            return Seat(self.config, index)
        return ShardActor(self.config, index)

    def _make_coordinator(self, process: Process, is_restarted: bool) -> Coordinator:
        handles = [shard.handle(process.life) for shard in self.shards]
        coordinator = Coordinator(
            self.config,
            handles,
            keepers=[self.keeper.handle(process.life)],
            spares=[spare.handle(process.life) for spare in self.spares],
            is_first=not is_restarted,
            sets=OneSetInThisProcess(),
            resign=process.die,
        )
        process.handle().start.remote()
        return coordinator


def _get(refs: Any, timeout: float | None = None) -> Any:
    try:
        if isinstance(refs, list):
            return [_get(ref, timeout) for ref in refs]
        return refs.result(timeout)
    except concurrent.futures.TimeoutError:
        raise GetTimeoutError from None


def _wait(refs: Sequence[Ref], timeout: float | None = None) -> tuple[list[Ref], list[Ref]]:
    done, _ = concurrent.futures.wait(refs, timeout, return_when=concurrent.futures.FIRST_COMPLETED)
    first = [ref for ref in refs if ref in done][:1]
    return first, [ref for ref in refs if ref not in first]


@contextlib.contextmanager
def simulated(num_shards: int, faults: Sequence[Fault] = (), **config: Any) -> Iterator[Cluster]:
    """A cluster within this block; services in it are those of a real one, as far as workers can see."""
    cluster = Cluster(num_shards, faults, **config)
    context = mock.Mock(was_current_actor_reconstructed=False)
    context.get_node_id.return_value = "node"
    with (
        mock.patch.multiple(
            ray, get=_get, wait=_wait, put=lambda value: value, cancel=mock.Mock(), is_initialized=lambda: True
        ),
        mock.patch("ray.get_runtime_context", return_value=context),
        mock.patch("ray.util.get_node_ip_address", return_value="127.0.0.1"),
        mock.patch("stepwell.server.coordinated_shard.Collective", functools.partial(Collective, cluster.groups)),
        mock.patch("stepwell.server.coordinated_shard.begin_logs"),  # one process has one log
        mock.patch("stepwell.server.coordinated_shard.ShardMeter.begin"),  # its thread would keep every shard alive
        mock.patch("stepwell.server.shards.FORMING_TIMEOUT_S", FORMING_TIMEOUT_S),
        mock.patch("stepwell.client.patience.LONGEST_PAUSE_S", 0.02),
        mock.patch("stepwell.client.patience.FIRST_PAUSE_S", 0.005),
        mock.patch("stepwell.server.calls.PROBE_S", 0.01),
    ):
        try:
            yield cluster
        finally:
            cluster.stop()
