"""Training the zoo's problems through optimizers, and telling their state."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

import stepwell
from stepwell.optim import ProdigyRule
from stepwell.sharding.buffers import MASTER
from tests.zoo import Problem, Run, Schedule, assert_same_tensors, cosine, small

LIMIT_S = 60.0
D0 = 0.1
"""Prodigy's first estimate: one that leaves something to estimate in a few steps."""

Make = Callable[..., stepwell.ServiceOptimizer]


def small_in_order() -> Problem:
    """The zoo's small problem with its tensors in the order of an optimizer's groups, as shards index them."""
    return Problem(tuple(sorted(small().tensors, key=lambda tensor: tensor.group)))


class Trainer:
    """One worker that trains a problem.

    Args:
        problem: What to train.
        make: The optimizer's class.
        options: Keys that differ by parameter group; ``options[i]`` goes into group i.
        schedule: Of the hyperparameters.
        shift: Added to the initial parameters, to tell one worker's from another's.
        keywords: Of the optimizer; ``rank`` and ``world_size`` count for the gradients too.
    """

    def __init__(
        self,
        problem: Problem,
        make: Make,
        *,
        options: Sequence[Mapping[str, object]] = (),
        schedule: Schedule = cosine,
        shift: float = 0.0,
        **keywords: Any,
    ) -> None:
        self.problem, self.schedule = problem, schedule
        self.rank, self.world_size = keywords.get("rank", 0), keywords.get("world_size", 1)
        self.params = problem.parameters()
        with torch.no_grad():
            for param in self.params:
                param.add_(shift)
        self.optimizer = make(problem.param_groups(self.params, options), **keywords)
        self.step = 0

    def run(self, stop: int) -> Trainer:
        """Take steps until there were ``stop``; returns itself."""
        while self.step < stop:
            self.set_gradients()
            self.take_step()
        return self

    def set_gradients(self) -> None:
        """The next step's gradients and hyperparameters."""
        self.schedule(self.optimizer.param_groups, self.step)
        self.problem.set_gradients(self.params, self.step, rank=self.rank, world_size=self.world_size)

    def take_step(self) -> None:
        self.optimizer.step()
        self.step += 1

    def values(self) -> list[Tensor]:
        """Copies of the parameters."""
        return [param.detach().clone() for param in self.params]


def make_workers(service: stepwell.Service, world_size: int, **keywords: Any) -> list[Trainer]:
    """A worker for each rank; each model begins with other values, and rank 0's are to count."""

    def make(rank: int) -> Trainer:
        options = {"service": service, "rank": rank, "world_size": world_size, "d0": D0, **keywords}
        return Trainer(small_in_order(), stepwell.Prodigy, shift=float(rank), **options)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(make, range(world_size), timeout=LIMIT_S))


class Oracle:
    """The same workers in one process.

    Args:
        world_size: How many.
    """

    def __init__(self, world_size: int = 1) -> None:
        self.run = Run(small_in_order(), ProdigyRule(d0=D0), world_size=world_size)
        self.step = 0

    def take_step(self) -> None:
        """One step of all ranks, whatever the shards' own numbers."""
        cosine(self.run.groups, self.step)
        for rank in range(self.run.world_size):
            self.run.group.push(self.run.pushes(rank, gradients=self.run.gradients(self.step, rank)))
        self.step += 1

    def to(self, stop: int) -> Oracle:
        """Take steps until there were ``stop``; returns itself."""
        while self.step < stop:
            self.take_step()
        return self

    def require_same(self, worker: Trainer) -> None:
        """See that a worker has the same parameters, slots and scalars, to the bit."""
        expected = self.run.state()
        assert_same_tensors(worker.params, self.run.params(), "parameter")
        state_dict = worker.optimizer.state_dict()
        for index, state in state_dict["state"].items():
            for name in expected.slots.keys() - {MASTER.name}:
                assert torch.equal(state[name].flatten(), expected.slots[name][index]), f"{name} of parameter {index}"
        shown = state_dict["param_groups"][0]
        assert {name: shown[name] for name in expected.scalars} == dict(expected.scalars)


class ByHand(Oracle):
    """One rank in one process, which is given the mean of whoever is there."""

    def __init__(self) -> None:
        self.run = Run(small_in_order(), ProdigyRule(d0=D0), kernel="eager")
        self.step = 0

    def average(self, workers: Sequence[tuple[int, int]]) -> None:
        """One step of these workers, each a rank and the world size that it trains with, in rank order."""
        params, problem = self.run.params(), self.run.problem
        cosine(self.run.groups, self.step)
        grads = {
            index: [
                problem.gradient(self.step, index, param, rank=rank, world_size=world_size)
                for rank, world_size in sorted(workers)
            ]
            for index, param in enumerate(params)
            if problem.tensors[index].has_grad
        }
        mean = {index: functools.reduce(operator.add, each) / len(each) for index, each in grads.items()}
        self.run.step(gradients=mean)
        self.step += 1


def on_all(workers: Sequence[Trainer], call: Callable[[Trainer], Any]) -> list[Any]:
    """Call something with every worker at once; the results, or the first error."""
    with ThreadPoolExecutor(len(workers)) as pool:
        futures = [pool.submit(call, worker) for worker in workers]
        return [future.result(timeout=LIMIT_S) for future in futures]


def errors_on_all(workers: Sequence[Trainer], call: Callable[[Trainer], Any]) -> list[BaseException | None]:
    """Call something with every worker at once; what each one raised."""
    with ThreadPoolExecutor(len(workers)) as pool:
        futures = [pool.submit(call, worker) for worker in workers]
        return [future.exception(timeout=LIMIT_S) for future in futures]


def assert_same_training(actual: Trainer, expected: Trainer) -> None:
    """Equal to the bit: parameters, every slot, and what the parameter groups show, d among it."""
    assert_same_tensors(actual.params, expected.params, "parameter")
    assert_same_state_dict(actual.optimizer.state_dict(), expected.optimizer.state_dict())


def assert_same_state_dict(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Equal to the bit."""
    assert actual["param_groups"] == expected["param_groups"]
    assert actual["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert actual["state"][index].keys() == state.keys()
        for name, value in state.items():
            got = torch.as_tensor(actual["state"][index][name])
            assert torch.equal(got, torch.as_tensor(value)), f"{name} of parameter {index}"
