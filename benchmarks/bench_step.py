"""One optimizer step: through the service and in process, beside what a user would pick instead.

Everybody has the same parameters and the same gradients. Stepwell's shards have as many threads together as there are
cores, the others run in one process with as many. Two forms:

- gradient given: the step alone, over gradients that lie there. Ours lie where hooks have put them, within a backward
  that is not timed; "copying" begins its step with copying them, and so does each with tensors too small for hooks;
- behind a backward: a whole training step with a backward that costs little; the time is what it takes beyond the same
  backward alone, so that work moved into the backward counts.

The bandwidth is the bytes that must move over the time: 52 per parameter for Prodigy's two passes (over p, g, m, v, s,
p0), 40 with ``eps_d="old"``, 28 for AdamW, and with Stepwell 4 more for the model's copy of the parameters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import prodigyopt
import pytorch_optimizer
import torch
from contestants import (
    ADAMW_BYTES,
    FUSED,
    GROWTH_RATE,
    MODEL_COPY_BYTES,
    STEP_BYTES,
    Workload,
    backward_of,
    behind_backward,
    layered,
    lora,
    ours,
    ray_of_its_own,
    service_of,
    yardsticks,
)
from harness import Contestant, Race, Row, cores, left_out, main, race, tell

import stepwell

PRODIGYOPT, PYTORCH_OPTIMIZER, FOREACH = "prodigyopt", "pytorch_optimizer's Prodigy", "torch AdamW, foreach"
BACKWARD = "the backward alone"

YARDSTICKS_MEMORY, THEIR_MEMORY, OUR_MEMORY = 16, 20, 40
"""Bytes of memory per parameter: gradients and fused AdamW; another's parameters and state; ours, with buffers."""

THEIRS: dict[str, tuple[Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], int]] = {
    PRODIGYOPT: (functools.partial(prodigyopt.Prodigy, growth_rate=GROWTH_RATE), STEP_BYTES["Prodigy"]),
    PYTORCH_OPTIMIZER: (
        functools.partial(pytorch_optimizer.Prodigy, growth_rate=GROWTH_RATE),
        STEP_BYTES["Prodigy"],
    ),
    FOREACH: (functools.partial(torch.optim.AdamW, foreach=True), ADAMW_BYTES),
    FUSED: (functools.partial(torch.optim.AdamW, fused=True), ADAMW_BYTES),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One of ours in a race.

    Attributes:
        rule: One of ``STEP_BYTES``.
        num_shards: Shards of its service, or None for in process.
        against: Whom it is compared with, where these take part.
        overlap: Whether hooks copy gradients while backward runs.
    """

    rule: str
    num_shards: int | None
    against: tuple[str, ...]
    overlap: bool = True

    @property
    def name(self) -> str:
        """How the results call it."""
        where = "in process" if self.num_shards is None else f"{self.num_shards} shard{'s'[: self.num_shards > 1]}"
        return f"{self.rule}, {where}{'' if self.overlap else ', copying'}"


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """Who races together; as many as memory has room for.

    Attributes:
        theirs: Names of ``THEIRS``.
        entries: Ours.
    """

    theirs: tuple[str, ...]
    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        return f"{self.entries[0].name}, and {len(self.entries) + len(self.theirs) - 1} that race with it"


OLD = 'Prodigy, eps_d="old"'
IN_PROCESS = Entry("Prodigy", None, (PRODIGYOPT, PYTORCH_OPTIMIZER))
OLD_IN_PROCESS = Entry(OLD, None, (PRODIGYOPT,))
ADAMW_IN_PROCESS = Entry("AdamW", None, (FUSED, FOREACH))
TWO = Entry("Prodigy", 2, (PRODIGYOPT, PYTORCH_OPTIMIZER, IN_PROCESS.name))
OLD_TWO = Entry(OLD, 2, (PRODIGYOPT, OLD_IN_PROCESS.name))
ADAMW_TWO = Entry("AdamW", 2, (FUSED, FOREACH, ADAMW_IN_PROCESS.name))
ONE, FOUR = (Entry("Prodigy", num_shards, (PRODIGYOPT,)) for num_shards in (1, 4))
COPYING, ADAMW_COPYING = (dataclasses.replace(each, overlap=False) for each in (TWO, ADAMW_TWO))

EVERYBODY = Field(
    (PRODIGYOPT, PYTORCH_OPTIMIZER, FOREACH),
    (IN_PROCESS, OLD_IN_PROCESS, ADAMW_IN_PROCESS, ONE, TWO, COPYING, FOUR, OLD_TWO, ADAMW_TWO),
)
LORA = Field(
    (PRODIGYOPT, PYTORCH_OPTIMIZER, FOREACH), (IN_PROCESS, OLD_IN_PROCESS, ADAMW_IN_PROCESS, TWO, OLD_TWO, ADAMW_TWO)
)
LARGE = (
    Field((PRODIGYOPT,), (IN_PROCESS, TWO)),
    Field((PRODIGYOPT,), (OLD_IN_PROCESS, OLD_TWO)),
    Field((FOREACH,), (ADAMW_IN_PROCESS, ADAMW_TWO)),
    Field((PRODIGYOPT,), (ONE, COPYING, FOUR)),
)
BEHIND = (
    Field((PRODIGYOPT, FUSED), (IN_PROCESS, TWO, COPYING, ADAMW_TWO, ADAMW_COPYING)),
    Field((PRODIGYOPT, FUSED), (TWO, COPYING)),  # where memory has no room for more
)


@dataclasses.dataclass(frozen=True, slots=True)
class Size:
    """A model and its races.

    Attributes:
        name: How the results call it.
        shapes: Of its parameters.
        given: Who races with the gradient given, one race after the other.
        behind: Who races behind a backward, if anybody does.
        budget_s: Seconds for each race.
        has_latency: Whether it is small enough for what the service takes beyond its kernels to be told.
    """

    name: str
    shapes: Sequence[torch.Size]
    given: tuple[Field, ...]
    behind: Field | None
    budget_s: float
    has_latency: bool = False


def sizes(quick: bool) -> list[Size]:
    """All models, or two small ones."""
    million = 1_000_000
    if quick:
        return [
            Size("1 M", layered(million), (EVERYBODY,), BEHIND[0], 0.5, has_latency=True),
            Size("LoRA", lora(60), (LORA,), BEHIND[0], 0.5),
        ]
    return [
        Size("1 M", layered(million), (EVERYBODY,), BEHIND[0], 10.0, has_latency=True),
        Size("LoRA", lora(), (LORA,), BEHIND[0], 12.0),
        Size("32 M", layered(32 * million), (EVERYBODY,), BEHIND[0], 20.0),
        Size("128 M", layered(128 * million), LARGE, BEHIND[1], 15.0),
        # Temporaries of more than 32 MiB are fresh memory each time: those who make some pay for it.
        Size("128 M in tensors of 16 M", [torch.Size((4096, 4096))] * 8, LARGE[:2], None, 10.0),
    ]


def rows(quick: bool) -> list[Row]:
    """Every step's figures."""
    torch.set_num_threads(cores())
    found: list[Row] = []
    with ray_of_its_own():
        for size in sizes(quick):
            for number, field in enumerate(size.given, start=1):
                tell(f"{size.name}, gradient given, race {number} of {len(size.given)}")
                found += given(size, field, is_first=number == 1)
            if size.behind is not None:
                tell(f"{size.name}, behind a backward")
                found += behind(size, size.behind)
    return found


def given(size: Size, field: Field, *, is_first: bool) -> list[Row]:
    """The steps alone, over gradients that lie there."""
    section, workload = f"step, {size.name}, gradient given", Workload(size.shapes)
    if missing := left_out(str(field), needed_bytes(field, workload.numel), section=section):
        return missing
    overlapping = {entry.name for entry in field.entries if entry.overlap}
    with optimizers(workload, field, with_grads=True) as entered:
        contestants = [
            Contestant(name, optimizer.step, num, *([backward_of(workload, params)] if name in overlapping else []))
            for name, (optimizer, params, num) in entered.items()
        ]
        found = race(contestants, yardsticks=yardsticks(workload), budget_s=size.budget_s)
    result = found.machine(section) if is_first else []
    result += [
        found.row(
            entry.name,
            other,
            scale=1e9 / workload.numel,
            yardstick=FUSED,
            section=section,
            key=f"step/{size.name}/given/{entry.name}/{other}",
        )
        for entry, other in pairs(field, found)
    ]
    if size.has_latency and TWO.name in found:
        result.append(latency(found, TWO.name, IN_PROCESS.name, section=section, key=f"step/{size.name}/latency"))
    return result


def behind(size: Size, field: Field) -> list[Row]:
    """Training steps, beyond what their backward takes."""
    section, workload = f"step, {size.name}, behind a backward", Workload(size.shapes)
    if missing := left_out(str(field), needed_bytes(field, workload.numel), section=section):
        return missing
    with optimizers(workload, field, with_grads=False) as entered:
        contestants = [
            Contestant(name, behind_backward(workload, params, optimizer), num)
            for name, (optimizer, params, num) in entered.items()
        ]
        alone = Contestant(BACKWARD, behind_backward(workload, workload.params(with_grads=False), None))
        found = race([alone, *contestants], budget_s=size.budget_s)
    return [
        found.row(
            entry.name,
            other,
            scale=1e9 / workload.numel,
            beyond=BACKWARD,
            section=section,
            key=f"step/{size.name}/behind/{entry.name}/{other}",
        )
        for entry, other in pairs(field, found)
    ]


def pairs(field: Field, found: Race) -> list[tuple[Entry, str]]:
    """Who is compared with whom."""
    return [
        (entry, other) for entry in field.entries for other in entry.against if entry.name in found and other in found
    ]


def latency(found: Race, service: str, alone: str, *, section: str, key: str) -> Row:
    """What the service takes beyond its kernels, which is the step in one process."""
    return Row(
        name=f"{service}: its time less that in process",
        ours=found.seconds(service, beyond=alone) * 1e3,
        unit="ms",
        section=section,
        key=key,
        note=f"kernels: {found.seconds(alone) * 1e3:.2f} ms, the step in process of the same size",
    )


Entered = dict[str, tuple[torch.optim.Optimizer, list[torch.nn.Parameter], int]]
"""Name to an optimizer, its parameters and the bytes that a step of it must move."""


@contextlib.contextmanager
def optimizers(workload: Workload, field: Field, *, with_grads: bool) -> Iterator[Entered]:
    """Make everybody of a field; services end with the block."""
    entered: Entered = {}
    with contextlib.ExitStack() as stack:
        for name in field.theirs:
            build, num_bytes = THEIRS[name]
            params = workload.params(with_grads=with_grads)
            entered[name] = build(params), params, num_bytes * workload.numel
        for entry in field.entries:
            params = workload.params(with_grads=with_grads)
            options: dict[str, Any] = {"overlap": entry.overlap}
            if entry.num_shards is not None:
                options["service"] = stack.enter_context(service_of(entry.num_shards))
            optimizer: stepwell.ServiceOptimizer = ours(entry.rule, params, **options)
            stack.callback(optimizer.close)
            entered[entry.name] = optimizer, params, (STEP_BYTES[entry.rule] + MODEL_COPY_BYTES) * workload.numel
        yield entered


def needed_bytes(field: Field, numel: int) -> int:
    """Memory for everybody's parameters, state and buffers, and for what is on its way to shards."""
    return (YARDSTICKS_MEMORY + THEIR_MEMORY * len(field.theirs) + OUR_MEMORY * len(field.entries)) * numel


if __name__ == "__main__":
    main(rows, __doc__)
