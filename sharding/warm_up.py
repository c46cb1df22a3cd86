"""Compiling a job's kernels before its first step, so that no step waits for it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .buffers import MASTER, StateSource
from .delivery import Sink
from .inprocess import ShardGroup
from .job import JobSpec
from .layout import ParamSpec, dtype_name, wire_dtype
from .push import Push, PushHeader, pack_present

STAND_IN_SHAPE = (4, 2, 8, 4)
"""Of four dimensions, so that a rule which knows output channels finds some."""


def warm_up(spec: JobSpec, device: torch.device, *, is_delivered: bool = True) -> None:
    """Take one step of a small stand-in for each dtype that the job has; nothing of the job is touched.

    Each rank's parameters go to memory that is reached from here. What not every step needs is compiled when one does:
    the look at a gradient, for its norm, and parameters that go to nobody's memory.

    Args:
        spec: The job.
        device: Where its passes run.
        is_delivered: False for steps that are taken again, whose parameters go to nobody.

    Raises:
        KernelError: If its kernels cannot be compiled.
    """
    if spec.kernel == "eager":
        return
    layout = spec.layout()
    for dtype in dict.fromkeys(wire_dtype(layout, extent) for extent in layout.extents):
        _take_step(_stand_in(spec, dtype), dtype, device, is_delivered)


def _stand_in(spec: JobSpec, dtype: torch.dtype) -> JobSpec:
    world_size = spec.world_size if spec.gradients == "local" else 1
    param = ParamSpec("", STAND_IN_SHAPE, dtype_name(dtype), group=0)
    return dataclasses.replace(
        spec, params=(param,), num_groups=1, world_size=world_size, gradients="local", batches=(), chunk_numel=None
    )


def _take_step(spec: JobSpec, dtype: torch.dtype, device: torch.device, is_delivered: bool) -> None:
    group, hyper = ShardGroup(spec, device=device), spec.rule.hyper(spec.rule.defaults())
    group.load(StateSource(_read_ones, frozenset({(0, MASTER.name)})), timeline=1)
    gradient = torch.ones(spec.params[0].numel, dtype=dtype, device="cpu")
    for rank in range(spec.world_size):
        group.admit(rank, "stand-in")
        header = PushHeader(
            timeline=1,
            sequence=1,
            rank=rank,
            incarnation="stand-in",
            attempt=0,
            present=pack_present([True]),
            hyper={name: [value] for name, value in hyper.items()} if rank == 0 else None,
            max_abs=1.0,
        )
        sink = Sink("held", (torch.empty_like(gradient, device=device),)) if is_delivered else None
        group.push([Push(header, (gradient,), sink=sink)])


def _read_ones(param: int, slot: str, offset: int, out: Tensor) -> None:
    out.fill_(1.0)
