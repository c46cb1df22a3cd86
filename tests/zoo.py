"""The problem zoo: what the tests train.

A :class:`Problem` is a noisy quadratic over tensors of awkward shapes. It knows nothing of shards, Ray or clients; it
gives initial parameters and gradients. :class:`Run` drives one on shards in this process through their public push
interface, :func:`run_reference` through a torch optimizer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from stepwell.optim import TILE_NUMEL, Rule
from stepwell.server.config import default_kernel
from stepwell.sharding.buffers import MASTER, StateSource
from stepwell.sharding.compiling import Kernel, resolve_kernel
from stepwell.sharding.inprocess import ShardGroup
from stepwell.sharding.job import JobSpec
from stepwell.sharding.layout import Layout, ParamSpec, dtype_from_name
from stepwell.sharding.pieces import HeldPieces
from stepwell.sharding.push import Push, PushHeader, pack_present
from stepwell.sharding.reports import StepResult
from stepwell.sharding.world import World

SAMPLES = 4
"""A step's noise is the mean of this many samples, dealt out to the ranks: 1, 2 or 4 of them see the same batch."""
NOISE_PERIOD = 19
"""The noise repeats, and sums up to zero."""


@dataclasses.dataclass(frozen=True, slots=True)
class ZooTensor:
    """One parameter. ``has_grad=False`` is frozen: present in no step. ``zeros`` begins at zero.

    ``decays=False`` is left out of weight decay.
    """

    shape: tuple[int, ...]
    group: int = 0
    dtype: str = "float32"
    has_grad: bool = True
    zeros: bool = False
    decays: bool = True


@dataclasses.dataclass(frozen=True)
class Problem:
    """A noisy quadratic: ``gradient = curvature * (param - target) + noise``, curvature by tensor.

    Attributes:
        tensors: The parameters.
        seed: Of parameters, targets and noise.
        noise: Standard deviation of one sample's noise.
        path: Each step's parameters, at which the gradient is taken whatever the run's own are; None for its own. With
            a path, rounding errors do not feed back through the gradient, and two runs can be compared closely.
    """

    tensors: tuple[ZooTensor, ...]
    seed: int = 0
    noise: float = 0.2
    path: Sequence[Sequence[Tensor]] | None = None

    @property
    def num_groups(self) -> int:
        return 1 + max((tensor.group for tensor in self.tensors), default=0)

    @property
    def present(self) -> list[bool]:
        return [tensor.has_grad for tensor in self.tensors]

    def specs(self) -> tuple[ParamSpec, ...]:
        return tuple(ParamSpec(f"p{i}", t.shape, t.dtype, t.group, t.decays) for i, t in enumerate(self.tensors))

    def as_dtype(self, dtype: str) -> Problem:
        """The same problem, all tensors of one dtype."""
        return dataclasses.replace(self, tensors=tuple(dataclasses.replace(t, dtype=dtype) for t in self.tensors))

    def along(self, path: Sequence[Sequence[Tensor]]) -> Problem:
        """The same problem, its gradients taken along a path."""
        return dataclasses.replace(self, path=path)

    def initial(self, index: int) -> Tensor:
        """A copy of a parameter's initial value, in its dtype."""
        return self._initial[index].to(dtype_from_name(self.tensors[index].dtype), copy=True)

    def gradient(self, step: int, index: int, param: Tensor, *, rank: int = 0, world_size: int = 1) -> Tensor:
        """One rank's gradient at ``param``, in its dtype; the mean over ranks is that of a single rank.

        Steps count from 0. The same call gives the same bits.
        """
        at = param if self.path is None else self.path[step][index]
        work = torch.promote_types(at.dtype, torch.float32)
        away = at.to(work) - self._targets[index].to(work)
        noise = self._batch_noise(SAMPLES * step % NOISE_PERIOD, rank, world_size)[index]
        return (away * self.curvature(index) + noise.to(work)).to(param.dtype)

    def curvature(self, index: int) -> float:
        """From 1/4 to 4, by tensor."""
        return 2.0 ** (index % 5 - 2)

    def loss(self, params: Sequence[Tensor]) -> float:
        """What the gradients are of, without noise."""
        return sum(
            0.5 * self.curvature(i) * float((param.detach().double() - self._targets[i].double()).square().sum())
            for i, param in enumerate(params)
            if self.tensors[i].has_grad
        )

    def parameters(self, dtype: torch.dtype | None = None) -> list[nn.Parameter]:
        """Fresh leaves with the initial values."""
        values = [self.initial(index) for index in range(len(self.tensors))]
        return [nn.Parameter(value if dtype is None else value.to(dtype)) for value in values]

    def param_groups(
        self, params: Sequence[nn.Parameter], options: Sequence[Mapping[str, object]] = ()
    ) -> list[dict[str, Any]]:
        """The parameters in their groups, for an optimizer; ``options[i]`` goes into group i."""
        groups: list[dict[str, Any]] = [{"params": []} for _ in range(self.num_groups)]
        for tensor, param in zip(self.tensors, params, strict=True):
            groups[tensor.group]["params"].append(param)
        for group, option in zip(groups, options, strict=False):
            group.update(option)
        return groups

    def set_gradients(self, params: Sequence[nn.Parameter], step: int, *, rank: int = 0, world_size: int = 1) -> None:
        """Give every parameter that has one its gradient of ``step``, by a backward pass."""
        for index, (tensor, param) in enumerate(zip(self.tensors, params, strict=True)):
            if tensor.has_grad:
                param.grad = None
                gradient = self.gradient(step, index, param.detach(), rank=rank, world_size=world_size)
                torch.autograd.backward(param, gradient)

    @functools.cached_property
    def _initial(self) -> list[Tensor]:
        drawn = self._draw(self.seed)
        return [torch.zeros(t.shape) if t.zeros else value for value, t in zip(drawn, self.tensors, strict=True)]

    @functools.cached_property
    def _targets(self) -> list[Tensor]:
        return self._draw(self.seed + 1)

    @functools.cached_property
    def _noise(self) -> list[list[Tensor]]:
        drawn = [self._draw(self.seed + 2 + k) for k in range(NOISE_PERIOD)]
        means = [torch.stack(values).mean(dim=0) for values in zip(*drawn, strict=True)]
        return [[(value - mean) * self.noise for value, mean in zip(values, means, strict=True)] for values in drawn]

    def _batch_noise(self, first: int, rank: int, world_size: int) -> list[Tensor]:
        """The mean of a rank's samples, by tensor."""
        key = (first, rank, world_size)
        if key not in self._batches:
            samples = range(first + rank * SAMPLES // world_size, first + (rank + 1) * SAMPLES // world_size)
            drawn = [self._noise[sample % NOISE_PERIOD] for sample in samples]
            self._batches[key] = [torch.stack(values).mean(dim=0) for values in zip(*drawn, strict=True)]
        return self._batches[key]

    @functools.cached_property
    def _batches(self) -> dict[tuple[int, int, int], list[Tensor]]:
        return {}

    def _draw(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(tensor.shape, generator=generator) for tensor in self.tensors]


def straddling() -> Problem:
    """About 66,000 elements: blocks and chunks of four tiles, many tiny tensors in one, large ones over many.

    Two groups, a frozen tensor, one that begins at zero, 0-dim, single elements, exact tiles and one element more.
    """
    tiny = [ZooTensor((1 + 3 * k,), group=k % 2) for k in range(12)]
    edges = [ZooTensor((numel,), group=1) for numel in (255, 256, 257, 1023, 1024, 1025)]
    return Problem(
        (
            ZooTensor(()),
            ZooTensor((150, 100)),
            *tiny,
            ZooTensor((32, 32, 3, 3), group=1),
            ZooTensor((700, 3), has_grad=False),
            *edges,
            ZooTensor((1,)),
            ZooTensor((130,), zeros=True),
            ZooTensor((257, 101)),
            ZooTensor((3, 3, 3, 3), group=1),
            ZooTensor((5, 1000)),
        )
    )


def small() -> Problem:
    """About 3,000 elements in 17 tiles, one tile to a block and a chunk. Two groups, a frozen tensor."""
    return Problem(
        (
            ZooTensor((40, 13)),
            ZooTensor(()),
            ZooTensor((257,), group=1),
            ZooTensor((7,), has_grad=False),
            ZooTensor((1,), group=1),
            ZooTensor((30, 33)),
            ZooTensor((13,), zeros=True),
            ZooTensor((4, 3, 8, 9)),
        )
    )


def convolutions() -> Problem:
    """About 9,000 elements in tiles, blocks and chunks of 256, most of them in output channels.

    Channels of one element, shorter than a tile (27), about a tile (252, 256, 257), longer (320, 1000): they straddle
    tiles, blocks and any cut into shards. Two groups, frozen and absent convolutions, one that begins at zero.
    """
    return Problem(
        (
            ZooTensor((6, 3, 3, 3)),
            ZooTensor((40, 13)),
            ZooTensor((5, 7, 6, 6), group=1),
            ZooTensor((8, 1, 1, 1)),
            ZooTensor((3, 4, 4, 16), has_grad=False),
            ZooTensor((3, 10, 16, 2), group=1),
            ZooTensor((7, 2, 3, 3, 2), zeros=True),
            ZooTensor((2, 257, 1, 1)),
            ZooTensor((3, 8, 8, 4)),
            ZooTensor((1,), group=1),
            ZooTensor((2, 4, 3, 3)),
            ZooTensor((3, 40, 5, 5), group=1),
            ZooTensor(()),
        )
    )


NUM_STEPS = 200
"""A whole run."""

Schedule = Callable[[Sequence[dict[str, Any]], int], None]
"""Writes a step's hyperparameters into the parameter groups: ``schedule(groups, step)``, steps from 0."""


def cosine(groups: Sequence[dict[str, Any]], step: int) -> None:
    """Every group's learning rate goes down a cosine, to almost 0 in the last step of :data:`NUM_STEPS`."""
    for group in groups:
        base = group.setdefault("initial_lr", group["lr"])
        group["lr"] = base * 0.5 * (1.0 + math.cos(math.pi * step / NUM_STEPS))


def constant(groups: Sequence[dict[str, Any]], step: int) -> None:
    """Everything stays as it is."""


@dataclasses.dataclass(frozen=True)
class State:
    """Everything that a step may change, copied.

    Attributes:
        slots: Slot name to each parameter's whole slot, flattened; ``master_param`` among them.
        scalars: The rule's.
        step_counts: Of each tensor.
        counters: Sequence number, steps, skipped steps.
    """

    slots: Mapping[str, Sequence[Tensor]]
    scalars: Mapping[str, float]
    step_counts: tuple[int, ...]
    counters: tuple[int, int, int]

    @property
    def params(self) -> Sequence[Tensor]:
        return self.slots[MASTER.name]


def chosen_kernel() -> Kernel:
    """How passes run where a test does not say."""
    return resolve_kernel(default_kernel(), torch.device("cpu"))


class Run:
    """A problem on shards in this process.

    Args:
        problem: What to train.
        rule: With what.
        num_shards: How many shards.
        world_size: How many workers push.
        chunk_numel: Elements in a chunk.
        options: Keys that differ by parameter group; ``options[i]`` goes into group i.
        wire_dtype: What the gradients are pushed in; None for the state's dtype.
        source: The state to begin with; None for the problem's initial parameters.
        rank_0: Fields of the headers of rank 0, in each of its pushes.
        kernel: How passes run; None for ``$STEPWELL_KERNEL``, as for services.
        is_elastic: Whether ranks may come and go.
        device: Where the shards live; None for the CPU. Gradients come from there, whatever it is.
    """

    def __init__(
        self,
        problem: Problem,
        rule: Rule,
        *,
        num_shards: int = 1,
        world_size: int = 1,
        chunk_numel: int | None = None,
        options: Sequence[Mapping[str, object]] = (),
        wire_dtype: torch.dtype | None = None,
        source: StateSource | None = None,
        rank_0: Mapping[str, object] | None = None,
        kernel: Kernel | None = None,
        is_elastic: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.problem, self.rule, self.world_size, self.wire_dtype = problem, rule, world_size, wire_dtype
        self.rank_0 = dict(rank_0 or {})
        kernel = kernel or chosen_kernel()
        spec = JobSpec(rule, problem.specs(), problem.num_groups, world_size, chunk_numel, kernel=kernel)
        world = World(tuple(range(world_size)), is_elastic=is_elastic, timeout_s=5.0)
        self.group = ShardGroup(spec, num_shards=num_shards, world=world, device=device)
        self.group.load(source or initial_state(problem), timeline=1)
        for rank in range(world_size):
            self.group.admit(rank, f"worker-{rank}")
        self.groups: list[dict[str, Any]] = [rule.defaults() for _ in range(problem.num_groups)]
        for group, option in zip(self.groups, options, strict=False):
            group.update(option)

    @property
    def layout(self) -> Layout:
        return self.group.shards[0].layout

    @property
    def world(self) -> World:
        return self.group.shards[0].world

    @property
    def next_sequence(self) -> int:
        return self.group.shards[0].sequence + 1

    def params(self) -> list[Tensor]:
        """The parameters in the model's dtype and their shapes, on the CPU."""
        shards = self.group.shards
        dtypes, first = [extent.dtype for extent in self.layout.extents], self.world.ranks[0]
        parts = zip(*(shard.parameters(dtypes, first, "held") for shard in shards), strict=True)
        flat = [torch.cat(part) for part in parts]
        return [
            view.to("cpu", dtype_from_name(tensor.dtype), copy=True)
            for view, tensor in zip(views(self.layout, flat), self.problem.tensors, strict=True)
        ]

    def pushes(
        self,
        rank: int = 0,
        *,
        gradients: Mapping[int, Tensor] | None = None,
        reloaded: Mapping[int, Tensor] | None = None,
        **header: Any,
    ) -> list[Push]:
        """One rank's push for the next step, a part for each shard.

        Args:
            rank: The rank.
            gradients: By parameter index; parameters that are not in here are absent. None for the problem's.
            reloaded: As in a push.
            header: Fields of the header to replace.
        """
        if gradients is None:
            gradients = self.gradients(self.next_sequence - 1, rank)
        by_group = [self.rule.hyper(group) for group in self.groups]
        hyper = {name: [values[name] for values in by_group] for name in by_group[0]}
        fields: dict[str, Any] = {
            "timeline": self.group.shards[0].timeline,
            "sequence": self.next_sequence,
            "rank": rank,
            "incarnation": f"worker-{rank}",
            "attempt": 0,
            "present": pack_present([index in gradients for index in range(len(self.problem.tensors))]),
            "hyper": hyper if self.world.is_heard(rank) else None,
            **(self.rank_0 if rank == 0 else {}),
        }
        flat = flatten(self.layout, gradients, self.wire_dtype)
        shards = self.group.shards
        parts = [tuple(cut(self.layout, flat, index, len(shards))) for index in range(len(shards))]
        return [Push(PushHeader(**(fields | header)), part, reloaded or {}) for part in parts]

    def gradients(self, step: int, rank: int = 0) -> dict[int, Tensor]:
        """The problem's gradients at the present parameters."""
        return {
            index: self.problem.gradient(step, index, param, rank=rank, world_size=self.world_size)
            for index, param in enumerate(self.params())
            if self.problem.tensors[index].has_grad
        }

    def step(self, **push: Any) -> StepResult:
        """One step of all ranks; ``push`` goes to :meth:`pushes`."""
        result = None
        for pushes in [self.pushes(rank, **push) for rank in range(self.world_size)]:
            result = self.group.push(pushes)
        assert result is not None, "every rank has pushed"
        return result

    def steps(self, num_steps: int, *, schedule: Schedule = cosine) -> Self:
        """Take steps until there were ``num_steps`` in all; returns itself."""
        for step in range(self.next_sequence - 1, num_steps):
            schedule(self.groups, step)
            self.step()
        return self

    def state(self) -> State:
        """A copy of everything."""
        shard = self.group.shards[0]
        slots, key_slots = self.rule.slots, self.rule.key_slots
        names = [MASTER.name, *(slot.name for slot in slots), *(slot.name for slot in key_slots)]
        indices = range(len(self.problem.tensors))
        return State(
            slots={name: [self.group.read(name, index) for index in indices] for name in names},
            scalars=dict(shard.scalars),
            step_counts=tuple(shard.status().step_counts),
            counters=(shard.sequence, shard.history.num_steps, shard.history.num_skipped),
        )

    def buffers(self) -> list[Tensor]:
        """A copy of every buffer of every shard, padding included."""
        extents = (extent for shard in self.group.shards for extent in shard.buffers.extents)
        return [buffer.clone() for extent in extents for buffer in extent.slots.values()]


def initial_state(problem: Problem) -> StateSource:
    """The problem's initial parameters, to load."""
    return state_source({(i, MASTER.name): problem.initial(i) for i in range(len(problem.tensors))})


def state_source(values: Mapping[tuple[int, str], Tensor], **fields: Any) -> StateSource:
    """A state to load from whole tensors, by (parameter index, slot)."""
    held = HeldPieces([{(param, slot, 0): value.reshape(-1) for (param, slot), value in values.items()}])
    return StateSource(read=held.read, available=held.available, **fields)


def views(layout: Layout, flat: Sequence[Tensor]) -> list[Tensor]:
    """Each parameter's part of the flat space's tensors, in its shape."""
    found = {}
    for extent, part in zip(layout.extents, flat, strict=True):
        for index, first in zip(extent.params, extent.first_tile.tolist(), strict=False):
            param = layout.params[index]
            found[index] = part[first * TILE_NUMEL :][: param.numel].view(param.shape)
    return [found[index] for index in range(len(layout.params))]


def flatten(layout: Layout, values: Mapping[int, Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Lay tensors out in the flat space, an extent each; ``dtype`` None for the state's. Zero where there is none."""
    flat = [torch.zeros(extent.padded_numel, dtype=dtype or extent.dtype) for extent in layout.extents]
    places = views(layout, flat)
    for index, value in values.items():
        places[index].copy_(value)
    return flat


def cut(layout: Layout, flat: Sequence[Tensor], shard: int, num_shards: int) -> list[Tensor]:
    """A shard's part of the flat space's tensors."""
    ranges = (extent.tile_range(shard, num_shards) for extent in layout.extents)
    return [part[r.start * TILE_NUMEL : r.stop * TILE_NUMEL] for part, r in zip(flat, ranges, strict=True)]


@dataclasses.dataclass(frozen=True)
class ReferenceRun:
    """What :func:`run_reference` leaves; ``path`` holds the parameters before each step, in float32."""

    optimizer: torch.optim.Optimizer
    params: list[Tensor]
    path: list[list[Tensor]]


Build = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Makes an optimizer of parameter groups."""


def run_reference(
    problem: Problem,
    build: Build,
    num_steps: int,
    *,
    dtype: torch.dtype | None = None,
    schedule: Schedule = cosine,
    options: Sequence[Mapping[str, object]] = (),
    adjust_gradients: Callable[[Sequence[nn.Parameter], int], None] = lambda params, step: None,
) -> ReferenceRun:
    """The problem through a torch optimizer, in one process.

    Args:
        problem: What to train.
        build: Makes the optimizer.
        num_steps: How many steps.
        dtype: Of parameters and gradients; None for the problem's.
        schedule: Of the hyperparameters.
        options: Keys that differ by parameter group.
        adjust_gradients: Called with the parameters and the step when the step's gradients are there.
    """
    params = problem.parameters(dtype)
    optimizer = build(problem.param_groups(params, options))
    path = []
    for step in range(num_steps):
        path.append([param.detach().to(torch.float32, copy=True) for param in params])
        schedule(optimizer.param_groups, step)
        problem.set_gradients(params, step)
        adjust_gradients(params, step)
        optimizer.step()
    return ReferenceRun(optimizer, [param.detach() for param in params], path)


def assert_same_tensors(actual: Iterable[Tensor], expected: Iterable[Tensor], what: str = "tensor") -> None:
    """Equal to the bit."""
    for index, (left, right) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(left, right), f"{what} {index} differs by up to {(left - right).abs().max()}"


def assert_same_state(actual: State, expected: State) -> None:
    """Equal to the bit: every slot of every parameter, scalars, step counts, counters."""
    assert actual.scalars == expected.scalars
    assert actual.step_counts == expected.step_counts
    assert actual.counters == expected.counters
    assert actual.slots.keys() == expected.slots.keys()
    for name, tensors in expected.slots.items():
        assert_same_tensors(actual.slots[name], tensors, what=f"{name} of parameter")
