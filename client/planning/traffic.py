"""What a rule's passes read and write, found by running them once on a tile."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ...optim import MASTER_PARAM, TILE_NUMEL, ReducingRule, Rule, Tiles, strided
from ...sharding.buffers import MASTER

GRADIENT = "gradient"
"""The step's gradient, beside the slots' names."""


@dataclasses.dataclass(frozen=True, slots=True)
class PassTraffic:
    """One pass over the state.

    Attributes:
        name: ``"local"``, ``"apply"``, or ``"local and apply"`` where both go over tiles while they are in cache.
        reads, writes: Slots, the master parameters and :data:`GRADIENT` among them.
        has_params: Whether it is the one that writes parameters, to the workers' memory too.
    """

    name: str
    reads: frozenset[str]
    writes: frozenset[str]
    has_params: bool

    def size_bytes(self, rule: Rule, state_dtype: torch.dtype, *, writes_cost_twice: bool) -> float:
        """Bytes that move per element of the state, without the gradient and the workers' parameters.

        Args:
            rule: The rule.
            state_dtype: Of the element.
            writes_cost_twice: Whether memory that is written and not read has to be read all the same, as by a CPU.
        """
        by_name = {
            slot.name: slot.width / TILE_NUMEL * slot.dtype(state_dtype).itemsize for slot in (MASTER, *rule.slots)
        }
        unread = self.writes - self.reads if writes_cost_twice else frozenset[str]()
        return sum(by_name[name] for names in (self.reads, self.writes, unread) for name in names if name != GRADIENT)


def passes_of(rule: Rule) -> tuple[PassTraffic, ...]:
    """The passes that a step of ``rule`` makes over the state."""
    passes = [_watch(rule, "apply")]
    if isinstance(rule, ReducingRule):
        passes.insert(0, _watch(rule, "local"))
        if rule.is_one_pass:
            local, apply = passes
            return (PassTraffic("local and apply", local.reads | apply.reads, local.writes | apply.writes, True),)
    return tuple(passes)


def _watch(rule: Rule, name: str) -> PassTraffic:
    """Run one pass on a tile. What no output is differentiable by is not read: a compiler leaves it out, too."""
    stride = max((slot.stride for slot in rule.slots), default=1)
    where = None if stride == 1 else strided(torch.zeros(1, dtype=torch.int64), stride)
    read = {slot.name: torch.full((1, slot.width), 0.5, requires_grad=True) for slot in (MASTER, *rule.slots)}
    read[GRADIENT] = torch.full((1, TILE_NUMEL), 0.25, requires_grad=True)
    slots = {slot.name: read[slot.name] for slot in rule.slots}
    tiles = Tiles(read[MASTER_PARAM], read[GRADIENT], slots, where)
    if name == "local":
        assert isinstance(rule, ReducingRule), "else there is no such pass"
        written, sums = rule.local(tiles, _Ones())
    else:
        param, changed = rule.apply(tiles, _Ones())
        written, sums = {MASTER_PARAM: param, **changed}, {}
    total = torch.stack([output.sum() for output in (*written.values(), *sums.values())]).sum()
    grads = torch.autograd.grad(total, list(read.values()), allow_unused=True)
    reads = frozenset(key for key, grad in zip(read, grads, strict=True) if grad is not None)
    return PassTraffic(name, reads, frozenset(written), has_params=name == "apply")


class _Ones(Mapping[str, Tensor]):
    """Coefficients, whatever they are called."""

    def __getitem__(self, name: str) -> Tensor:
        return torch.ones(1, 1)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0
