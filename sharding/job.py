"""What a service is asked to do: the rule, the parameters and the workers."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import msgpack
import torch

from ..optim import RULES, Rule
from .errors import JobMismatchError, MessageError
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
    """

    rule: Rule
    params: tuple[ParamSpec, ...]
    num_groups: int
    world_size: int
    chunk_numel: int | None = None

    def layout(self) -> Layout:
        """The flat space of these parameters."""
        return Layout.build(self.params, chunk_numel=self.chunk_numel)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a message or a manifest."""
        return {
            "rule": self.rule.name,
            "rule_fields": RULES.to_fields(self.rule),
            "params": [[param.name, list(param.shape), param.dtype, param.group] for param in self.params],
            "num_groups": self.num_groups,
            "world_size": self.world_size,
            "chunk_numel": self.chunk_numel,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> JobSpec:
        """The reverse of :meth:`to_dict`.

        Raises:
            MessageError: If a field is missing or cannot be what it should.
        """
        try:
            params = [ParamSpec(str(name), tuple(shape), dtype, int(group)) for name, shape, dtype, group in fields["params"]]
            for param in params:
                dtype_from_name(param.dtype)
            return cls(
                rule=RULES.build(fields["rule"], fields["rule_fields"]),
                params=tuple(params),
                num_groups=int(fields["num_groups"]),
                world_size=int(fields["world_size"]),
                chunk_numel=fields["chunk_numel"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise MessageError(f"expected a job description; {type(error).__name__}: {error}") from error

    def digest(self) -> str:
        """Hex digest of everything that must be equal on all workers."""
        return hashlib.sha256(msgpack.packb(self._compared())).hexdigest()

    def require_same(self, other: JobSpec, *, whose: str) -> None:
        """Compare a worker's job with this one.

        Args:
            other: The worker's.
            whose: Names the worker in the message.

        Raises:
            JobMismatchError: Naming the first difference.
        """
        if self.digest() == other.digest():
            return
        difference = self._first_difference(other)
        raise JobMismatchError(
            f"{whose} does not match the service's job: {difference}. "
            "Build the same model and optimizer, or use another service."
        )

    def _compared(self) -> dict[str, Any]:
        fields = self.to_dict()
        structural = self.rule.structural
        fields["rule_fields"] = {key: value for key, value in fields["rule_fields"].items() if key in structural}
        fields["slots"] = [[slot.name, slot.stride] for slot in self.rule.slots]
        del fields["chunk_numel"]
        return fields

    def _first_difference(self, other: JobSpec) -> str:
        mine, theirs = self._compared(), other._compared()
        for key, label in (("rule", "rule"), ("world_size", "world_size"), ("num_groups", "number of parameter groups")):
            if mine[key] != theirs[key]:
                return f"{label}: the service has {mine[key]}, this worker {theirs[key]}"
        for index, (param, theirs_param) in enumerate(zip(self.params, other.params, strict=False)):
            if param != theirs_param:
                return f"parameter {index}: the service has {_describe(param)}, this worker {_describe(theirs_param)}"
        if len(self.params) != len(other.params):
            return f"number of parameters: the service has {len(self.params)}, this worker {len(other.params)}"
        for key in mine["rule_fields"]:
            if mine["rule_fields"][key] != theirs["rule_fields"].get(key):
                return f"{key}: the service has {mine['rule_fields'][key]}, this worker {theirs['rule_fields'].get(key)}"
        return f"slots: the service has {mine['slots']}, this worker {theirs['slots']}"


def kernel_identity(device: torch.device) -> str:
    """What the bits of a kernel depend on beside its inputs, in one line."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, eager, {torch.cuda.get_device_name(device)}"
    return f"torch {torch.__version__}, eager, {device.type} {torch.backends.cpu.get_cpu_capability()}"


def _describe(param: ParamSpec) -> str:
    return f"'{param.name}' {list(param.shape)} {param.dtype} in group {param.group}"
