"""An optimizer's tie to its worker: how it is kept, copied and let go."""

from __future__ import annotations

import atexit
import weakref
from typing import Any

import torch

from .copies import revive, take_snapshot
from .groups import show_scalars
from .inprocess import InProcessService
from .model_buffers import GatherOptions
from .worker import Worker

_COPIED = (
    "rule",
    "gradients",
    "max_grad_norm",
    "max_grad_value",
    "_on_nonfinite",
    "_gathering",
    "_world_size",
    "_reference_uri",
    "_detached_from",
)
"""What copies carry beside torch's own attributes."""


class AttachedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose work a worker does. See *Note: Copies of an optimizer* in docs/design.md."""

    _worker: Worker | None = None
    _detached_from: str | None = None
    _gathering: GatherOptions

    def close(self) -> None:
        """Part from the service; an elastic one goes on with the other ranks.

        An in-process or embedded service ends with it, once the other ranks have parted.
        """
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle carries: of an in-process optimizer all; of any other all but its place in the job.

        Hooks stay behind, as torch's do.
        """
        state: dict[str, Any] = super().__getstate__()
        state.update({name: getattr(self, name) for name in _COPIED})
        if self._worker is None:
            return state
        worker = self._settled()
        state["_mask"] = [spec.decays for spec in worker.spec.params]  # a callable may have no pickle
        service = worker.transport.service
        if isinstance(service, InProcessService):
            return {**state, "snapshot": take_snapshot(worker, service)}
        return {**state, "_detached_from": service.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy, or what was pickled: an optimizer of its own if the original was in-process, else detached."""
        state = dict(state)
        snapshot = state.pop("snapshot", None)
        defaults = dict(state["defaults"])
        super().__setstate__(state)
        self.defaults = defaults  # torch adds a key of its own
        if snapshot is not None:
            params = [param for group in self.param_groups for param in group["params"]]
            self._attach(revive(snapshot, params, self._gathering))

    def _attach(self, worker: Worker) -> None:
        self._worker = worker
        atexit.register(_close_at_exit, weakref.ref(self))

    @property
    def _registered(self) -> Worker:
        if self._worker is not None:
            return self._worker
        if self._detached_from is not None:
            raise RuntimeError(
                f"this is a copy of an optimizer of service {self._detached_from!r}, and has no place in its job: use "
                "the original, or make an optimizer with the constructor and give it the original's state_dict()"
            )
        raise RuntimeError("this optimizer is closed; make one with the constructor")

    def _settled(self) -> Worker:
        """The worker, once it is known what became of its last step."""
        worker = self._registered
        if worker.settle():
            show_scalars(self.param_groups, worker.scalars)
        return worker


def _close_at_exit(reference: weakref.ref[AttachedOptimizer]) -> None:
    optimizer = reference()
    if optimizer is not None:
        optimizer.close()
