"""The form of an update rule: what a rule declares, what it is given, what it returns.

A rule is pure arithmetic on *tiles*, rows of 256 elements. It never sees a shard, a worker or a device. One step is

    local      first pass over the tiles; may write slots; returns sums to be reduced
    combine    new scalars and key state from the totals of those sums, in float64, the same on every shard
    apply      second pass over the tiles; writes parameters and slots

and the ``*_coefficients`` methods turn hyperparameters, scalars and step counts into numbers per tensor or output
channel, in float64, which the passes read per tile or element. Hyperparameters reach a pass as tensors only, so that a
pass compiles once.

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
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .hyper import require
from .scalars import group_scalar, split_scalar
from .step_inputs import StepInputs

TILE_NUMEL = 256
"""Elements in a tile. Every tensor starts on a tile boundary."""

MASTER_PARAM = "master_param"
"""The name of the parameters among the slots."""


class Scope(enum.Enum):
    """What a rule's sums are taken over. A channel is an index along dim 0 of a tensor that the rule says has some."""

    MODEL = "model"
    GROUP = "group"
    TENSOR = "tensor"
    CHANNEL = "channel"


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """One state vector of a rule.

    Attributes:
        name: The reference implementation's name for it (``exp_avg``, ``s``, ...).
        init: ``"zeros"``, or ``"param"`` for a copy of the parameter as registered.
        stride: The slot holds every ``stride``-th element of the flattened tensor, ``ceil(numel / stride)`` in all.
        flat: Whether the reference's state dict keeps it flattened, not in the parameter's shape.
        kept_in: ``"state"`` for the state dtype, or ``"bfloat16"``: a pass reads it as the state dtype all the same,
            and what it returns is rounded.
        constant: No pass returns it: it changes with the parameter's registration, or by hand, alone.
    """

    name: str
    init: Literal["zeros", "param"] = "zeros"
    stride: int = 1
    flat: bool = False
    kept_in: Literal["state", "bfloat16"] = "state"
    constant: bool = False

    @property
    def width(self) -> int:
        """Elements of this slot beside one tile: a row of the slot belongs to a tile, whatever the stride."""
        return -(-TILE_NUMEL // self.stride)

    def dtype(self, state_dtype: torch.dtype) -> torch.dtype:
        """What it is kept, exported and saved in, for a tensor whose state has ``state_dtype``."""
        return torch.bfloat16 if self.kept_in == "bfloat16" else state_dtype


@dataclasses.dataclass(frozen=True, slots=True)
class KeySlot:
    """A number per tensor or output channel that a rule carries, float64 and the same on every shard.

    Outside the shard it travels as a slot of its tensor, with one element per key.

    Attributes:
        name: The reference implementation's name for it.
        scope: TENSOR or CHANNEL.
        init: Its value before the first step.
        shown_in: Its dtype in a state dict; a rule that names float32 keeps its values to that precision.
    """

    name: str
    scope: Literal[Scope.TENSOR, Scope.CHANNEL]
    init: float = 0.0
    shown_in: Literal["float32", "float64"] = "float64"


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """Which elements of some tiles their strided slots hold: every ``stride``-th of the flattened tensor.

    Attributes:
        columns: ``(tiles, width)`` int64.
        is_valid: ``(tiles, width)`` bool, False where a row holds fewer elements than its width.
    """

    columns: Tensor
    is_valid: Tensor

    def of(self, values: Tensor) -> Tensor:
        """These elements of ``values`` (``(tiles, 256)``), ``(tiles, width)``, zero-filled."""
        return values.gather(1, self.columns) * self.is_valid


def strided(index_in_tensor: Tensor, stride: int) -> Slice:
    """The slice of tiles that stand at ``index_in_tensor`` (``(tiles,)`` int64) in their tensors."""
    first = (-index_in_tensor * TILE_NUMEL) % stride
    steps = torch.arange(-(-TILE_NUMEL // stride), device=index_in_tensor.device) * stride
    columns = first[:, None] + steps
    is_valid = columns < TILE_NUMEL
    return Slice(torch.where(is_valid, columns, 0), is_valid)


@dataclasses.dataclass(frozen=True, slots=True)
class Tiles:
    """A run of tiles, as a pass reads them. A pass returns new tensors and edits none of these.

    Attributes:
        param: ``(tiles, 256)`` state dtype, the master parameters.
        grad: ``(tiles, 256)`` state dtype, mean over ranks; zero where absent and in padding.
        slots: Name to ``(tiles, slot.width)`` state dtype.
        slice: What strided slots hold; None at stride 1.
    """

    param: Tensor
    grad: Tensor
    slots: Mapping[str, Tensor]
    slice: Slice | None = None

    def sliced(self, values: Tensor) -> Tensor:
        """The elements of ``values`` (``(tiles, 256)``) that strided slots hold, ``(tiles, width)``, zero-filled."""
        return values if self.slice is None else self.slice.of(values)


@dataclasses.dataclass(frozen=True, slots=True)
class Combined:
    """What a step leaves of the rule's small state.

    Attributes:
        scalars: The rule's scalars after this step.
        moves: False ends the step before ``apply``: no parameter moves and no step count rises.
        key_state: Key slots after this step. A rule returns those that change and is handed all of them.
    """

    scalars: Mapping[str, float]
    moves: bool = True
    key_state: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


Coefficients = Mapping[str, Tensor]
"""Numbers as a pass reads them, in the state dtype: ``(tiles, 1)`` for those per tensor, ``(tiles, 256)`` or
``(1, 1)`` for those per channel."""


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
    """Smallest values that a person may write into the scalars, by plain name."""
    step_is_tensor: ClassVar[bool] = True
    """Whether the reference keeps ``state["step"]`` as a 0-dim float32 tensor (torch) or as an int."""

    @property
    @abc.abstractmethod
    def slots(self) -> tuple[Slot, ...]:
        """The rule's state vectors, beside the master parameters."""

    @property
    def key_slots(self) -> tuple[KeySlot, ...]:
        """The rule's state per tensor or channel; none by default."""
        return ()

    @property
    def plain_scalars(self) -> dict[str, float]:
        """The rule's small replicated state before the first step, by plain name: group keys that the rule writes."""
        return {}

    @property
    def has_scalars_per_group(self) -> bool:
        """Whether each group has scalars of its own."""
        return False

    @abc.abstractmethod
    def hyper(self, group: Mapping[str, object]) -> dict[str, float]:
        """Read one parameter group's live hyperparameters as floats.

        Called at every step on rank 0. The names are the same for every group and every call.

        Raises:
            ValueError: If a value is out of range; the message holds the value.
        """

    def num_channels(self, shape: tuple[int, ...]) -> int:
        """How many output channels a tensor of this shape has, as this rule sees it: ``shape[0]`` or 0."""
        return 0

    def combine(self, step: StepInputs, totals: Mapping[str, Tensor]) -> Combined:
        """New scalars and key state from the totals; by default nothing is carried from step to step.

        Args:
            step: The step's inputs.
            totals: Sum name to ``(num_keys,)`` float64, keys in canonical order of the rule's scope; empty for an
                elementwise rule.
        """
        return Combined(step.scalars)

    @abc.abstractmethod
    def apply_coefficients(self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Numbers per tensor for ``apply``.

        Args:
            step: The step's inputs; its scalars and key state are those *before* the step.
            after: What ``combine`` made of them.
            totals: As ``combine`` got them.

        Returns:
            Name to ``(num_tensors,)`` float64.
        """

    def channel_coefficients(
        self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Numbers per channel for ``apply``, for rules with channels; arguments as for :meth:`apply_coefficients`.

        Returns:
            Name to ``(num_channels + 1,)`` float64, the last one for elements outside any channel.
        """
        return {}

    @abc.abstractmethod
    def apply(self, tiles: Tiles, c: Coefficients) -> tuple[Tensor, dict[str, Tensor]]:
        """Second pass: the new parameters ``(tiles, 256)`` and the slots that change."""

    def initial_scalars(self, num_groups: int) -> dict[str, float]:
        """The scalars before the first step, under their flat names (see ``optim/scalars.py``)."""
        if not self.has_scalars_per_group:
            return self.plain_scalars
        return {
            group_scalar(name, group): value
            for group in range(num_groups)
            for name, value in self.plain_scalars.items()
        }

    def scalar_key(self, name: str, group: int) -> str:
        """The flat name of what ``group`` shows as ``name``."""
        return group_scalar(name, group) if self.has_scalars_per_group else name

    def check_scalars(self, scalars: Mapping[str, float], num_groups: int) -> None:
        """See that scalars which come from outside can be used.

        Raises:
            ValueError: If one is unknown, not finite or below its minimum.
        """
        known = self.initial_scalars(num_groups)
        for name, value in scalars.items():
            if name not in known:
                raise ValueError(f"{name} is no scalar of {self.name}; it has {sorted(known)}")
            smallest = self.scalar_minimums.get(split_scalar(name)[0], -math.inf)
            require(math.isfinite(value) and value >= smallest, f"{name} value", value)

    def write_scalars(self, scalars: Mapping[str, float], written: Mapping[str, float]) -> dict[str, float]:
        """The scalars once a person has written some, before the step that takes them; the same on every shard."""
        return {**scalars, **written}

    def defaults(self) -> dict[str, object]:
        """Keys and values of a fresh parameter group: fields, scalars, and the reference's other keys."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, **self.plain_scalars, **self.carried_group_keys}


class ElementwiseRule(Rule):
    """A rule that needs no sum: everything happens in ``apply``."""


class ReducingRule(Rule):
    """A rule with one reduction between its two passes."""

    scope: ClassVar[Scope]
    sums: ClassVar[tuple[str, ...]]

    @property
    def is_one_pass(self) -> bool:
        """Whether ``apply`` waits for no total: both passes then go over a run of tiles while it is in cache.

        Its coefficients are asked for with the scalars as before the step, and no totals.
        """
        return False

    def local_coefficients(self, step: StepInputs) -> dict[str, Tensor]:
        """Numbers per tensor for ``local``, name to ``(num_tensors,)`` float64; none by default."""
        return {}

    @abc.abstractmethod
    def local(self, tiles: Tiles, c: Coefficients) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """First pass: the slots that change, and the parts of each of ``sums``.

        A part is ``(tiles,)``, one partial per tile, or, where the scope is CHANNEL, ``(tiles, 256)``, one term per
        element; terms outside any channel do not count.
        """


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
