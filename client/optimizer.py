"""The optimizer that a training script holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.optim.optimizer import ParamsT

from ..optim import Rule
from ..sharding.clipping import ClipLimits
from ..sharding.compiling import KernelChoice
from ..sharding.coverage import Gradients, Holdings
from ..sharding.errors import NonFiniteGradientError
from ..sharding.job import JobSpec
from ..sharding.vote import Decision
from .attached import AttachedOptimizer
from .groups import (
    WeightDecayMask,
    apply_mask,
    pack_groups,
    param_specs,
    plain_rule,
    read_hyper,
    require_distinct,
    show_scalars,
    unpack_groups,
    written_scalars,
)
from .holdings import holdings_of, resolve_gradients
from .inprocess import InProcessService
from .loss_scale import attached_scale
from .model_buffers import GatherOptions
from .resolve import resolve_ranks, resolve_service
from .state_dict import (
    from_states,
    load_header,
    read_reference,
    read_states,
    reference_uri,
    require_state,
    save_reference,
    state_names,
)
from .transport import ServiceHandle
from .worker import Worker, logger

if TYPE_CHECKING:
    from ..server.service import Service


class ServiceOptimizer(AttachedOptimizer):
    """A ``torch.optim.Optimizer`` whose state and master parameters live in a Stepwell service.

    Every rank makes one, with the same model, and calls ``step()`` at the same times. Rank 0's initial parameters go to
    all ranks (of a sharded model each rank's own part), unless the service holds this job's parameters already: then
    those do. Rank 0's ``param_groups`` count.

    Args:
        params: Parameters, named parameters, or groups of either.
        rule: The update rule with its default hyperparameters, such as ``stepwell.optim.ProdigyRule()``.
        service: A service's name or handle; ``"inprocess"`` for shards in this process (one worker only);
            ``"embedded"`` for shards in a Ray of rank 0's own. None takes ``$STEPWELL_SERVICE``, else ``"inprocess"``
            for one worker and ``"embedded"`` for several.
        rank: This worker's; None takes torch.distributed's if that is initialised. A worker with a new rank joins the
            job of an elastic service at the next step, see :func:`stepwell.launch`.
        world_size: How many workers there are; None as for ``rank``.
        num_shards: Shards of an in-process (default 1) or embedded service (default one per worker).
        kernel: How kernels of an in-process or embedded service run: ``"compiled"``, ``"eager"`` or ``"auto"``, see
            :func:`stepwell.launch`. None: ``$STEPWELL_KERNEL``, else ``"auto"``.
        gradients: What a rank's gradients mean. ``"local"``: its own; the service averages them over the ranks that
            have one. ``"replicated"``: equal on all ranks, as DDP leaves them; each rank pushes a share.
            ``"sharded"``: the part that this rank holds of an averaged gradient, as FSDP2 leaves it; each rank pushes
            and gets back what it holds. None: ``"sharded"`` for DTensor parameters, ``"replicated"`` for named ones
            that all have DDP's prefix ``module.``, else ``"local"``, which is right with DDP too. Logged.
        on_nonfinite: What a step does whose averaged gradient holds inf or NaN: it is skipped on all shards, and
            ``"raise"`` tells the caller so.
        max_grad_norm: Scale the averaged gradient of the whole model down to this 2-norm, as
            ``torch.nn.utils.clip_grad_norm_`` would; ``math.inf`` measures only. None: neither.
        max_grad_value: Clip each element of the averaged gradient to this absolute value before that, as
            ``torch.nn.utils.clip_grad_value_`` would. None: do not.
        weight_decay_mask: Which parameters decay: a callable of name and parameter, or one flag for each parameter in
            index order; those that are added later then decay. None: all.
        state_dict_form: ``"torch"``: ``state_dict()`` holds the whole state. ``"reference"``, for large models: it
            saves a checkpoint through the service and holds where that is.
        checkpoint_uri: A folder, as path or fsspec URI, that workers and shards can reach, for ``"reference"``.
        overlap: Copy each gradient within backward, as soon as it is complete, instead of in ``step()``, and send it to
            shards on other nodes there; for large parameters whose gradients no other process reduces afterwards, else
            they are copied in ``step()`` as ever.
            Results are the same to the bit. What changes a gradient after backward is noticed (clipping, a replaced or
            removed ``.grad``, a scaler that also calls ``step()``), unless torch's version counter does not show it:
            then, as with ``.grad.data`` or NumPy, it would be lost, which is why this is off by default.
        gradient_dtype: What gradients are sent in: ``torch.bfloat16``, ``float16``, ``float32`` or ``float64``. Fewer
            bytes, and less exact. None: the model's own dtype.
        carried: Further keys of every group, which mean nothing here and travel with state dicts.

    Attributes:
        max_grad_norm, max_grad_value: As above; what stands here on rank 0 goes with the next step.

    Raises:
        ValueError: If an argument is out of range, or a parameter is given twice.
        HyperparameterError: If a group's value or a limit is out of range, or differs where the job has one for all.
        UnsupportedParameterError: If a parameter is sparse, complex, quantized or integer.
        ServiceError: If the service cannot be reached or started.
        JobMismatchError: If the service runs another job.
    """

    _step_supports_amp_scaling = True
    """Tells ``torch.amp.GradScaler`` to call ``step()`` whatever the gradients, with the scale as an attribute."""
    _mask: WeightDecayMask | None = None
    _loss: float | None = None

    def __init__(
        self,
        params: ParamsT,
        rule: Rule,
        *,
        service: str | Service | InProcessService | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        num_shards: int | None = None,
        kernel: KernelChoice | None = None,
        gradients: Gradients | None = None,
        on_nonfinite: Literal["skip", "raise"] = "skip",
        max_grad_norm: float | None = None,
        max_grad_value: float | None = None,
        weight_decay_mask: WeightDecayMask | None = None,
        state_dict_form: Literal["torch", "reference"] = "torch",
        checkpoint_uri: str | None = None,
        overlap: bool = False,
        gradient_dtype: torch.dtype | None = None,
        carried: Mapping[str, object] | None = None,
    ) -> None:
        if on_nonfinite not in ("skip", "raise"):
            raise ValueError(f"on_nonfinite: expected 'skip' or 'raise', got {on_nonfinite!r}")
        ClipLimits(max_grad_norm, max_grad_value)
        self._gathering = GatherOptions(overlap, gradient_dtype)
        self.max_grad_norm, self.max_grad_value = max_grad_norm, max_grad_value
        self._reference_uri = reference_uri(state_dict_form, checkpoint_uri)
        super().__init__(params, {**rule.defaults(), **(carried or {})})
        self.rule, self._on_nonfinite = plain_rule(rule), on_nonfinite
        read_hyper(self.rule, self.param_groups)
        rank, self._world_size = resolve_ranks(rank, world_size)
        self.gradients = resolve_gradients(gradients, self._named_params(), self._world_size)
        self._mask = weight_decay_mask
        spec, params, holdings = self._describe_job()
        device = params[0].device if params else torch.device("cpu")
        transport = resolve_service(
            service, rank=rank, world_size=self._world_size, num_shards=num_shards, kernel=kernel, device=device
        )
        self._attach(Worker(transport, spec, params, rank, holdings, options=self._gathering))
        self._show_service()

    @property
    def service(self) -> ServiceHandle:
        """The service: ``status()``, ``save(uri)``, ``restore(uri)``, ``shutdown()``."""
        return self._registered.transport.service

    @property
    def ranks(self) -> tuple[int, ...]:
        """Whose gradients the last step was taken with, ascending; before one, whom the next step waits for.

        The first of these ranks is the one whose hyperparameters and limits count: of an elastic service not always 0.
        """
        return self._registered.ranks

    @property
    def grad_norm(self) -> float | None:
        """The 2-norm of the last step's averaged gradient before it was clipped to it, the same on all ranks.

        None before the first step or if rank 0 set no limit. After a skipped step it may be infinite or NaN.
        """
        result = self._registered.last_result
        return None if result is None else result.grad_norm

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was skipped, on all ranks, as its gradient held inf or NaN."""
        result = self._registered.last_result
        return result is not None and result.decision is Decision.SKIP

    @property
    def num_steps(self) -> int:
        """Steps that the job has taken so far, skipped ones included; of a service that was restored, those of then.

        A loop that may be resumed begins here: ``for step in range(optimizer.num_steps, NUM_STEPS)``.
        """
        return self._registered.num_steps

    @property
    def num_skipped_steps(self) -> int:
        """Steps that the job has skipped so far, before a restart or restore too."""
        return self._registered.num_skipped_steps

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Push this rank's gradients, wait until the step is taken, take the new parameters over. Called on every rank.

        A rank's parameters without a gradient are left out of the average; without a gradient on any rank they stand
        still. Parameters that were changed in place since the last step (on rank 0) replace the service's. With a
        gradient scaler the service undoes the scale; the gradients here stay scaled.

        Args:
            closure: Computes the loss and the gradients again.

        Returns:
            The closure's loss.

        Raises:
            StepAbortedError: If the step was given up on all shards; nothing has changed.
            RankExcludedError: If an elastic service has gone on without this rank; call :meth:`refresh`.
            NonFiniteGradientError: With ``on_nonfinite="raise"``, if it was skipped.
            ServiceError: If the service did not answer. The next call finds out what became of the step.
        """
        with attached_scale(self) as scale:
            worker = self._settled()
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            hyper = read_hyper(self.rule, self.param_groups)
            written = written_scalars(self.rule, self.param_groups, worker.scalars)
            limits = ClipLimits(self.max_grad_norm, self.max_grad_value)
            if scale.is_undone:
                worker.distrust_gradients()
            is_heard = worker.is_heard
            result = worker.step(
                hyper if is_heard else None,
                written if is_heard else None,
                limits=limits if is_heard else None,
                grad_scale=scale.grad_scale,
                found_inf=scale.found_inf,
                loss=self._loss,
            )
            self._loss = None
            if result.decision is Decision.COMMIT:
                show_scalars(self.param_groups, worker.scalars)
            else:
                self._tell_of_skip(result.sequence, is_scaled=scale.grad_scale != 1.0)
        return loss

    def report(self, *, loss: float | torch.Tensor) -> None:
        """Tell the run's history what the next step's gradients are of; see :meth:`stepwell.Service.history`.

        Called on any rank, or on all of them: the history holds the mean over those that tell. It goes with the next
        :meth:`step`, and what comes of that does not depend on it.

        Args:
            loss: One number; a tensor of one element is read here, which on a GPU waits for backward.

        Raises:
            ValueError: If it is not one number.
        """
        if isinstance(loss, torch.Tensor):
            if loss.numel() != 1:
                raise ValueError(f"loss: expected one number, got a tensor of shape {list(loss.shape)}")
            loss = loss.item()
        self._loss = float(loss)

    def refresh(self) -> None:
        """Take over the service's parameters, scalars and step number, after ``service.restore``.

        Called on every rank. A rank that an elastic service has excluded joins again.
        """
        self._registered.refresh()
        show_scalars(self.param_groups, self._registered.scalars)

    def reload_parameters(self) -> None:
        """Let the next step take the model's parameters over, after a change through ``.data``.

        Called on rank 0; of a sharded model on every rank, for what it holds.

        Changes in place (``copy_``, ``load_state_dict``, ``clamp_``) are noticed without this.
        """
        self._registered.mark_changed()

    def state_dict(self) -> dict[str, Any]:
        """The state in torch's form, keyed by parameter index, as the reference optimizer would give it.

        Any rank may call it, between steps; it reads the whole state from the service. After the first step a parameter
        that never had a gradient has no entry. With ``state_dict_form="reference"`` the service saves a checkpoint
        instead, once for all ranks, and ``state_dict["stepwell"]`` holds its ``uri``, ``step`` and ``digest``.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        worker = self._settled()
        state_dict: dict[str, Any] = {"state": {}, "param_groups": pack_groups(self.param_groups)}
        if self._reference_uri is not None:
            state_dict["stepwell"] = save_reference(worker, self._reference_uri)
        else:
            state_dict["state"] = read_states(worker)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            hooked = post_hook(self, state_dict)
            state_dict = state_dict if hooked is None else hooked
        return state_dict

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state dict of this class or of the reference optimizer. Called on every rank; rank 0's state counts.

        One that refers to a checkpoint restores the service from it, and the model takes its parameters over.

        Raises:
            ValueError: If the number or sizes of the groups differ, as torch; if it has lost its reference on the way.
            JobMismatchError: If a slot is missing, unknown or of another length. Nothing has changed.
            CheckpointError: If the checkpoint is not there, damaged, or not the one that the state dict was made with.
        """
        loaded = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            hooked = pre_hook(self, loaded)
            loaded = loaded if hooked is None else hooked
        worker = self._registered
        groups = unpack_groups(loaded["param_groups"], self.param_groups, self.defaults)
        read_hyper(self.rule, groups)
        if "stepwell" in loaded:
            worker.restore(*read_reference(loaded["stepwell"]))
        else:
            if self._reference_uri is not None:
                require_state(loaded["state"])
            values, step_counts = from_states(worker.spec, loaded["param_groups"], loaded["state"])
            worker.load(values, load_header(worker.spec, step_counts, groups, worker.sequence))
        self.param_groups = groups
        show_scalars(groups, worker.scalars)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at any time between two steps. Called on every rank, with the same group.

        The added parameters begin with rank 0's values; what exists stays as it is, to the bit.

        Raises:
            ValueError: If a parameter is in a group already.
            HyperparameterError: If the group's values are out of range.
            JobMismatchError: If the ranks add different groups. The optimizer and the service are as before.
        """
        if isinstance(param_group, dict):
            require_distinct(param_group, self.param_groups)
        super().add_param_group(param_group)
        if self._worker is None:
            return  # torch's constructor at work
        try:
            read_hyper(self.rule, self.param_groups)
            resolve_gradients(self.gradients, self._named_params(), self._world_size)
            self._worker.extend(*self._describe_job())
        except BaseException:
            self.param_groups.pop()
            raise
        self._show_service()

    def _named_params(self) -> list[tuple[str, torch.Tensor]]:
        """Every parameter in index order, with its name where one is known."""
        return [
            named
            for group in self.param_groups
            for named in zip(group.get("param_names") or [""] * len(group["params"]), group["params"], strict=True)
        ]

    def _describe_job(self) -> tuple[JobSpec, list[torch.Tensor], Holdings | None]:
        """The job, all parameters, and what this rank holds of them if they are sharded."""
        named, groups, mask = self._named_params(), self.param_groups, self._mask
        params = [param for _, param in named]
        if self._worker is not None and mask is not None and not callable(mask):
            mask = [*mask, *[True] * (len(params) - len(mask))]
        specs = apply_mask(list(param_specs(groups)), params, mask)
        spec = JobSpec(self.rule, specs, len(groups), self._world_size, gradients=self.gradients)
        return spec, params, holdings_of(named) if self.gradients == "sharded" else None

    def _show_service(self) -> None:
        """Write what code looks for: scalars into the groups, names into the state.

        Code that finds an empty state takes a step of its own to fill it, and some looks up the names in it.
        """
        worker = self._registered
        show_scalars(self.param_groups, worker.scalars)
        for index, (_, param) in enumerate(self._named_params()):
            names = state_names(worker.spec, index)
            self.state[param] = dict.fromkeys(names, f"in service {worker.transport.service.name!r}")

    def _tell_of_skip(self, sequence: int, *, is_scaled: bool) -> None:
        message = f"step {sequence} was skipped on all shards: the averaged gradient holds inf or NaN"
        if self._on_nonfinite == "raise":
            raise NonFiniteGradientError(message)
        # A scaler tries scales that are too large on purpose.
        logger.log(logging.INFO if is_scaled else logging.WARNING, message)
