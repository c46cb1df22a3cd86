"""What is planned: a job, its shards, and where they and the workers stand."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import torch

from ...optim import ReducingRule
from ...sharding.job import JobSpec
from ...sharding.kernels import MAX_PARTS
from ...sharding.layout import Layout, ParamSpec, dtype_from_name, wire_dtype
from ...sharding.push import GRADIENT_DTYPES
from ...sharding.tables import Tables
from .names import named

HEAD_NUMEL = 128
TENSORS_PER_LAYER = 9
DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment:
    """A service that may be launched. Shards stand on the workers' nodes, spread over them.

    Attributes:
        spec: The job; its world size is the number of workers.
        num_shards: Shards.
        workers_per_node: Workers of each node.
        shards_per_node: Shards of each node.
        gradient_dtype: What gradients are sent in; None for the model's dtype.
        redundancy: Copies of each shard, as a service has them.
        log_steps: Steps that are kept for a lost shard.
        overlap: Whether gradients are copied within backward.

    Raises:
        ValueError: If a number is out of range; the message holds it.
    """

    spec: JobSpec
    num_shards: int
    workers_per_node: int = 8
    shards_per_node: int = 1
    gradient_dtype: torch.dtype | None = None
    redundancy: int = 0
    log_steps: int = 8
    overlap: bool = False

    def __post_init__(self) -> None:
        for name in ("num_shards", "workers_per_node", "shards_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.redundancy < 0:
            raise ValueError(f"redundancy: expected 0 or more, got {self.redundancy}")
        if self.gradient_dtype is not None and self.gradient_dtype not in GRADIENT_DTYPES:
            raise ValueError(f"gradient_dtype: expected one of {GRADIENT_DTYPES}, got {self.gradient_dtype}")

    @property
    def num_nodes(self) -> int:
        """Nodes."""
        workers = math.ceil(self.spec.world_size / self.workers_per_node)
        return max(workers, math.ceil(self.num_shards / self.shards_per_node))

    @property
    def far_share(self) -> float:
        """Of what a worker exchanges with all shards, the part that goes to other nodes."""
        return 1.0 - min(self.shards_per_node / self.num_shards, 1.0)

    @functools.cached_property
    def layout(self) -> Layout:
        """The job's flat space."""
        return self.spec.layout()

    @functools.cached_property
    def tables(self) -> Tables:
        """What every step reads."""
        return Tables.build(self.spec, self.layout)

    @functools.cached_property
    def largest_shard(self) -> int:
        """The shard that owns the most tiles."""
        return max(range(self.num_shards), key=self._num_tiles)

    def _num_tiles(self, shard: int) -> int:
        return sum(len(extent.tile_range(shard, self.num_shards)) for extent in self.layout.extents)

    @property
    def num_sums(self) -> int:
        """Sums of the rule's reduction; 0 without one."""
        return len(self.spec.rule.sums) if isinstance(self.spec.rule, ReducingRule) else 0

    @property
    def num_parts(self) -> int:
        """How many ranks' gradients are averaged in each element."""
        return self.spec.world_size if self.spec.gradients == "local" else 1

    @property
    def is_written_out(self) -> bool:
        """Whether a shard writes the step's gradient down before the passes: of many ranks, or put together of parts.

        What a rank holds of a sharded model begins anywhere in a tile.
        """
        return self.num_parts > MAX_PARTS or self.spec.gradients == "sharded"

    def gradient_itemsize(self, extent: int) -> int:
        """Bytes of a gradient's element on its way."""
        return (self.gradient_dtype or wire_dtype(self.layout, self.layout.extents[extent])).itemsize

    def param_itemsize(self, extent: int) -> int:
        """Bytes of a parameter's element on its way."""
        return wire_dtype(self.layout, self.layout.extents[extent]).itemsize

    @property
    def gradient_bytes(self) -> int:
        """One gradient of the whole model on its way, padding included."""
        each = enumerate(self.layout.extents)
        return sum(extent.padded_numel * self.gradient_itemsize(index) for index, extent in each)

    @property
    def param_bytes(self) -> int:
        """The whole model's parameters on their way, padding included."""
        return sum(extent.padded_numel * self.param_itemsize(index) for index, extent in enumerate(self.layout.extents))


def dtype_named(text: str) -> str:
    """The name of a parameter's dtype.

    Raises:
        ValueError: If it is none that parameters have.
    """
    name = DTYPE_ALIASES.get(text.casefold(), text)
    return named(name, ("float16", "bfloat16", "float32", "float64"), what="dtype")


def wire_dtype_named(text: str | None) -> torch.dtype | None:
    """The dtype that gradients are sent in; None for the model's. Raises as :func:`dtype_named`."""
    return None if text is None else dtype_from_name(dtype_named(text))


def model_of(numel: int, dtype: str, num_tensors: int | None = None) -> tuple[ParamSpec, ...]:
    """Parameters like a decoder's, of ``numel`` elements in all.

    A decoder of L layers of width w has about 12 L w^2 parameters; L = w / 128 for common ones, in 9 tensors a layer.

    Args:
        numel: Elements.
        dtype: The model's dtype, by name.
        num_tensors: How many tensors; None for those of a decoder. They are of equal size, one row of 2 channels each.

    Raises:
        ValueError: If there is not an element for each.
    """
    if num_tensors is None:
        width = (numel * HEAD_NUMEL / 12) ** (1 / 3)
        num_tensors = max(1, min(TENSORS_PER_LAYER * round(width / HEAD_NUMEL), numel))
    if not 1 <= num_tensors <= numel:
        raise ValueError(f"tensors: expected 1 to {numel}, one element in each at least, got {num_tensors}")
    edges = [numel * index // num_tensors for index in range(num_tensors + 1)]
    return tuple(ParamSpec("", (stop - start,), dtype, group=0) for start, stop in itertools.pairwise(edges))
