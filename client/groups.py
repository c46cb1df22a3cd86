"""Parameter groups: what the rule reads from them, what is shown in them, and how they travel in state dicts."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..optim import Rule, scalars_of_group
from ..sharding.errors import HyperparameterError, UnsupportedParameterError
from ..sharding.layout import ParamSpec, dtype_name
from ..sharding.push import GRADIENT_DTYPES

Group = dict[str, Any]
WeightDecayMask = Callable[[str, Tensor], bool] | Sequence[bool]
"""Which parameters decay: by name and tensor, or one flag for each in index order."""

_WRAPPERS = frozenset({"module", "_orig_mod"})


def plain_rule(rule: Rule) -> Rule:
    """The rule with numbers where it was given 0-dim tensors, so that it can travel; the groups keep the tensors."""
    fields = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    return dataclasses.replace(rule, **{name: _plain(value) for name, value in fields.items()})


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
                    f"{name} of group {index}: expected {getattr(rule, name)!r} as in the whole job, "
                    f"got {group[name]!r}; give it to the optimizer, not to a group"
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


def require_distinct(group: Group, groups: Sequence[Group]) -> None:
    """See that no parameter of a new group is given twice; its ``params`` become a list, if they were an iterator.

    Raises:
        ValueError: Naming the first parameter that stands in the group, or in it and another one, twice.
    """
    given = group.get("params")
    if not isinstance(given, Iterable) or isinstance(given, set):
        return  # torch says what is wrong with these
    group["params"] = listed = [given] if isinstance(given, Tensor) else list(given)
    where = {id(param): index for index, other in enumerate(groups) for param in other["params"]}
    for position, entry in enumerate(listed):
        name, param = entry if isinstance(entry, tuple) else (f"number {position}", entry)
        if isinstance(param, Tensor) and id(param) in where:
            raise ValueError(
                f"parameter '{name}' {list(param.shape)} of group {len(groups)} appears in group {where[id(param)]} "
                "already; give each parameter once, a shared one too"
            )
        where[id(param)] = len(groups)


def apply_mask(
    specs: Sequence[ParamSpec], params: Sequence[Tensor], mask: WeightDecayMask | None
) -> tuple[ParamSpec, ...]:
    """The parameters, with ``decays`` as ``weight_decay_mask`` says.

    Raises:
        ValueError: If there are more or fewer flags than parameters, or one is not True or False.
    """
    if mask is None:
        return tuple(specs)
    if callable(mask):
        flags = [mask(spec.name, param) for spec, param in zip(specs, params, strict=True)]
    else:
        flags = list(mask)
    if len(flags) != len(specs):
        raise ValueError(
            f"weight_decay_mask: expected one flag for each of the {len(specs)} parameters, got {len(flags)}"
        )
    for index, flag in enumerate(flags):
        if not isinstance(flag, bool):
            raise ValueError(
                f"weight_decay_mask: expected True or False for parameter {index} ('{specs[index].name}'), got {flag!r}"
            )
    return tuple(dataclasses.replace(spec, decays=flag) for spec, flag in zip(specs, flags, strict=True))


def written_scalars(
    rule: Rule, groups: Sequence[Mapping[str, Any]], shown: Mapping[str, float]
) -> dict[str, float] | None:
    """Scalars that a person wrote into a group since :func:`show_scalars`, under their flat names.

    Where the groups share one, the first group with a change counts.

    Raises:
        HyperparameterError: If one is not a finite number, or out of range.
    """
    written: dict[str, float] = {}
    for index, group in enumerate(groups):
        for name in rule.plain_scalars:
            key = rule.scalar_key(name, index)
            if key not in written and group.get(name, shown[key]) != shown[key]:
                written[key] = read_scalar(name, group[name])
    try:
        rule.check_scalars(written, len(groups))
    except ValueError as error:
        raise HyperparameterError(str(error)) from None
    return written or None


def read_scalar(name: str, value: Any) -> float:
    """A scalar that stands in a group; an int stays one.

    Raises:
        HyperparameterError: If it is not a finite number.
    """
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(number, (int, float)) or not math.isfinite(number):
        raise HyperparameterError(f"{name}: expected a finite number, got {number!r}")
    return number


def show_scalars(groups: Sequence[Group], scalars: Mapping[str, float]) -> None:
    """Write the rule's scalars into every group, each its own, where code that logs them looks."""
    for index, group in enumerate(groups):
        group.update(scalars_of_group(scalars, index))


def pack_groups(groups: Sequence[Mapping[str, Any]]) -> list[Group]:
    """The groups as a state dict holds them, with parameter indices for parameters."""
    packed, start = [], 0
    for group in groups:
        stop = start + len(group["params"])
        packed.append(
            {**{key: value for key, value in group.items() if key != "params"}, "params": list(range(start, stop))}
        )
        start = stop
    return packed


def unpack_groups(
    saved: Sequence[Mapping[str, Any]], groups: Sequence[Group], defaults: Mapping[str, Any]
) -> list[Group]:
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
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group "
                f"{index}: expected {len(group['params'])}, got {len(old['params'])}"
            )
        names = {"param_names": group["param_names"]} if "param_names" in group else {}
        kept = {key: copy.deepcopy(value) for key, value in old.items() if key not in ("params", "param_names")}
        # torch.distributed.checkpoint, and formats that know no tuples, make lists of them.
        for key, value in kept.items():
            if isinstance(value, list) and isinstance(defaults.get(key), tuple):
                kept[key] = tuple(value)
        unpacked.append({**defaults, **kept, **names, "params": group["params"]})
    return unpacked


def _bare_name(name: str) -> str:
    """A parameter's name without what DDP and torch.compile put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, Tensor) else value


def _dtype_of(param: Tensor, name: str) -> str:
    if param.dtype not in GRADIENT_DTYPES or param.is_sparse or param.is_quantized:
        raise UnsupportedParameterError(
            f"parameter '{name}' {list(param.shape)}: expected a dense floating-point parameter, got {param.dtype}, "
            f"{param.layout}; leave it out of the optimizer"
        )
    return dtype_name(param.dtype)
