"""The form of an update rule: what a rule declares, what it is given, what it returns.

A rule is pure arithmetic on *tiles*, rows of 256 elements. It never sees a shard, a worker or a device. One step is

    local      first pass over the tiles; may write slots, never parameters; returns sums to be reduced
    combine    new scalars from the totals of those sums, in float64, the same on every shard
    apply      second pass over the tiles; writes parameters and slots

and the two ``*_coefficients`` methods turn hyperparameters, scalars and step counts into numbers per tensor, in
float64, which the passes read per tile. Hyperparameters reach a pass as tensors only, so that a pass compiles once.

Two conventions let one call serve a run of many tensors:

* a tensor without a gradient in this step is *absent*: its gradient reads as zero, and the rule's coefficients must
  make both passes leave it as it was (decay 1, gain 0, step size 0), unless the rule says otherwise in its docstring;
* padding is zero in every slot, in the gradient and in the parameter, and a pass must map zeros to zeros.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import math
import numbers
from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

TILE_NUMEL = 256
"""Elements in a tile. Every tensor starts on a tile boundary."""


class Scope(enum.Enum):
    """What a rule's sums are taken over."""

    MODEL = "model"
    GROUP = "group"
    TENSOR = "tensor"


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """One state vector of a rule.

    Attributes:
        name: The reference implementation's name for it (``exp_avg``, ``s``, ...).
        init: ``"zeros"``, or ``"param"`` for a copy of the parameter as registered.
        stride: The slot holds every ``stride``-th element of the flattened tensor, ``ceil(numel / stride)`` in all.
        flat: Whether the reference's state dict keeps it flattened, not in the parameter's shape.
    """

    name: str
    init: Literal["zeros", "param"] = "zeros"
    stride: int = 1
    flat: bool = False

    @property
    def width(self) -> int:
        """Elements of this slot beside one tile: a row of the slot belongs to a tile, whatever the stride."""
        return -(-TILE_NUMEL // self.stride)


@dataclasses.dataclass(frozen=True, slots=True)
class Tiles:
    """A run of tiles, as a pass reads them. A pass returns new tensors and edits none of these.

    Attributes:
        param: ``(tiles, 256)`` state dtype, the master parameters.
        grad: ``(tiles, 256)`` state dtype, mean over ranks; zero where absent and in padding.
        slots: Name to ``(tiles, slot.width)`` state dtype.
        slice_index: ``(tiles, width)`` int64, columns of the elements that strided slots hold; None at stride 1.
        slice_valid: ``(tiles, width)`` bool, False where a row holds fewer elements than its width.
    """

    param: Tensor
    grad: Tensor
    slots: Mapping[str, Tensor]
    slice_index: Tensor | None = None
    slice_valid: Tensor | None = None

    def sliced(self, values: Tensor) -> Tensor:
        """The elements of ``values`` (``(tiles, 256)``) that strided slots hold, ``(tiles, width)``, zero-filled."""
        if self.slice_index is None or self.slice_valid is None:
            return values
        return values.gather(1, self.slice_index) * self.slice_valid


@dataclasses.dataclass(frozen=True, slots=True)
class StepInputs:
    """What every shard knows alike about one step, before any sum is taken.

    Attributes:
        hyper: Live hyperparameters by name, each ``(num_groups,)`` float64.
        group_of_tensor: ``(num_tensors,)`` int64.
        present: ``(num_tensors,)`` bool, whether the tensor has a gradient in this step.
        step_count: ``(num_tensors,)`` float64, the tensor's steps so far, this one included where it is present.
        scalars: The rule's scalars as the last step left them.
        numel: ``(num_tensors,)`` float64, elements of each tensor.
    """

    hyper: Mapping[str, Tensor]
    group_of_tensor: Tensor
    present: Tensor
    step_count: Tensor
    scalars: Mapping[str, float]
    numel: Tensor

    def per_tensor(self, name: str) -> Tensor:
        """Hyperparameter ``name`` of each tensor's group, ``(num_tensors,)`` float64."""
        return self.hyper[name][self.group_of_tensor]

    def where_present(self, value: Tensor | float, otherwise: float) -> Tensor:
        """``value`` for tensors with a gradient, ``otherwise`` for absent ones, ``(num_tensors,)`` float64."""
        wanted = torch.as_tensor(value, dtype=torch.float64).expand(self.present.shape)
        return torch.where(self.present, wanted, torch.tensor(otherwise, dtype=torch.float64))


@dataclasses.dataclass(frozen=True, slots=True)
class Combined:
    """The outcome of the reduction.

    Attributes:
        scalars: The rule's scalars after this step.
        moves: False ends the step before ``apply``: no parameter moves and no step count rises.
    """

    scalars: Mapping[str, float]
    moves: bool = True


Coefficients = Mapping[str, Tensor]
"""Name to ``(num_tensors,)`` float64 as a rule computes them; to ``(tiles, 1)`` state dtype as a pass reads them."""


@dataclasses.dataclass(frozen=True)
class Rule(abc.ABC):
    """An update rule and its default hyperparameters. Subclass :class:`ElementwiseRule` or :class:`ReducingRule`.

    A rule is a frozen dataclass: its fields are the keywords and defaults of the reference optimizer. Fields named in
    ``structural`` shape the state or the passes and hold for the whole job; all others may differ by parameter group
    and change from step to step.
    """

    name: ClassVar[str]
    structural: ClassVar[frozenset[str]] = frozenset()
    carried_group_keys: ClassVar[Mapping[str, object]] = {}
    """Keys of the reference's groups that mean nothing here, shown so that state dicts stay interchangeable."""
    scalar_minimums: ClassVar[Mapping[str, float]] = {}
    """Smallest values that a person may write into the scalars."""
    step_is_tensor: ClassVar[bool] = True
    """Whether the reference keeps ``state["step"]`` as a 0-dim float32 tensor (torch) or as an int."""

    @property
    @abc.abstractmethod
    def slots(self) -> tuple[Slot, ...]:
        """The rule's state vectors, beside the master parameters."""

    @property
    @abc.abstractmethod
    def initial_scalars(self) -> dict[str, float]:
        """The rule's small replicated state before the first step; its names are group keys that the rule writes."""

    @abc.abstractmethod
    def hyper(self, group: Mapping[str, object]) -> dict[str, float]:
        """Read one parameter group's live hyperparameters as floats.

        Called at every step on rank 0. The names are the same for every group and every call.

        Raises:
            ValueError: If a value is out of range; the message holds the value.
        """

    @abc.abstractmethod
    def apply_coefficients(
        self, step: StepInputs, scalars: Mapping[str, float], totals: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Numbers per tensor for ``apply``.

        Args:
            step: The step's inputs; ``step.scalars`` are those *before* the step.
            scalars: The scalars after ``combine``.
            totals: Sum name to ``(num_keys,)`` float64; empty for an elementwise rule.

        Returns:
            Name to ``(num_tensors,)`` float64.
        """

    @abc.abstractmethod
    def apply(self, tiles: Tiles, c: Coefficients) -> tuple[Tensor, dict[str, Tensor]]:
        """Second pass: the new parameters ``(tiles, 256)`` and the slots that change."""

    def check_scalars(self, scalars: Mapping[str, float]) -> None:
        """See that scalars which come from outside can be used.

        Raises:
            ValueError: If one is unknown, not finite or below its minimum.
        """
        for name, value in scalars.items():
            if name not in self.initial_scalars:
                raise ValueError(f"{name} is no scalar of {self.name}; it has {sorted(self.initial_scalars)}")
            smallest = self.scalar_minimums.get(name, -math.inf)
            require(math.isfinite(value) and value >= smallest, f"{name} value", value)

    def defaults(self) -> dict[str, object]:
        """Keys and values of a fresh parameter group: fields, scalars, and the reference's other keys."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, **self.initial_scalars, **self.carried_group_keys}


class ElementwiseRule(Rule):
    """A rule that needs no sum: everything happens in ``apply``."""


class ReducingRule(Rule):
    """A rule with one reduction between its two passes."""

    scope: ClassVar[Scope]
    sums: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def local_coefficients(self, step: StepInputs) -> dict[str, Tensor]:
        """Numbers per tensor for ``local``, name to ``(num_tensors,)`` float64."""

    @abc.abstractmethod
    def local(self, tiles: Tiles, c: Coefficients) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """First pass: the slots that change, and the tile partials of each of ``sums``, ``(tiles,)``."""

    @abc.abstractmethod
    def combine(self, step: StepInputs, totals: Mapping[str, Tensor]) -> Combined:
        """New scalars from the totals, each ``(num_keys,)`` float64, keys in canonical order of ``scope``."""


def tile_sum(values: Tensor) -> Tensor:
    """Sum each row, ``(tiles, width)`` to ``(tiles,)``; a row's bits depend on nothing but the row.

    On the CPU a row is one short contiguous reduction, whose order does not depend on the number of rows, on their
    alignment or on threads. CUDA's eager reduction picks its tree by the number of rows, so there the row is halved
    with elementwise additions; a compiled kernel fixes its own tree.
    """
    if values.device.type == "cpu" or torch.compiler.is_compiling():
        return values.sum(dim=1)
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        folded = values[:, :half] + values[:, half : 2 * half]
        values = torch.cat((folded, values[:, 2 * half :]), dim=1)
    return values[:, 0]


def adam_denominator(exp_avg_sq: Tensor, eps: Tensor) -> Tensor:
    """``sqrt(v) + eps``, held above zero so that an element whose v and eps are both 0 divides 0 by a tiny number.

    Differs: the references give 0/0 = NaN there; padding and never-touched elements must stay zero.
    """
    return (exp_avg_sq.sqrt() + eps).clamp_min(torch.finfo(exp_avg_sq.dtype).tiny)


def read_float(group: Mapping[str, object], key: str) -> float:
    """Read a number from a parameter group: a float, an int, a bool or a 0-dim tensor."""
    return _to_float(group[key], f"{key} value")


def read_betas(group: Mapping[str, object]) -> tuple[float, float]:
    """Read ``betas``, a pair in [0, 1)."""
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Invalid betas value: {betas!r} (expected a pair of numbers)")
    labels = [f"beta parameter at index {index}" for index in range(2)]
    beta1, beta2 = (_to_float(beta, label) for beta, label in zip(betas, labels, strict=True))
    for beta, label in zip((beta1, beta2), labels, strict=True):
        require(0.0 <= beta < 1.0, label, beta)
    return beta1, beta2


def _to_float(value: object, what: str) -> float:
    if isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.numel() == 1):
        return float(value)
    raise ValueError(f"Invalid {what}: {value!r} (expected a number or a 0-dim tensor)")


def require(condition: bool, what: str, value: object) -> None:
    """Raise torch's form of error, ``Invalid <what>: <value>``, unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"Invalid {what}: {value}")


@final
class RuleRegistry:
    """The rules by name, as a job's description names them."""

    def __init__(self, *rules: type[Rule]) -> None:
        self._rules = {rule.name: rule for rule in rules}

    def names(self) -> list[str]:
        """All rule names, sorted."""
        return sorted(self._rules)

    def to_fields(self, rule: Rule) -> dict[str, object]:
        """A rule's fields as plain values."""
        return {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}

    def build(self, name: str, fields: Mapping[str, object]) -> Rule:
        """Rebuild a rule from its name and fields.

        Raises:
            ValueError: If the rule or one of the fields is unknown here, or a value is out of range.
        """
        if name not in self._rules:
            raise ValueError(f"unknown rule {name!r}; this version knows {', '.join(self.names())}")
        known = {field.name for field in dataclasses.fields(self._rules[name])}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"rule {name} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        return self._rules[name](**values)
