"""Two data-parallel workers: averaging their gradients and stepping, as one figure.

The workers are processes of their own in a gloo group, with half of the cores each; the service has two shards. A time
is that from when both begin until the second is done. Two forms:

- gradient given: the service's step beside one all_reduce of all gradients, in one flat buffer, and a step on each. The
  service's gradients lie where hooks have put them, within a backward that is not timed; "copying" copies them first;
- behind a backward: a whole training step with a backward that costs little; the time is what it takes beyond the same
  backward without averaging. FSDP2's gathering of the parameters is part of its step, as the service's is of ours.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import prodigyopt
import torch
import torch.distributed as dist
from contestants import (
    ADAMW_BYTES,
    FUSED,
    GROWTH_RATE,
    Workload,
    backward_of,
    behind_backward,
    layered,
    loss_of,
    ours,
    ray_of_its_own,
    service_of,
)
from harness import Contestant, Row, main, race, tell
from ranks import run_ranks, timed_together
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import stepwell
from stepwell.server.cluster import address

TIMEOUT_S = 240.0
PER_LAYER = 6
BACKWARD = "the backward alone"
REDUCED_PRODIGY, REDUCED_ADAMW = "all_reduce, prodigyopt", "all_reduce, AdamW fused"
DDP_PRODIGY, DDP_ZERO, FSDP_ADAMW = "DDP, prodigyopt", "DDP, ZeroRedundancyOptimizer(AdamW)", "FSDP2, AdamW fused"
PRODIGY, COPYING, ADAMW = "Prodigy, 2 shards", "Prodigy, 2 shards, copying", "AdamW, 2 shards"
FSDP_PRODIGY = "FSDP2, Prodigy, 2 shards"

GIVEN = ((PRODIGY, REDUCED_PRODIGY), (COPYING, REDUCED_PRODIGY), (ADAMW, REDUCED_ADAMW))
BEHIND = (
    *((name, other) for name in (PRODIGY, COPYING) for other in (DDP_PRODIGY, DDP_ZERO, FSDP_ADAMW)),
    (FSDP_PRODIGY, FSDP_ADAMW),
)

NUM_SERVICES = 3
"""In each form."""

Steps = dict[str, Callable[[], object]]


def rows(quick: bool) -> list[Row]:
    """Both forms' figures."""
    numel, budget_s = (500_000, 0.5) if quick else (32_000_000, 12.0)
    found: list[Row] = []
    with ray_of_its_own():
        for form in (_race_given, _race_behind):
            tell(f"two workers, {form.__name__.rpartition('_')[2]}")
            with contextlib.ExitStack() as stack:
                names = [stack.enter_context(service_of(2)).name for _ in range(NUM_SERVICES)]
                found += run_ranks(form, 2, names, address(), numel, budget_s, timeout_s=TIMEOUT_S)
    return found


def _race_given(rank: int, world_size: int, names: list[str], where: str, numel: int, budget_s: float) -> list[Row]:
    workload = Workload(layered(numel), seed=rank)
    yardstick = torch.optim.AdamW(workload.params(with_grads=True), fused=True)
    with contextlib.ExitStack() as stack:
        contestants = []
        for label, name in zip((PRODIGY, COPYING, ADAMW), names, strict=True):
            optimizer, params = stack.enter_context(_entered(label, name, where, workload))
            contestants.append(Contestant(label, optimizer.step, prepare=backward_of(workload, params)))
        reduced: Steps = {
            REDUCED_PRODIGY: _reduced(workload, lambda params: prodigyopt.Prodigy(params, growth_rate=GROWTH_RATE)),
            REDUCED_ADAMW: _reduced(workload, lambda params: torch.optim.AdamW(params, fused=True)),
        }
        found = race(
            [*contestants, *(Contestant(name, step) for name, step in reduced.items())],
            yardsticks=[Contestant(FUSED, yardstick.step, ADAMW_BYTES * workload.numel * world_size)],
            budget_s=budget_s,
            clock=timed_together,
        )
    section = f"{world_size} workers, {numel / 1e6:g} M, gradient given"
    compared = [
        found.row(name, other, scale=1e9 / numel, section=section, key=f"workers/given/{name}/{other}")
        for name, other in GIVEN
    ]
    return [*found.machine(section), *compared]


def _race_behind(rank: int, world_size: int, names: list[str], where: str, numel: int, budget_s: float) -> list[Row]:
    workload = Workload(layered(numel), seed=rank)
    alone = Contestant(BACKWARD, behind_backward(workload, workload.params(with_grads=False), None))
    with contextlib.ExitStack() as stack:
        steps = _torch_steps(workload)
        for label, name in zip((PRODIGY, COPYING), names[:2], strict=True):
            optimizer, params = stack.enter_context(_entered(label, name, where, workload))
            steps[label] = behind_backward(workload, params, optimizer)
        net = _fsdp(workload)
        service = stepwell.connect(names[2], address=where)
        sharded = ours("Prodigy", list(net.parameters()), service=service)
        stack.callback(sharded.close)
        steps[FSDP_PRODIGY] = _training_step(net, sharded)
        contestants = [alone, *(Contestant(name, step) for name, step in steps.items())]
        found = race(contestants, budget_s=budget_s, clock=timed_together)
    section = f"{world_size} workers, {numel / 1e6:g} M, behind a backward"
    return [
        found.row(
            name, other, scale=1e9 / numel, beyond=BACKWARD, section=section, key=f"workers/behind/{name}/{other}"
        )
        for name, other in BEHIND
    ]


@contextlib.contextmanager
def _entered(
    label: str, name: str, where: str, workload: Workload
) -> Iterator[tuple[stepwell.ServiceOptimizer, list[nn.Parameter]]]:
    """One of ours, in the service of this name."""
    params, service = workload.params(with_grads=False), stepwell.connect(name, address=where)
    optimizer = ours(label.partition(",")[0], params, service=service, overlap=label != COPYING)
    with contextlib.closing(optimizer):
        yield optimizer, params


def _reduced(workload: Workload, build: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[], None]:
    """One all_reduce of a flat buffer that all gradients are views of, and an optimizer's step on every rank."""
    params = workload.params(with_grads=False)
    flat = torch.cat([grad.reshape(-1) for grad in workload.grads])
    for param, grad in zip(params, torch.split(flat, [param.numel() for param in params]), strict=True):
        param.grad = grad.view_as(param)
    optimizer = build(params)

    def step() -> None:
        dist.all_reduce(flat)
        flat.div_(dist.get_world_size())
        optimizer.step()

    return step


class _Layer(nn.Module):
    def __init__(self, params: Sequence[nn.Parameter], grads: Sequence[Tensor]) -> None:
        super().__init__()
        self.params, self._grads = nn.ParameterList(params), grads

    def forward(self, loss: Tensor) -> Tensor:
        return loss + loss_of(list(self.params), self._grads)


def _net(workload: Workload) -> nn.Sequential:
    params, grads = workload.params(with_grads=False), workload.grads
    begins = range(0, len(params), PER_LAYER)
    return nn.Sequential(*(_Layer(params[i : i + PER_LAYER], grads[i : i + PER_LAYER]) for i in begins))


def _fsdp(workload: Workload) -> nn.Sequential:
    net, mesh = _net(workload), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in net:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def _training_step(net: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def iteration() -> None:
        net(torch.zeros((), requires_grad=True)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return iteration


def _torch_steps(workload: Workload) -> Steps:
    """What torch offers for several ranks, each in its fastest form."""
    plain, zero = (DistributedDataParallel(_net(workload), gradient_as_bucket_view=True) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses what torch itself has deprecated
        zeroed = ZeroRedundancyOptimizer(
            zero.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, fused=True
        )
    fsdp = _fsdp(workload)
    return {
        DDP_PRODIGY: _training_step(plain, prodigyopt.Prodigy(plain.parameters(), growth_rate=GROWTH_RATE)),
        DDP_ZERO: _training_step(zero, zeroed),
        FSDP_ADAMW: _training_step(fsdp, torch.optim.AdamW(fsdp.parameters(), fused=True)),
    }


if __name__ == "__main__":
    main(rows, __doc__)
