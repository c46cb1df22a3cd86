"""Parameter groups: what the rule reads from them, what is shown in them, and how they travel in state dicts."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..optim import Rule
from ..sharding.errors import HyperparameterError, UnsupportedParameterError
from ..sharding.layout import ParamSpec, dtype_name
from ..sharding.push import GRADIENT_DTYPES

Group = dict[str, Any]

_WRAPPER_PREFIXES = ("module.", "_orig_mod.")


def read_hyper(rule: Rule, groups: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Every group's live hyperparameters: name to one value per group.

    Raises:
        HyperparameterError: If a value is out of range, or one that holds for the whole job was changed.
    """
    per_group = []
    for index, group in enumerate(groups):
        for name in sorted(rule.structural):
            if group[name] != getattr(rule, name):
                raise HyperparameterError(
                    f"{name} of group {index}: expected {getattr(rule, name)!r} as in the whole job, got {group[name]!r}; "
                    "give it to the optimizer, not to a group"
                )
        try:
            per_group.append(rule.hyper(group))
        except ValueError as error:
            raise HyperparameterError(f"group {index}: {error}") from None
    return {name: [values[name] for values in per_group] for name in per_group[0]}


def param_specs(groups: Sequence[Mapping[str, Any]]) -> Iterator[ParamSpec]:
    """Describe every parameter, in index order.

    Raises:
        UnsupportedParameterError: If one is sparse, complex, quantized or integer.
    """
    for index, group in enumerate(groups):
        names = group.get("param_names") or [""] * len(group["params"])
        for name, param in zip(names, group["params"], strict=True):
            yield ParamSpec(_bare_name(name), tuple(param.shape), _dtype_of(param, name), index)


def written_scalars(rule: Rule, groups: Sequence[Mapping[str, Any]], shown: Mapping[str, float]) -> dict[str, float] | None:
    """Scalars that a person wrote into a group since :func:`show_scalars`; the first group with a change counts.

    Raises:
        HyperparameterError: If one is not a finite number.
    """
    written = {}
    for name in rule.initial_scalars:
        values = [float(group[name]) for group in groups if group.get(name, shown[name]) != shown[name]]
        if values and not math.isfinite(values[0]):
            raise HyperparameterError(f"{name}: expected a finite number, got {values[0]}")
        if values:
            written[name] = values[0]
    return written or None


def show_scalars(groups: Sequence[Group], scalars: Mapping[str, float]) -> None:
    """Write the rule's scalars into every group, where code that logs them looks."""
    for group in groups:
        group.update(scalars)


def pack_groups(groups: Sequence[Mapping[str, Any]]) -> list[Group]:
    """The groups as a state dict holds them, with parameter indices for parameters."""
    packed, start = [], 0
    for group in groups:
        stop = start + len(group["params"])
        packed.append({**{key: value for key, value in group.items() if key != "params"}, "params": list(range(start, stop))})
        start = stop
    return packed


def unpack_groups(saved: Sequence[Mapping[str, Any]], groups: Sequence[Group], defaults: Mapping[str, Any]) -> list[Group]:
    """Groups of a state dict with the present parameters; keys that it lacks take their defaults.

    Raises:
        ValueError: If the number or sizes of the groups differ, as torch.
    """
    if len(saved) != len(groups):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: expected {len(groups)}, got {len(saved)}"
        )
    unpacked = []
    for index, (old, group) in enumerate(zip(saved, groups, strict=True)):
        if len(old["params"]) != len(group["params"]):
            raise ValueError(
                f"loaded state dict contains a parameter group that doesn't match the size of optimizer's group {index}: "
                f"expected {len(group['params'])}, got {len(old['params'])}"
            )
        names = {"param_names": group["param_names"]} if "param_names" in group else {}
        kept = {key: copy.deepcopy(value) for key, value in old.items() if key not in ("params", "param_names")}
        unpacked.append({**defaults, **kept, **names, "params": group["params"]})
    return unpacked


def _bare_name(name: str) -> str:
    """A parameter's name without the prefixes of DDP and torch.compile."""
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def _dtype_of(param: Tensor, name: str) -> str:
    if param.dtype not in GRADIENT_DTYPES or param.is_sparse or param.is_quantized:
        raise UnsupportedParameterError(
            f"parameter '{name}' {list(param.shape)}: expected a dense floating-point parameter, got {param.dtype}, "
            f"{param.layout}; leave it out of the optimizer"
        )
    return dtype_name(param.dtype)
