"""Checkpoints to and from what torch writes: state dicts of ``torch.save``, and torch.distributed.checkpoint's folders.

The translation is that of :mod:`.state_dict`: an optimizer in this process restores the one and shows the other.
"""

from __future__ import annotations

import dataclasses
import pickle
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..optim import RULES, Rule
from ..sharding.errors import CheckpointError
from ..sharding.files import library_errors_told, locate, write_file
from ..sharding.folder import read_complete
from ..sharding.job import JobSpec
from ..sharding.layout import dtype_from_name
from .distributed_files import read_folder, what_is_wrong, write_folder
from .groups import Group
from .inprocess import InProcessService
from .optimizer import ServiceOptimizer


def export_checkpoint(uri: str, target: str, *, distributed: bool = False, params: str | None = None) -> None:
    """Write a checkpoint as a state dict of the reference optimizer, which may load it. All of it goes through memory.

    A checkpoint holds no hyperparameters of single groups; the groups have those that the optimizer was made with.

    Args:
        uri: The checkpoint.
        target: The file; with ``distributed`` the folder.
        distributed: Whether to write a folder of torch.distributed.checkpoint.
        params: A file for the parameters, by name (or index where none is known), in the model's dtypes. None: none.

    Raises:
        CheckpointError: If the checkpoint is damaged, or a file cannot be written.
    """
    spec = read_complete(uri).spec
    values = [
        nn.Parameter(torch.zeros(param.shape, dtype=dtype_from_name(param.dtype), device="cpu"))
        for param in spec.params
    ]
    with _optimizer(spec.rule, _groups_of(spec, values)) as optimizer:
        optimizer.service.restore(uri)
        optimizer.refresh()
        state_dict = optimizer.state_dict()
    if distributed:
        write_folder(target, state_dict)
    else:
        _save(target, state_dict)
    if params is not None:
        names = [param.name or str(index) for index, param in enumerate(spec.params)]
        _save(params, {name: value.detach().clone() for name, value in zip(names, values, strict=True)})


def import_checkpoint(source: str, uri: str, *, rule: str, params: str) -> int:
    """Write a state dict of a reference optimizer as a checkpoint. All of it goes through memory.

    Args:
        source: A file of ``torch.save``, or a folder of torch.distributed.checkpoint, with the optimizer's state dict.
        uri: The checkpoint.
        rule: The update rule's name.
        params: A file of ``torch.save`` with the optimizer's parameters, in its order, by name; or, if the state dict
            has the parameters' names, with these and whatever else.

    Returns:
        The number of steps in it.

    Raises:
        CheckpointError: If a file cannot be read, is damaged, or holds something else.
        JobMismatchError: If the state is not of this rule.
        ValueError: If there is no such rule, or a hyperparameter is out of range.
    """
    fs, path = locate(source)
    state_dict = read_folder(path) if fs.isdir(path) else _load(source)
    groups = _groups_in(state_dict, source)
    default = RULES.build(rule, {})
    known = {field.name for field in dataclasses.fields(default)}
    made = RULES.build(rule, {name: value for name, value in groups[0].items() if name in known})
    named = iter(_match(groups, _load(params), params))
    given = [
        {
            **{name: value for name, value in group.items() if name in known - made.structural},
            "params": [next(named) for _ in group["params"]],
        }
        for group in groups
    ]
    keys = {str(key): key for group in groups for key in group["params"]}
    state = {keys.get(str(key), key): value for key, value in state_dict["state"].items()}
    with _optimizer(made, given) as optimizer:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        return optimizer.service.save(uri)


@contextmanager
def _optimizer(rule: Rule, groups: list[Group]) -> Iterator[ServiceOptimizer]:
    """An optimizer of this process alone, for the time of a block. It takes no step, so nothing is compiled for it."""
    optimizer = ServiceOptimizer(groups, rule, service=InProcessService(kernel="eager"), rank=0, world_size=1)
    try:
        yield optimizer
    finally:
        optimizer.close()


def _groups_of(spec: JobSpec, values: Sequence[nn.Parameter]) -> list[Group]:
    """The parameter groups of a checkpoint's job, with names where all are known."""
    is_named = all(param.name for param in spec.params)
    given = [(param.name, value) if is_named else value for param, value in zip(spec.params, values, strict=True)]
    groups: list[Group] = [{"params": []} for _ in range(spec.num_groups)]
    for param, entry in zip(spec.params, given, strict=True):
        groups[param.group]["params"].append(entry)
    return groups


def _groups_in(state_dict: Mapping[str, Any], source: str) -> list[Group]:
    """The groups of what should be an optimizer's state dict."""
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if not (isinstance(groups, list) and groups and isinstance(state, dict)):
        raise CheckpointError(
            f"{source}: expected an optimizer's state dict with 'state' and 'param_groups', got {sorted(state_dict)}; "
            "save optimizer.state_dict()"
        )
    for group in groups:
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            raise CheckpointError(f"{source}: expected groups with lists 'params'; save optimizer.state_dict()")
    return groups


def _match(
    groups: Sequence[Mapping[str, Any]], values: Mapping[str, Any], source: str
) -> list[tuple[str, nn.Parameter]]:
    """The parameters of the groups, in their order: by name if the groups have names, else all there are."""
    told = [name for group in groups for name in group.get("param_names", group["params"])]
    names = told if told and isinstance(told[0], str) else list(values)
    missing = [name for name in names if not isinstance(values.get(name), Tensor)]
    expected = sum(len(group["params"]) for group in groups)
    if missing or len(names) != expected:
        got = f"no tensor {missing[0]!r}" if missing else f"{len(names)} tensors"
        raise CheckpointError(
            f"{source}: expected the {expected} parameters of the optimizer, in its order, got {got}; "
            "save dict(model.named_parameters())"
        )
    return [(name, nn.Parameter(values[name].detach())) for name in names]


def _save(target: str, content: Mapping[str, Any]) -> None:
    folder, name = posixpath.split(target)
    try:
        with write_file(folder or ".", name) as stream:
            torch.save(content, stream)
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written ({error}); free or mend that place, or write to another"
        ) from error


def _load(source: str) -> dict[str, Any]:
    """What ``torch.save`` wrote; whatever is not tensors, numbers, texts and containers of these is refused."""
    fs, path = locate(source)
    try:
        with library_errors_told(), fs.open(path, "rb") as stream:
            content = torch.load(stream, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read ({error})") from error
    except (RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{source}: expected a file of torch.save with tensors and numbers alone ({what_is_wrong(error)})"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{source}: expected a dict, got {type(content).__name__}; save a state dict")
    return content
