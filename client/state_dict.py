"""Between the service's slots and torch's index-keyed state dicts, in the reference optimizer's own form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..optim import Rule, Scope, split_scalar
from ..server.messages import LoadHeader
from ..sharding.buffers import MASTER
from ..sharding.errors import CheckpointError, JobMismatchError
from ..sharding.folder import step_uri
from ..sharding.job import JobSpec
from ..sharding.keys import Keys
from ..sharding.layout import ParamSpec, dtype_from_name
from ..sharding.saved import manifest_digest
from .groups import read_scalar
from .holdings import whole_value
from .transport import Values
from .worker import Worker


def reference_uri(state_dict_form: str, checkpoint_uri: str | None) -> str | None:
    """Where state dicts of the form "reference" save to; None for torch's form.

    Raises:
        ValueError: If the form is neither, or the two do not fit.
    """
    if state_dict_form not in ("torch", "reference"):
        raise ValueError(f"state_dict_form: expected 'torch' or 'reference', got {state_dict_form!r}")
    if state_dict_form == "torch":
        return None
    if not checkpoint_uri:
        raise ValueError(
            f"checkpoint_uri: expected where to save to, with state_dict_form='reference', got {checkpoint_uri!r}"
        )
    return checkpoint_uri


def read_states(worker: Worker) -> dict[int, dict[str, Any]]:
    """Every parameter's state; one that never had a gradient has none, if any other had one.

    Before the first step all have their initial state: torch.distributed.checkpoint cannot load a full state dict into
    an optimizer that shows none.
    """
    values, status = worker.read_state()
    is_fresh = not any(status.step_counts)
    return {
        index: to_param_state(worker.spec, index, values, count)
        for index, count in enumerate(status.step_counts)
        if count or is_fresh
    }


def state_names(spec: JobSpec, index: int) -> list[str]:
    """The names in one parameter's state."""
    param = spec.params[index]
    master = [MASTER.name] if dtype_from_name(param.dtype) != param.state_dtype else []
    return ["step", *(slot.name for slot in spec.rule.slots), *(slot.name for slot in spec.rule.key_slots), *master]


_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def to_param_state(spec: JobSpec, index: int, values: Values, step_count: int) -> dict[str, Any]:
    """One parameter's state, as the reference optimizer would hold it.

    A model dtype below the state's loses bits in the parameter itself, so the full one is added as ``master_param``.
    """
    param = spec.params[index]
    step: Any = torch.tensor(float(step_count), device="cpu") if spec.rule.step_is_tensor else step_count
    state: dict[str, Any] = {"step": step}
    for slot in spec.rule.slots:
        values_of_slot = values.get(
            (index, slot.name), torch.zeros(0, dtype=slot.dtype(param.state_dtype), device="cpu")
        )
        state[slot.name] = values_of_slot if slot.flat else values_of_slot.view(param.shape)
    for key_slot in spec.rule.key_slots:
        held = values.get((index, key_slot.name), torch.zeros(0, dtype=torch.float64, device="cpu")).to(
            _DTYPES[key_slot.shown_in]
        )
        state[key_slot.name] = held.view(()) if key_slot.scope is Scope.TENSOR else held
    if dtype_from_name(param.dtype) != param.state_dtype:
        state[MASTER.name] = values.get((index, MASTER.name), torch.zeros(0, device="cpu")).view(param.shape)
    return state


def from_states(
    spec: JobSpec, groups: Sequence[Mapping[str, Any]], states: Mapping[Any, Mapping[str, Any]]
) -> tuple[dict[tuple[int, str], Tensor], dict[int, int]]:
    """Slots and step counts of a state dict's ``state``.

    Args:
        spec: The job.
        groups: The state dict's groups; as for torch, their ``params`` are the keys of ``states`` in index order:
            indices, or names where torch.distributed.checkpoint was at work.
        states: The state dict's ``state``.

    Raises:
        JobMismatchError: If a slot is missing, unknown or of another length; the message names parameter and slot.
    """
    values: dict[tuple[int, str], Tensor] = {}
    step_counts: dict[int, int] = {}
    keys = spec.keys()
    index_of = {key: index for index, key in enumerate(key for group in groups for key in group["params"])}
    for key, given in states.items():
        if key not in index_of:
            raise JobMismatchError(f"state dict: expected states of its groups' parameters only, got one of {key!r}")
        index = index_of[key]
        # Flattened and unflattened by torch.distributed.checkpoint, what was not there has become an empty dict; older
        # versions of torch.optim.SGD wrote None for a buffer that they had not.
        state = {
            name: value
            for name, value in given.items()
            if value is not None and not (isinstance(value, dict) and not value)
        }
        if given and not state:
            continue
        # torch.optim.SGD counts no steps; that it has a state means that it took one.
        step_counts[index] = int(state["step"]) if "step" in state else 1
        known = _known_slots(spec, keys, index)
        for name, value in state.items():
            if name == "step":
                continue
            if name not in known:
                raise JobMismatchError(
                    _describe(spec, index)
                    + f"has {name!r}, which {spec.rule.name} here does not keep; it keeps {', '.join(known)}"
                )
            values[index, name] = _slot_values(spec, index, name, value, *known[name])
        for name in known:
            if name not in state and name != MASTER.name:
                raise JobMismatchError(_describe(spec, index) + f"lacks {name!r}; it is not of {_rule_text(spec.rule)}")
    return values, step_counts


def load_header(
    spec: JobSpec, step_counts: Mapping[int, int], groups: list[dict[str, Any]], sequence: int
) -> LoadHeader:
    """The counters and scalars that a state dict holds; scalars that groups share are read from the first one."""
    scalars = {}
    for key in spec.rule.initial_scalars(spec.num_groups):
        name, owner = split_scalar(key)
        group = groups[owner or 0] if groups else {}
        if name in group:
            scalars[key] = read_scalar(name, group[name])
    step = max(step_counts.values(), default=0)
    return LoadHeader(step_counts=dict(step_counts), scalars=scalars, sequence=sequence, step=step)


def save_reference(worker: Worker, checkpoint_uri: str) -> dict[str, Any]:
    """Save through the service to the run folder ``checkpoint_uri``; what a state dict holds in place of the state.

    Every rank may call it between the same two steps: the service writes once.
    """
    uri = step_uri(checkpoint_uri, worker.num_steps)
    step = worker.transport.service.save(uri)
    return {"uri": uri, "step": step, "digest": manifest_digest(uri)}


def require_state(states: Mapping[Any, Mapping[str, Any]]) -> None:
    """See that a state dict that has lost its reference on the way is not taken for that of a fresh optimizer.

    Raises:
        ValueError: If no parameter has a state.
    """
    if not any(isinstance(value, Tensor) for state in states.values() for value in state.values()):
        raise ValueError(
            "state dict: expected 'stepwell' or a state, got neither. With state_dict_form='reference' save what "
            "optimizer.state_dict() returns: torch.distributed.checkpoint.state_dict's functions drop the reference"
        )


def read_reference(reference: object) -> tuple[str, str]:
    """URI and digest of what :func:`save_reference` gave.

    Raises:
        CheckpointError: If it is something else.
    """
    if isinstance(reference, Mapping):
        uri, digest = reference.get("uri"), reference.get("digest")
        if isinstance(uri, str) and isinstance(digest, str):
            return uri, digest
    raise CheckpointError(
        f"state dict: expected 'stepwell' to hold a checkpoint's uri, step and digest, got {reference!r}; "
        "use it as state_dict() returned it"
    )


def _known_slots(spec: JobSpec, keys: Keys, index: int) -> dict[str, tuple[int, torch.dtype]]:
    """Length and dtype of each slot and key slot that a parameter has."""
    param = spec.params[index]
    slots = {
        slot.name: (-(-param.numel // slot.stride), slot.dtype(param.state_dtype))
        for slot in (*spec.rule.slots, MASTER)
    }
    return slots | {slot.name: (keys.count(slot.scope, index), torch.float64) for slot in spec.rule.key_slots}


def _slot_values(spec: JobSpec, index: int, name: str, value: object, expected: int, dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor):
        raise JobMismatchError(_describe(spec, index) + f"has {name} of type {type(value).__name__}; expected a tensor")
    if value.dim() == 0 and expected != 1:
        value = value.expand(expected)
    if value.numel() != expected:
        raise JobMismatchError(
            _describe(spec, index) + f"has {name} with {value.numel()} elements; expected {expected}"
        )
    return whole_value(value.detach()).reshape(-1).to(dtype)


def _describe(spec: JobSpec, index: int) -> str:
    param: ParamSpec = spec.params[index]
    return f"state dict: the state of parameter {index} ('{param.name}' {list(param.shape)}) "


def _rule_text(rule: Rule) -> str:
    names = [*(slot.name for slot in rule.slots), *(slot.name for slot in rule.key_slots)]
    return f"{rule.name} with {', '.join(names)}"
