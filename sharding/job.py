"""What a service is asked to do: the rule, the parameters and the workers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ..optim import RULES, Rule
from .compiling import KERNELS, Kernel
from .coverage import GRADIENTS, Gradients
from .errors import JobMismatchError, MessageError
from .keys import Keys
from .layout import Layout, ParamSpec, dtype_from_name


@dataclasses.dataclass(frozen=True)
class JobSpec:
    """A training job, as its first worker registers it and every other worker must.

    Attributes:
        rule: The update rule with its default hyperparameters.
        params: Every parameter, by index.
        num_groups: Parameter groups.
        world_size: Workers.
        chunk_numel: Elements in a chunk; None chooses by the model's size. Never touches the result.
        gradients: What a rank's gradient means.
        batches: How many parameters were registered at once, time after time; empty for all at once.
        kernel: How passes run; the service says so, as the bits depend on it.

    Raises:
        ValueError: If ``batches`` are not all parameters, or ``gradients`` is unknown.
    """

    rule: Rule
    params: tuple[ParamSpec, ...]
    num_groups: int
    world_size: int
    chunk_numel: int | None = None
    gradients: Gradients = "local"
    batches: tuple[int, ...] = ()
    kernel: Kernel = "eager"

    def __post_init__(self) -> None:
        if self.gradients not in GRADIENTS:
            raise ValueError(f"gradients: expected one of {', '.join(GRADIENTS)}, got {self.gradients!r}")
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {self.kernel!r}")
        if self.batches and (sum(self.batches) != len(self.params) or min(self.batches) < 0):
            raise ValueError(f"batches: expected counts of {len(self.params)} parameters in all, got {self.batches}")

    def layout(self) -> Layout:
        """The flat space of these parameters."""
        return Layout.build(self.params, batches=self.batches or None, chunk_numel=self.chunk_numel)

    def extended(self, other: JobSpec) -> JobSpec:
        """This job with the parameters and groups that ``other`` has beyond it, registered as one more batch.

        Raises:
            JobMismatchError: If ``other`` does not begin with this job's parameters.
        """
        begun = dataclasses.replace(
            other, params=other.params[: len(self.params)], num_groups=self.num_groups, batches=()
        )
        self.require_same(begun, whose="the job with the added group")
        batches = (*(self.batches or (len(self.params),)), len(other.params) - len(self.params))
        return dataclasses.replace(self, params=other.params, num_groups=other.num_groups, batches=batches)

    def keys(self) -> Keys:
        """The tensors and output channels, as the rule sees them."""
        return Keys.build(self.params, self.rule)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a message or a manifest."""
        return {
            "rule": self.rule.name,
            "rule_fields": RULES.to_fields(self.rule),
            "params": [
                [param.name, list(param.shape), param.dtype, param.group, param.decays] for param in self.params
            ],
            "num_groups": self.num_groups,
            "world_size": self.world_size,
            "chunk_numel": self.chunk_numel,
            "gradients": self.gradients,
            "batches": list(self.batches),
            "kernel": self.kernel,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> JobSpec:
        """The reverse of :meth:`to_dict`.

        Raises:
            MessageError: If a field is missing or cannot be what it should.
        """
        try:
            params = [
                ParamSpec(str(name), tuple(shape), dtype, int(group), bool(decays))
                for name, shape, dtype, group, decays in fields["params"]
            ]
            for param in params:
                dtype_from_name(param.dtype)
                if not 0 <= param.group < int(fields["num_groups"]) or not _is_shape(param.shape):
                    raise ValueError(f"{param} is in no group, or has no size")
            if len(fields["batches"]) > _LIMITS["num_groups"]:
                raise ValueError(f"batches: expected at most {_LIMITS['num_groups']}, got {len(fields['batches'])}")
            for key, limit in _LIMITS.items():
                if not 1 <= int(fields[key]) <= limit:
                    raise ValueError(f"{key}: expected 1 to {limit}, got {fields[key]}")
            return cls(
                rule=RULES.build(fields["rule"], fields["rule_fields"]),
                params=tuple(params),
                num_groups=int(fields["num_groups"]),
                world_size=int(fields["world_size"]),
                chunk_numel=None if fields["chunk_numel"] is None else int(fields["chunk_numel"]),
                gradients=fields["gradients"],
                batches=tuple(int(count) for count in fields["batches"]),
                kernel=fields["kernel"],
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise MessageError(f"expected a job description; {type(error).__name__}: {error}") from error

    def require_same(self, other: JobSpec, *, whose: str) -> None:
        """Compare a worker's job with this one.

        Args:
            other: The worker's.
            whose: Names it in the message: a rank or a checkpoint.

        Raises:
            JobMismatchError: Naming the first difference.
        """
        difference = self._first_difference(other, theirs=whose)
        if difference is None:
            return
        raise JobMismatchError(
            f"{whose} does not match the service's job: {difference}. "
            "Build the same model and optimizer, or use another service."
        )

    def _first_difference(self, other: JobSpec, theirs: str) -> str | None:
        ours, theirs = "the service has", f"{theirs} has"
        whole = (
            ("rule", self.rule.name, other.rule.name),
            ("world_size", self.world_size, other.world_size),
            ("gradients", self.gradients, other.gradients),
            ("number of parameter groups", self.num_groups, other.num_groups),
        )
        for label, mine, other_value in whole:
            if mine != other_value:
                return f"{label}: {ours} {mine}, {theirs} {other_value}"
        for index, (param, other_param) in enumerate(zip(self.params, other.params, strict=False)):
            if not _same(param, other_param):
                return f"parameter {index}: {ours} {_describe(param)}, {theirs} {_describe(other_param)}"
        if len(self.params) != len(other.params):
            return f"number of parameters: {ours} {len(self.params)}, {theirs} {len(other.params)}"
        for key in sorted(self.rule.structural):
            mine, other_value = getattr(self.rule, key), getattr(other.rule, key)
            if mine != other_value:
                return f"{key}: {ours} {mine}, {theirs} {other_value}"
        if self.rule.slots != other.rule.slots:
            slots = [", ".join(slot.name for slot in rule.slots) for rule in (self.rule, other.rule)]
            return f"state: {ours} {slots[0]}, {theirs} {slots[1]}"
        return None


_LIMITS = {"num_groups": 2**16, "world_size": 2**20}
"""What is laid out for each of these is small, and many more of them than anybody has would take for ever."""
_MAX_DIMS = 64
"""torch's own limit."""


def _is_shape(shape: tuple[object, ...]) -> bool:
    """Whether these are the sizes of a tensor that torch could have."""
    sizes = [size for size in shape if type(size) is int and 0 <= size < 2**63]
    return len(sizes) == len(shape) <= _MAX_DIMS and math.prod(size for size in sizes if size) < 2**63


def _same(param: ParamSpec, other: ParamSpec) -> bool:
    """Whether two parameters are one; a name that is not known fits any."""
    same_name = param.name == other.name or not param.name or not other.name
    return same_name and dataclasses.replace(param, name="") == dataclasses.replace(other, name="")


def _describe(param: ParamSpec) -> str:
    decay = "" if param.decays else ", without weight decay"
    return f"'{param.name}' {list(param.shape)} {param.dtype} in group {param.group}{decay}"
