"""Stepwell: a distributed optimizer service, whose state is sharded and whose results are exact.

``stepwell.Prodigy(model.parameters())`` is where most begin; docs/design.md says how it works.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import optim
from .client.grad_scaler import GradScaler
from .client.inprocess import InProcessService
from .client.optimizer import ServiceOptimizer
from .client.optimizers import (
    LAMB,
    SGD,
    UM,
    Adam,
    AdamAWD,
    AdamGCC,
    AdamW,
    BAdam,
    DuvAdam,
    Momentum,
    NAdam,
    PreLAMB,
    Prodigy,
    RAdam,
    RMSprop,
    SAdam,
    SRAdam,
    StableAdam,
    SUAdam,
)
from .sharding.errors import StepwellError
from .sharding.folder import Checkpoint
from .sharding.pending_save import PendingSave

if TYPE_CHECKING:
    from .server.service import Service, connect, launch

__version__ = "0.1.0"

_NEED_RAY = ("Service", "connect", "launch")


def __getattr__(name: str) -> Any:
    """Import what needs Ray when it is first asked for."""
    if name in _NEED_RAY:
        from .server import service

        return getattr(service, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "LAMB",
    "SGD",
    "UM",
    "Adam",
    "AdamAWD",
    "AdamGCC",
    "AdamW",
    "BAdam",
    "Checkpoint",
    "DuvAdam",
    "GradScaler",
    "InProcessService",
    "Momentum",
    "NAdam",
    "PendingSave",
    "PreLAMB",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "SAdam",
    "SRAdam",
    "SUAdam",
    "Service",
    "ServiceOptimizer",
    "StableAdam",
    "StepwellError",
    "connect",
    "launch",
    "optim",
]
