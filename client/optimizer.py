"""The optimizer that a training script holds."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch.optim.optimizer import ParamsT

from ..optim import Rule
from ..sharding.errors import NonFiniteGradientError
from ..sharding.job import JobSpec
from ..sharding.vote import Decision
from .groups import pack_groups, param_specs, plain_rule, read_hyper, show_scalars, unpack_groups, written_scalars
from .inprocess import InProcessService
from .resolve import resolve_ranks, resolve_service
from .state_dict import from_states, load_header
from .transport import ServiceHandle
from .worker import Worker, logger

if TYPE_CHECKING:
    from ..server.service import Service


class ServiceOptions(TypedDict, total=False):
    """Keywords of every optimizer that say where its state lives; see :class:`ServiceOptimizer`."""

    service: str | Service | InProcessService | None
    rank: int | None
    world_size: int | None
    num_shards: int | None
    on_nonfinite: Literal["skip", "raise"]


class ServiceOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` whose state and master parameters live in a Stepwell service.

    Every rank makes one, with the same model, and calls ``step()`` at the same times; gradients are each rank's own,
    and the service averages them over the ranks that have one. Rank 0's initial parameters go to all ranks, unless the
    service holds this job's parameters already: then those do. Rank 0's ``param_groups`` count.

    Args:
        params: Parameters, named parameters, or groups of either.
        rule: The update rule with its default hyperparameters, such as ``stepwell.optim.ProdigyRule()``.
        service: A service's name or handle; ``"inprocess"`` for shards in this process (one worker only);
            ``"embedded"`` for shards in a Ray of rank 0's own. None takes ``$STEPWELL_SERVICE``, else ``"inprocess"``
            for one worker and ``"embedded"`` for several.
        rank, world_size: This worker and how many there are; None takes torch.distributed's if it is initialised.
        num_shards: Shards of an in-process (default 1) or embedded service (default one per worker).
        on_nonfinite: What a step does whose averaged gradient holds inf or NaN: it is skipped on all shards, and
            ``"raise"`` tells the caller so.

    Raises:
        HyperparameterError: If a group's value is out of range, or differs where the job has one for all.
        UnsupportedParameterError: If a parameter is sparse, complex, quantized or integer.
        ServiceError: If the service cannot be reached or started.
        JobMismatchError: If the service runs another job.
    """

    _worker: Worker | None = None

    def __init__(
        self,
        params: ParamsT,
        rule: Rule,
        *,
        service: str | Service | InProcessService | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        num_shards: int | None = None,
        on_nonfinite: Literal["skip", "raise"] = "skip",
    ) -> None:
        if on_nonfinite not in ("skip", "raise"):
            raise ValueError(f"on_nonfinite: expected 'skip' or 'raise', got {on_nonfinite!r}")
        super().__init__(params, rule.defaults())
        self.rule, self._on_nonfinite = plain_rule(rule), on_nonfinite
        read_hyper(self.rule, self.param_groups)
        rank, world_size = resolve_ranks(rank, world_size)
        flat_params = [param for group in self.param_groups for param in group["params"]]
        spec = JobSpec(self.rule, tuple(param_specs(self.param_groups)), len(self.param_groups), world_size)
        device = flat_params[0].device if flat_params else torch.device("cpu")
        transport = resolve_service(service, rank=rank, world_size=world_size, num_shards=num_shards, device=device)
        self._world_size = world_size
        self._worker = Worker(transport, spec, flat_params, rank)
        show_scalars(self.param_groups, self._worker.scalars)
        # Code that finds an empty state takes a step of its own to fill it.
        for param in flat_params:
            self.state[param]["service"] = transport.service.name
        atexit.register(_close_at_exit, weakref.ref(self))

    @property
    def service(self) -> ServiceHandle:
        """The service: ``status()``, ``save(uri)``, ``restore(uri)``, ``shutdown()``."""
        return self._registered.transport.service

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Push this rank's gradients, wait until the step is taken, take the new parameters over. Called on every rank.

        A rank's parameters without a gradient are left out of the average; without a gradient on any rank they stand
        still. Parameters that were changed in place since the last step (on rank 0) replace the service's.

        Args:
            closure: Computes the loss and the gradients again.

        Returns:
            The closure's loss.

        Raises:
            StepAbortedError: If the step was given up on all shards; nothing has changed.
            NonFiniteGradientError: With ``on_nonfinite="raise"``, if it was skipped.
            ServiceError: If the service did not answer. The next call finds out what became of the step.
        """
        worker = self._settled()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        hyper = read_hyper(self.rule, self.param_groups)
        written = written_scalars(self.rule, self.param_groups, worker.scalars)
        result = worker.step(hyper, written) if worker.rank == 0 else worker.step(None, None)
        if result.decision is Decision.COMMIT:
            show_scalars(self.param_groups, worker.scalars)
        else:
            message = f"step {result.sequence} was skipped on all shards: the averaged gradient holds inf or NaN"
            if self._on_nonfinite == "raise":
                raise NonFiniteGradientError(message)
            logger.warning(message)
        return loss

    def refresh(self) -> None:
        """Take over the service's parameters, scalars and step number, after ``service.restore``.

        Called on every rank.
        """
        self._registered.refresh()
        show_scalars(self.param_groups, self._registered.scalars)

    def reload_parameters(self) -> None:
        """Let the next step take the model's parameters over, after a change through ``.data``. Called on rank 0.

        Changes in place (``copy_``, ``load_state_dict``, ``clamp_``) are noticed without this.
        """
        self._registered.mark_changed()

    def close(self) -> None:
        """Part from the service. An in-process or embedded service ends with it, once the other ranks have parted."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.transport.close(worker.rank, self._world_size)

    def state_dict(self) -> dict[str, Any]:
        """The state in torch's form, keyed by parameter index, as the reference optimizer would give it.

        Any rank may call it, between steps; it reads the whole state from the service. A parameter that never had a
        gradient has no entry.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        worker = self._settled()
        # Trainers ask for it as soon as they are given an optimizer: then there is nothing to read yet.
        state = worker.read_state() if worker.transport.refresh().step else {}
        state_dict: dict[str, Any] = {"state": state, "param_groups": pack_groups(self.param_groups)}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            hooked = post_hook(self, state_dict)
            state_dict = state_dict if hooked is None else hooked
        return state_dict

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state dict of this class or of the reference optimizer. Called on every rank; rank 0's state counts.

        Raises:
            ValueError: If the number or sizes of the groups differ, as torch.
            JobMismatchError: If a slot is missing, unknown or of another length. Nothing has changed.
        """
        loaded = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            hooked = pre_hook(self, loaded)
            loaded = loaded if hooked is None else hooked
        worker = self._registered
        groups = unpack_groups(loaded["param_groups"], self.param_groups, self.defaults)
        read_hyper(self.rule, groups)
        values, step_counts = from_states(worker.spec, loaded["param_groups"], loaded["state"])
        header = load_header(worker.spec, step_counts, groups, worker.sequence)
        worker.load(values, header)
        self.param_groups = groups
        show_scalars(groups, worker.scalars)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, before the optimizer is registered; torch's constructor calls it."""
        if self._worker is not None:
            raise NotImplementedError(
                "add_param_group after the optimizer was made is not supported yet: pass all groups to the "
                "constructor, those to be trained later with lr=0 or requires_grad=False"
            )
        super().add_param_group(param_group)

    @property
    def _registered(self) -> Worker:
        if self._worker is None:
            raise RuntimeError("this optimizer is closed, or a copy of another; make one with the constructor")
        return self._worker

    def _settled(self) -> Worker:
        """The worker, once it is known what became of its last step."""
        worker = self._registered
        if worker.settle():
            show_scalars(self.param_groups, worker.scalars)
        return worker


def _close_at_exit(reference: weakref.ref[ServiceOptimizer]) -> None:
    optimizer = reference()
    if optimizer is not None:
        optimizer.close()
