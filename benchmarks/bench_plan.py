"""What `stepwell plan --here` foretells of a Prodigy step beside what it takes: three sizes, two shards, one worker.

The probes from which a plan is made and the steps that it is about take turns in one run, as what the machine gives
changes by the minute. A ratio is the predicted time over the measured one, of medians over all rounds; its quartiles
are those of every quarter of the run by itself.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterable

import torch
from contestants import Workload, layered, ours, ray_of_its_own, service_of
from harness import Contestant, Row, Spread, cores, left_out, main, race, tell

from stepwell.client.planning.deployment import Deployment
from stepwell.client.planning.machines import Machine
from stepwell.client.planning.measure import machine_of, probes
from stepwell.client.planning.plan import Plan
from stepwell.optim import RULES
from stepwell.sharding.job import JobSpec
from stepwell.sharding.layout import ParamSpec

MILLION = 1_000_000
FACTORS = (1, 8, 32)
NUM_SHARDS, NUM_STRETCHES = 2, 4
NEEDED_PER_PARAM = 60
"""Bytes of memory per parameter: gradients, parameters, buffers, slots."""


def rows(quick: bool) -> list[Row]:
    """A row for each size."""
    torch.set_num_threads(cores())
    unit, budget_s = (100_000, 2.0) if quick else (MILLION, 40.0)
    numels = [unit * factor for factor in FACTORS]
    section = "plan"
    if missing := left_out("the plan's three sizes", NEEDED_PER_PARAM * sum(numels), section=section):
        return missing
    with ray_of_its_own(), contextlib.ExitStack() as stack:
        tell("plan: probes")
        probed = stack.enter_context(probes())
        contestants = [Contestant(name, step) for name, step in probed.items()]
        for numel in numels:
            tell(f"plan: {numel / MILLION:g} M")
            service = stack.enter_context(service_of(NUM_SHARDS))
            optimizer = ours("Prodigy", Workload(layered(numel)).params(with_grads=True), service=service)
            stack.callback(optimizer.close)
            contestants.append(Contestant(_label(numel), optimizer.step))
        found = race(contestants, budget_s=budget_s)
    return [_row(numel, probed.keys(), found.times) for numel in numels]


def _label(numel: int) -> str:
    return f"Prodigy, 2 shards, {numel / MILLION:g} M"


def _row(numel: int, probed: Iterable[str], times: dict[str, list[float]]) -> Row:
    label = _label(numel)
    predicted = _predicted(numel, machine_of({name: statistics.median(times[name]) for name in probed}))
    measured = statistics.median(times[label])
    stretch = max(1, len(times[label]) // NUM_STRETCHES)
    ratios = []
    for begin in range(0, stretch * NUM_STRETCHES, stretch):
        part = {name: statistics.median(each[begin : begin + stretch]) for name, each in times.items() if each[begin:]}
        if label in part:
            ratios.append(_predicted(numel, machine_of(part)) / part[label])
    spread = Spread.of(ratios)
    return Row(
        name=f"{label}, predicted",
        ours=predicted * 1e3,
        theirs=measured * 1e3,
        ratio=predicted / measured,
        low=spread.low,
        high=spread.high,
        unit="ms",
        against="measured",
        section="plan",
        key=f"plan/{numel // MILLION} M",
    )


def _predicted(numel: int, machine: Machine) -> float:
    """Seconds of a step of the model that is measured, whose gradients have to be copied."""
    params = tuple(ParamSpec("", tuple(shape), "float32", group=0) for shape in layered(numel))
    spec = JobSpec(RULES.build("Prodigy", {}), params, 1, 1, gradients="local", kernel="compiled")
    deployment = Deployment(spec=spec, num_shards=NUM_SHARDS, workers_per_node=1, shards_per_node=NUM_SHARDS)
    return Plan.of(deployment, machine).step_s


if __name__ == "__main__":
    main(rows, __doc__)
