"""One training process's part in a job: its numbers, its buffers, and how it recovers from a step that failed."""

from __future__ import annotations

import dataclasses
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..server.messages import LoadHeader, Registration, unpack_job
from ..sharding.buffers import MASTER
from ..sharding.errors import AttemptError, StepAbortedError, StepwellError, UnsupportedParameterError
from ..sharding.job import JobSpec
from ..sharding.push import PushHeader, pack_present
from ..sharding.shard import StepResult
from ..sharding.vote import Decision
from .flat import FlatBuffer, copy_all
from .state_dict import to_param_state
from .transport import Transport, Values

logger = logging.getLogger("stepwell")


class Worker:
    """A registered worker. Making one registers it, on every rank, and takes the service's parameters over.

    Args:
        transport: The line to the shards.
        spec: The job.
        params: The model's parameters, in index order.
        rank: This worker's rank.

    Attributes:
        scalars: The rule's scalars after the last step.
        num_steps: Steps that the service has taken, skipped ones included.
    """

    def __init__(self, transport: Transport, spec: JobSpec, params: Sequence[Tensor], rank: int) -> None:
        self.transport, self.rank = transport, rank
        self._params = list(params)
        self._incarnation = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._attempt = 0
        self._is_open = False
        device = _common_device(params)
        registration = transport.register(spec, rank, self._incarnation)
        self.spec = unpack_job(registration.spec)
        self.layout = self.spec.layout()
        transport.attach(self.layout)
        self._gradient = FlatBuffer(self.layout, device)
        self._flat_params = FlatBuffer(self.layout, device)
        self._adopt(registration)
        if registration.needs_parameters:
            self._adopt(self._hand_out_parameters())
        elif registration.step:
            logger.info("rank %d joined service %r at step %d", rank, transport.service.name, registration.step)
        self.take_parameters()

    def step(self, hyper: Mapping[str, Sequence[float]] | None, scalars: Mapping[str, float] | None) -> StepResult:
        """Push the gradients, wait for the step and take the parameters over.

        After a failure the next call first asks whether the failed step was taken after all: if so it takes its result
        over and goes on with the step after it; else it pushes under a new attempt.

        Args:
            hyper: Rank 0: hyperparameter name to one value per group. Other ranks: None.
            scalars: Rank 0: scalars that a person wrote. Other ranks: None.

        Returns:
            The result, COMMIT or SKIP.
        """
        self.settle()
        header = PushHeader(
            timeline=self.timeline,
            sequence=self.sequence + 1,
            rank=self.rank,
            incarnation=self._incarnation,
            attempt=self._attempt,
            present=self._gather_gradients(),
            hyper=hyper,
            scalars=scalars,
        )
        reloaded = self._changed_by_hand() if self.rank == 0 else {}
        self._is_open = True
        self._attempt += 1
        try:
            result = self.transport.step(header, self._gradient, reloaded, self._flat_params)
        except StepAbortedError:
            self._is_open = False
            raise
        except AttemptError:
            # The step was taken with a push of ours that had seemed to fail. This gradient is the next step's.
            sequence = self.sequence
            self.settle()
            if self.sequence == sequence:
                raise
            return self.step(hyper, scalars)
        if result.decision is Decision.COMMIT:
            self._write_parameters()
        self._close_step(result)
        return result

    def settle(self) -> bool:
        """Find out what became of a step that failed under way, if the last one did.

        Returns:
            Whether it had been committed; this worker has then taken its result over, parameters included.
        """
        if not self._is_open:
            return False
        result = self.transport.decided(self.timeline, self.sequence + 1)
        if result is None or result.decision is Decision.ABORT:
            self._is_open = False
            return False
        logger.warning("step %d had been decided although it failed here; going on after it", result.sequence)
        if result.decision is Decision.COMMIT:
            self.take_parameters()
        self._close_step(result)
        return result.decision is Decision.COMMIT

    def load(self, values: Values, header: LoadHeader) -> None:
        """Load a state into the service; called on every rank, the values of rank 0 count."""
        if self.rank == 0:
            self._adopt(self.transport.load(values, header))
        else:
            self._adopt(self._next_timeline())

    def refresh(self) -> None:
        """Take over the service's parameters, scalars and step number."""
        self._adopt(self.transport.refresh())
        self.take_parameters()

    def read_state(self) -> dict[int, dict[str, Any]]:
        """The state in torch's form, of the parameters that had a step."""
        values, status = self.transport.read_state()
        return {
            index: to_param_state(self.spec, index, values, count)
            for index, count in enumerate(status.step_counts)
            if count
        }

    def take_parameters(self) -> None:
        """Take over the service's parameters."""
        self.transport.read_parameters(self._flat_params)
        self._write_parameters()

    def mark_changed(self) -> None:
        """Send all parameters with the next step, as changed by hand."""
        self._versions = [-1] * len(self._params)

    def _adopt(self, registration: Registration) -> None:
        self.timeline, self.sequence = registration.timeline, registration.sequence
        self.scalars, self.num_steps = registration.scalars, registration.step
        # Attempts go on counting: an inbox may still hold a push of this step, and takes the next try for its repeat.
        self._is_open = False

    def _hand_out_parameters(self) -> Registration:
        if self.rank != 0:
            return self._next_timeline()
        values = {(index, MASTER.name): _flat(param) for index, param in enumerate(self._params)}
        return self.transport.load(values, LoadHeader())

    def _next_timeline(self) -> Registration:
        """Wait for the load of rank 0 that belongs to this rank's; rank 0 may have loaded again by now."""
        registration = self.transport.wait_until_loaded(self.timeline)
        return dataclasses.replace(registration, timeline=self.timeline + 1)

    def _close_step(self, result: StepResult) -> None:
        # Comes after the parameters were written: interrupted in between, those changed by hand would be sent again.
        self.sequence, self.scalars = result.sequence, result.scalars
        self.num_steps += 1
        self._attempt, self._is_open = 0, False

    def _gather_gradients(self) -> bytes:
        """Copy every gradient to its place in the flat buffer; which parameters have one."""
        present = [param.grad is not None for param in self._params]
        targets, sources = [], []
        for view, param in zip(self._gradient.views, self._params, strict=True):
            if param.grad is not None:
                targets.append(view)
                sources.append(_dense(param.grad))
        copy_all(targets, sources)
        return pack_present(present)

    def _changed_by_hand(self) -> dict[int, Tensor]:
        """Parameters that something else than this class has written since it last did."""
        return {
            index: _flat(param)
            for index, (param, version) in enumerate(zip(self._params, self._versions, strict=True))
            if param._version != version
        }

    def _write_parameters(self) -> None:
        with torch.no_grad():
            copy_all(self._params, self._flat_params.views)
        self._versions = [param._version for param in self._params]


def _flat(param: Tensor) -> Tensor:
    return param.detach().reshape(-1).clone()


def _dense(grad: Tensor) -> Tensor:
    if grad.layout is not torch.strided:
        raise UnsupportedParameterError(f"expected a dense gradient, got one of layout {grad.layout}; use sparse=False")
    return grad.detach()


def _common_device(params: Sequence[Tensor]) -> torch.device:
    devices = {param.device for param in params}
    if len(devices) > 1:
        raise StepwellError(f"expected all parameters on one device, got {sorted(map(str, devices))}")
    return devices.pop() if devices else torch.device("cpu")
