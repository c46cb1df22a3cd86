"""What a rule keeps and sums per tensor or output channel: which keys there are, and their state.

Key state is small, float64 and equal on every shard. In and out of the shard it travels as a slot of its tensor, with
one element per key, so that messages, checkpoints and state dicts need know nothing of it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..optim import Channels, KeySlot, Rule, Scope
from .layout import ParamSpec


@dataclasses.dataclass(frozen=True, slots=True)
class Keys:
    """The tensors' output channels, numbered in index order. Channel c of a tensor is a run of its elements.

    Attributes:
        first_channel: ``(num_tensors + 1,)`` int64, where each tensor's channels begin.
        channel_numel: ``(num_tensors,)`` int64, elements of each of its channels; 1 where there are none.
    """

    first_channel: NDArray[np.int64]
    channel_numel: NDArray[np.int64]

    @classmethod
    def build(cls, params: Sequence[ParamSpec], rule: Rule) -> Keys:
        """The channels of ``params`` as ``rule`` sees them; a tensor without elements has none."""
        counts = [rule.num_channels(param.shape) if param.numel else 0 for param in params]
        numels = [param.numel // count if count else 1 for param, count in zip(params, counts, strict=True)]
        first = np.concatenate(([0], np.cumsum(np.asarray(counts, np.int64))))
        return cls(first.astype(np.int64), np.asarray(numels, np.int64))

    @property
    def num_tensors(self) -> int:
        """How many tensors there are."""
        return len(self.channel_numel)

    @property
    def num_channels(self) -> int:
        """How many channels there are."""
        return int(self.first_channel[-1])

    @property
    def channels(self) -> Channels:
        """Which tensor each channel is of, and its elements."""
        counts = np.diff(self.first_channel)
        tensor = torch.from_numpy(np.repeat(np.arange(self.num_tensors, dtype=np.int64), counts))
        return Channels(tensor, torch.from_numpy(np.repeat(self.channel_numel, counts)).to(torch.float64))

    def of_param(self, scope: Scope, param: int) -> slice:
        """A tensor's keys among all keys of ``scope``, TENSOR or CHANNEL."""
        if scope is Scope.TENSOR:
            return slice(param, param + 1)
        return slice(int(self.first_channel[param]), int(self.first_channel[param + 1]))

    def count(self, scope: Scope, param: int) -> int:
        """How many keys a tensor has."""
        return len(range(self.num_tensors + self.num_channels)[self.of_param(scope, param)])

    def initial(self, slot: KeySlot) -> Tensor:
        """A key slot before the first step, ``(num_keys,)`` float64."""
        total = self.num_tensors if slot.scope is Scope.TENSOR else self.num_channels
        return torch.full((total,), slot.init, dtype=torch.float64, device="cpu")


@final
class KeyState:
    """A rule's key slots on one shard.

    Args:
        rule: Says which there are.
        keys: The keys.

    Attributes:
        values: Name to ``(num_keys,)`` float64 on the CPU. Replaced by each step, never edited.
    """

    def __init__(self, rule: Rule, keys: Keys) -> None:
        self._slots, self._keys = rule.key_slots, keys
        self.values: Mapping[str, Tensor] = {slot.name: keys.initial(slot) for slot in rule.key_slots}

    @property
    def names(self) -> tuple[str, ...]:
        """The key slots' names."""
        return tuple(slot.name for slot in self._slots)

    def continuing(self, before: KeyState) -> KeyState:
        """The state of ``before``, with the keys that are here beyond it as they are here; those come last."""
        both = copy.copy(self)
        both.values = {
            name: torch.cat((before.values[name], values[len(before.values[name]) :]))
            for name, values in self.values.items()
        }
        return both

    def pieces(self, params: Sequence[int]) -> Iterator[tuple[str, int, Tensor]]:
        """Slot name, parameter index and ``(keys of the parameter,)`` of some parameters; none without keys."""
        for slot in self._slots:
            for param in params:
                if self._keys.count(slot.scope, param):
                    yield slot.name, param, self.values[slot.name][self._keys.of_param(slot.scope, param)].clone()

    def load(self, read: Callable[[int, str, int, Tensor], None], available: Set[tuple[int, str]]) -> None:
        """Take all of it from a state; what that lacks starts afresh. Every shard reads every key."""
        loaded = {}
        for slot in self._slots:
            values = self._keys.initial(slot)
            for param in range(self._keys.num_tensors):
                count = self._keys.count(slot.scope, param)
                if count and (param, slot.name) in available:
                    read(param, slot.name, 0, values[self._keys.of_param(slot.scope, param)])
            loaded[slot.name] = values
        self.values = loaded
