"""The way to the shards: its time against raw transfers of the same bytes, and its bytes against the least possible.

The object-store path is timed with SGD, whose kernel costs least, and only by what the service takes beyond the same
step in process. The raw transfers are Ray calls to two bare actors: each takes its half of the gradient as an argument
and copies it, and returns its half of the parameters, which the caller copies. Bytes are counted where they are handed
to Ray; what worker and shards share is written once. Gradients that are sent within backward race with such that are
sent with their push, in training steps of a perceptron: on one machine both move the same bytes by the same cores.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import ray
import torch
from contestants import Workload, layered, ours, ray_of_its_own, service_of, yardsticks
from harness import Contestant, Row, Spread, cores, main, race, tell
from numpy.typing import NDArray

import stepwell
from stepwell.client.node_memory import NodeMemory

NUM_SHARDS = 2
RAW_TIMEOUT_S = 60.0
LEAST_BYTES = 8
"""Per parameter: a gradient there, a parameter back."""
PIECES, WHOLE = "training step, gradients sent within backward", "gradients sent with their push"
BATCH, WIDTH = 64, 1024
SERVICE, IN_PROCESS, RAW = "SGD, 2 shards, object store", "SGD, in process", "raw transfers"


class RawActor:
    """Takes an array, gives an array."""

    def __init__(self, numel: int) -> None:
        self._taken, self._given = np.zeros(numel, np.float32), np.ones(numel, np.float32)

    def exchange(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """Copy the one, return the other."""
        np.copyto(self._taken, array)
        return self._given


def rows(quick: bool) -> list[Row]:
    """All figures."""
    torch.set_num_threads(cores())
    numel, budget_s = (400_000, 0.5) if quick else (32_000_000, 12.0)
    with ray_of_its_own():
        tell("object store against raw transfers")
        found = object_store(numel, budget_s)
        tell("gradients sent within backward")
        found += within_backward(numel, budget_s)
        tell("bytes on the wire")
        return [*found, *wire_bytes(min(numel, 4_000_000))]


def object_store(numel: int, budget_s: float) -> list[Row]:
    """The object-store path against its raw transfers."""
    workload = Workload(layered(numel))
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(service_of(NUM_SHARDS))
        with _far_apart():
            through = stepwell.SGD(workload.params(with_grads=True), service=service)
        alone = stepwell.SGD(workload.params(with_grads=True), service="inprocess")
        raw = stack.enter_context(_raw_transfers(numel))
        for optimizer in (through, alone):
            stack.callback(optimizer.close)
        assert _handed_over(through) >= LEAST_BYTES * numel, "not the object store's figure, if they share memory"
        contestants = [Contestant(SERVICE, through.step), Contestant(IN_PROCESS, alone.step), Contestant(RAW, raw)]
        found = race(contestants, yardsticks=yardsticks(workload), budget_s=budget_s)
    section = f"transport, {numel / 1e6:g} M"
    beyond = [
        (service_s - alone_s) / raw_s
        for service_s, alone_s, raw_s in zip(*(found.times[each] for each in (SERVICE, IN_PROCESS, RAW)), strict=True)
    ]
    spread, scale = Spread.of(beyond), 1e9 / numel
    return [
        *found.machine(section),
        Row(
            name="object-store path: the step through it less that in process",
            ours=found.seconds(SERVICE, beyond=IN_PROCESS) * scale,
            theirs=found.seconds(RAW) * scale,
            ratio=spread.median,
            low=spread.low,
            high=spread.high,
            against="raw transfers of the same bytes",
            bytes=LEAST_BYTES * numel,
            section=section,
            key="transport/object store",
        ),
    ]


def within_backward(numel: int, budget_s: float) -> list[Row]:
    """Training steps by the object-store path, with gradients sent ahead of their push and without."""
    num_layers = max(1, numel // WIDTH**2)
    with contextlib.ExitStack() as stack:
        contestants = []
        for name, overlap in ((PIECES, True), (WHOLE, False)):
            service = stack.enter_context(service_of(NUM_SHARDS))
            net = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(num_layers)))
            with _far_apart():
                optimizer = stepwell.SGD(net.parameters(), lr=1e-6, service=service, overlap=overlap)
            stack.callback(optimizer.close)
            contestants.append(Contestant(name, _training_step(net, optimizer)))
        found = race(contestants, budget_s=budget_s)
    scale = 1e9 / (num_layers * WIDTH**2)
    section = f"transport, {numel / 1e6:g} M, behind a backward"
    return [found.row(PIECES, WHOLE, scale=scale, section=section, key="transport/within backward")]


def _training_step(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    batch = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        optimizer.step()

    return step


@contextlib.contextmanager
def _raw_transfers(numel: int) -> Iterator[Callable[[], None]]:
    """Send half of an array to each of two actors, take half of another from each."""
    sent, got = torch.ones(numel), torch.zeros(numel)
    halves = numel // NUM_SHARDS
    remote: Any = ray.remote(RawActor)
    actors = [remote.options(num_cpus=0).remote(halves) for _ in range(NUM_SHARDS)]

    def exchange() -> None:
        parts = torch.split(sent, halves)
        calls = [actor.exchange.remote(part.numpy()) for actor, part in zip(actors, parts, strict=True)]
        for target, array in zip(torch.split(got, halves), ray.get(calls, timeout=RAW_TIMEOUT_S), strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # it is read-only, and is only read
                target.copy_(torch.from_numpy(array))

    try:
        yield exchange
    finally:
        for actor in actors:
            ray.kill(actor)


def wire_bytes(numel: int) -> list[Row]:
    """What a step hands to Ray and gets from it, for models in float32 and bfloat16."""
    result = []
    for dtype in (torch.float32, torch.bfloat16):
        workload = Workload(layered(numel), dtype=dtype)
        with service_of(NUM_SHARDS) as service:
            optimizer = ours("Prodigy", workload.params(with_grads=True), service=service)
            handed = _handed_over(optimizer)
            buffered = _buffered(optimizer)
            optimizer.close()
        # What is not handed to Ray lies in memory that worker and shards share: there it is written once each.
        shared, least = buffered if handed < buffered else 0, 2 * dtype.itemsize
        result.append(
            Row(
                name=f"{str(dtype).removeprefix('torch.')} model",
                ours=(handed + shared) / numel,
                theirs=float(least),
                ratio=(handed + shared) / numel / least,
                unit="bytes/param",
                bytes=handed + shared,
                against="a gradient and a parameter",
                section=f"bytes on the wire, {numel / 1e6:g} M",
                key=f"wire/{dtype}",
                note=f"{handed / numel:.3f} through Ray, {shared / numel:.3f} through shared memory",
            )
        )
    return result


@contextlib.contextmanager
def _far_apart() -> Iterator[None]:
    """Whoever registers meanwhile finds no shard that could map its memory, as between two nodes."""
    note = NodeMemory.note

    def note_none(memory: NodeMemory, why_not: Sequence[str | None]) -> None:
        note(memory, ["taken for another node's"] * len(why_not))

    with mock.patch.object(NodeMemory, "note", note_none):
        yield


def _handed_over(optimizer: stepwell.ServiceOptimizer) -> int:
    """Bytes that a step hands to Ray and gets from it."""
    optimizer.step()  # the first one may say more
    with _counted() as sizes:
        optimizer.step()
    return sum(sizes)


def _buffered(optimizer: stepwell.ServiceOptimizer) -> int:
    """Bytes of the buffers for what a step pushes and pulls."""
    assert optimizer._worker is not None
    buffers = optimizer._worker._buffers
    return sum(part.nbytes for part in (*buffers.pushed.parts, *buffers.pulled.parts))


@contextlib.contextmanager
def _counted() -> Iterator[list[int]]:
    """The sizes of all arguments of actor calls, and of all results that are fetched, in this process."""
    sizes: list[int] = []
    call: Any = ray.actor.ActorMethod.remote
    get: Any = ray.get

    def counted_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(_size_bytes((args, tuple(kwargs.values()))))
        return call(self, *args, **kwargs)

    def counted_get(*args: Any, **kwargs: Any) -> Any:
        got = get(*args, **kwargs)
        sizes.append(_size_bytes(got))
        return got

    with mock.patch.object(ray.actor.ActorMethod, "remote", counted_call), mock.patch.object(ray, "get", counted_get):
        yield sizes


def _size_bytes(value: object) -> int:
    """Bytes of the arrays and byte strings in a value."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, dict):
        return _size_bytes(list(value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_size_bytes, value))
    return 0


if __name__ == "__main__":
    main(rows, __doc__)
