"""Keywords of the named optimizers: what makes a rule, what torch takes beside it, and what every optimizer takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, TypedDict, TypeVar

import torch
from torch import Tensor

from ..optim import Rule
from ..sharding.compiling import KernelChoice
from ..sharding.coverage import Gradients
from .groups import WeightDecayMask
from .inprocess import InProcessService

if TYPE_CHECKING:
    from ..server.service import Service

R = TypeVar("R", bound=Rule)

_REFUSED = ("capturable", "differentiable")


class ServiceOptions(TypedDict, total=False):
    """Keywords of every optimizer, beside those of its rule; see :class:`stepwell.ServiceOptimizer`."""

    service: str | Service | InProcessService | None
    rank: int | None
    world_size: int | None
    num_shards: int | None
    kernel: KernelChoice | None
    gradients: Gradients | None
    on_nonfinite: Literal["skip", "raise"]
    max_grad_norm: float | None
    max_grad_value: float | None
    weight_decay_mask: WeightDecayMask | None
    state_dict_form: Literal["torch", "reference"]
    checkpoint_uri: str | None
    overlap: bool
    gradient_dtype: torch.dtype | None


def make_rule(rule: Callable[..., R], **fields: object) -> R:
    """A rule whose fields may be given as 0-dim tensors.

    The groups keep the tensors, as torch's do, and every step reads their values.

    Raises:
        ValueError: If a value is out of range.
    """
    betas = fields.get("betas")
    if isinstance(betas, (tuple, list)):
        fields["betas"] = tuple(
            beta.squeeze() if isinstance(beta, Tensor) and beta.numel() == 1 else beta for beta in betas
        )
    return rule(**fields)


def torch_keywords(**keywords: object) -> Mapping[str, object]:
    """Torch's keywords that say how a step is computed, which mean nothing here, for the groups to show.

    Raises:
        ValueError: If one asks for what a service cannot do.
        RuntimeError: If two exclude each other, as for torch.
    """
    for name in _REFUSED:
        if keywords.get(name, False) is not False:
            raise ValueError(
                f"{name}: expected False, got {keywords[name]}; a step leaves this process and its CUDA graphs"
            )
    if keywords.get("fused") and keywords.get("foreach"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together: leave one of them out")
    return keywords
