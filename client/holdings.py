"""What a training process holds of the model: whole parameters, or its part of DTensor parameters, as FSDP2 makes them.

Understood are parameters sharded along dimension 0 and replicated, over any mesh: plain FSDP2, HSDP, uneven dimensions.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

from ..sharding.coverage import GRADIENTS, Gradients, Holdings, Range
from ..sharding.errors import UnsupportedParameterError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

logger = logging.getLogger("stepwell")


@dataclasses.dataclass(frozen=True, slots=True)
class Holding:
    """This rank's part of one parameter.

    Attributes:
        held: The elements that it has.
        pushed: Those of them that it pushes, where other ranks have the same.
    """

    held: Range
    pushed: Range


def is_distributed(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor. None can be before their module was imported, which takes half a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, the whole of a plain one; shares its memory."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def version_of(param: Tensor) -> int:
    """Rises with every change in place, of a DTensor or of its local part."""
    return param._version + local_part(param)._version if is_distributed(param) else param._version


def whole_value(tensor: Tensor) -> Tensor:
    """All of a tensor. For a DTensor all ranks call it together."""
    whole: Tensor = tensor.full_tensor() if is_distributed(tensor) else tensor
    return whole


def resolve_gradients(wanted: Gradients | None, named: Sequence[tuple[str, Tensor]], world_size: int) -> Gradients:
    """What this job's gradients mean: as asked for, else as the parameters tell.

    Args:
        wanted: ``"local"``, ``"replicated"``, ``"sharded"``, or None.
        named: Names and parameters; a name may be empty.
        world_size: Workers.

    Raises:
        ValueError: If ``wanted`` is none of these.
        UnsupportedParameterError: If some parameters are DTensors and others are not, or that does not fit ``wanted``.
    """
    if wanted is not None and wanted not in GRADIENTS:
        raise ValueError(f"gradients: expected one of {', '.join(GRADIENTS)} or None, got {wanted!r}")
    if world_size == 1:
        return "local"
    plain = [name for name, param in named if not is_distributed(param)]
    if len(plain) == len(named):
        if wanted == "sharded":
            raise UnsupportedParameterError(
                "gradients='sharded': expected DTensor parameters, as fully_shard makes them, got plain tensors; shard "
                "the model before the optimizer is made, or leave gradients out"
            )
        is_ddp = bool(named) and all(name.startswith("module.") for name, _ in named)
        found: Gradients = wanted or ("replicated" if is_ddp else "local")
    elif plain or wanted in ("local", "replicated"):
        got = (
            f"'{plain[0]}' is a plain tensor and others are DTensors"
            if plain
            else f"DTensors with gradients={wanted!r}"
        )
        raise UnsupportedParameterError(
            f"expected all parameters sharded (gradients='sharded') or none, got: {got}; wrap the whole model with "
            "fully_shard, and give the optimizer what is sharded"
        )
    else:
        found = "sharded"
    _say(found, asked_for=wanted is not None)
    return found


def holding_of(param: Tensor, name: str) -> Holding:
    """This rank's part of a parameter.

    Raises:
        UnsupportedParameterError: If it is placed otherwise than sharded along dimension 0 or replicated.
    """
    if not is_distributed(param):
        whole = Range(0, param.numel())
        return Holding(whole, whole)
    from torch.distributed.tensor import Replicate, Shard

    coordinates = param.device_mesh.get_coordinate()
    if coordinates is None:
        raise UnsupportedParameterError(
            f"parameter '{name}' {list(param.shape)}: expected a mesh of all ranks, got {param.device_mesh} without "
            "this one; make an optimizer, with a service of its own, for each part of the model"
        )
    first, last, num_replicas, replica = 0, param.shape[0] if param.dim() else 1, 1, 0
    for dim, (placement, coordinate) in enumerate(zip(param.placements, coordinates, strict=True)):
        size = param.device_mesh.size(dim)
        if isinstance(placement, Replicate):
            num_replicas, replica = num_replicas * size, replica * size + coordinate
        elif type(placement) is Shard and placement.dim == 0:
            each = -(-(last - first) // size)
            first, last = (min(first + each * edge, last) for edge in (coordinate, coordinate + 1))
        else:
            raise UnsupportedParameterError(
                f"parameter '{name}' {list(param.shape)}: expected placements Shard(0) and Replicate(), got "
                f"{param.placements}; leave it out of this optimizer"
            )
    row = math.prod(param.shape[1:])
    held = Range(first * row, (last - first) * row)
    edges = [held.numel * edge // num_replicas for edge in (replica, replica + 1)]
    return Holding(held, Range(held.offset + edges[0], edges[1] - edges[0]))


def holdings_of(named: Sequence[tuple[str, Tensor]]) -> Holdings:
    """This rank's part of every parameter."""
    each = [holding_of(param, name) for name, param in named]
    return Holdings(tuple(part.pushed for part in each), tuple(part.held for part in each))


def _say(gradients: Gradients, *, asked_for: bool) -> None:
    meaning = {
        "local": "each rank's own, averaged over ranks by the service; leave DDP's wrapper off, or pass 'replicated'",
        "replicated": "equal on all ranks, as DDP leaves them; each rank pushes a share",
        "sharded": "reduced already, as FSDP leaves them; each rank pushes what it holds",
    }
    logger.info("gradients=%r%s: %s", gradients, "" if asked_for else " (detected)", meaning[gradients])
