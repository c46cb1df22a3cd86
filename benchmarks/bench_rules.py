"""Each rule's step in one process: against torch's own where torch has the rule, else against its fused AdamW.

torch's optimizers are taken in their fastest form on this machine: fused where there is one, else foreach. The bytes
are p, g and the model's copy of p, and every slot read and written: a rule with sums reads some of them twice, which is
not counted here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from contestants import FUSED, MODEL_COPY_BYTES, Workload, layered, yardsticks
from harness import Contestant, Row, cores, main, race, tell

import stepwell
from stepwell.optim import RULES

FLOAT32_BYTES = 4
GROUP_SIZE = 5

Build = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

RULES_TIMED: dict[str, Build] = {
    **{name: getattr(stepwell, name) for name in RULES.names()},
    "SGD": functools.partial(stepwell.SGD, momentum=0.9),
    "Prodigy": functools.partial(stepwell.Prodigy, growth_rate=1.02),
}

TWINS: dict[str, tuple[str, Build]] = {
    "SGD": ("torch SGD, momentum, fused", functools.partial(torch.optim.SGD, momentum=0.9, fused=True)),
    "Adam": ("torch Adam, fused", functools.partial(torch.optim.Adam, fused=True)),
    "NAdam": ("torch NAdam, foreach", functools.partial(torch.optim.NAdam, foreach=True)),
    "RAdam": ("torch RAdam, foreach", functools.partial(torch.optim.RAdam, foreach=True)),
    "RMSprop": ("torch RMSprop, foreach", functools.partial(torch.optim.RMSprop, foreach=True)),
}


def rows(quick: bool) -> list[Row]:
    """A row for each rule."""
    torch.set_num_threads(cores())
    numel, budget_s = (200_000, 0.1) if quick else (8_000_000, 4.0)
    workload = Workload(layered(numel))
    # Those with a twin first; a few at a time, so that a round is short.
    names = sorted(RULES_TIMED, key=lambda name: (name not in TWINS and name != "AdamW", name))
    groups = [names[i : i + GROUP_SIZE] for i in range(0, len(names), GROUP_SIZE)]
    return [row for group in groups for row in _race_rules(group, workload, budget_s)]


def _race_rules(names: list[str], workload: Workload, budget_s: float) -> list[Row]:
    tell(f"rules: {', '.join(names)}")
    with contextlib.ExitStack() as stack:
        contestants = []
        for name in names:
            optimizer = RULES_TIMED[name](workload.params(with_grads=True))
            assert isinstance(optimizer, stepwell.ServiceOptimizer)
            stack.callback(optimizer.close)
            contestants.append(Contestant(name, optimizer.step, _step_bytes(optimizer) * workload.numel))
            if name in TWINS:
                twin, build = TWINS[name]
                contestants.append(Contestant(twin, build(workload.params(with_grads=True)).step))
        found = race(contestants, yardsticks=yardsticks(workload), budget_s=budget_s)
    section = f"rules, {workload.numel / 1e6:g} M, in process"
    return [
        found.row(
            name,
            TWINS[name][0] if name in TWINS else FUSED,
            scale=1e9 / workload.numel,
            yardstick=FUSED,
            section=section,
            key=f"rules/{name}",
        )
        for name in names
    ]


def _step_bytes(optimizer: stepwell.ServiceOptimizer) -> int:
    """Per parameter: p, g and the model's copy of p; p and every slot read and written; p0 only read."""
    slots = sum(1 if slot.init == "param" else 2 for slot in optimizer.rule.slots)
    return FLOAT32_BYTES * (3 + slots) + MODEL_COPY_BYTES


if __name__ == "__main__":
    main(rows, __doc__)
