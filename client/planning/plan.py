"""A plan: what a deployment takes on a machine, whether it fits, how long a step takes and what holds it up."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

from ...sharding.coverage import Gradients
from .deployment import Deployment
from .machines import GIB, Machine
from .memory import host_bytes, shard_bytes, worker_bytes
from .step_time import LinkLoad, Part, link_loads, parts_of


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What is to be expected of a deployment.

    Attributes:
        deployment, machine: What was asked.
        shard_bytes: Memory of the largest shard, by what it is for.
        host_bytes: Host memory of a node beside that.
        worker_bytes: A worker's buffers, where its model is.
        links: Bytes over each link in a step.
        parts: A step's time.
        num_calls: Calls from workers to shards in a step, in all.
    """

    deployment: Deployment
    machine: Machine
    shard_bytes: dict[str, int]
    host_bytes: dict[str, int]
    worker_bytes: int
    links: tuple[LinkLoad, ...]
    parts: tuple[Part, ...]
    num_calls: int

    @classmethod
    def of(cls, deployment: Deployment, machine: Machine) -> Plan:
        """The plan of a deployment on machines of one kind."""
        is_gpu = machine.is_gpu
        return cls(
            deployment=deployment,
            machine=machine,
            shard_bytes=shard_bytes(deployment, is_gpu=is_gpu),
            host_bytes=host_bytes(deployment, is_gpu=is_gpu),
            worker_bytes=worker_bytes(deployment),
            links=link_loads(deployment),
            parts=parts_of(deployment, machine),
            num_calls=deployment.spec.world_size * deployment.num_shards,
        )

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return sum(part.seconds for part in self.parts)

    @property
    def bottleneck(self) -> Part:
        """What most of a step's time goes into."""
        return max(self.parts, key=lambda part: part.seconds)

    @property
    def needed_bytes(self) -> int:
        """Memory of the largest shard."""
        return sum(self.shard_bytes.values())

    @property
    def fits(self) -> bool:
        """Whether a shard has that much."""
        return self.needed_bytes <= self.machine.memory_bytes

    def otherwise(self) -> dict[Gradients, Plan]:
        """The same with each other meaning of a gradient: what it would take."""
        own = self.deployment.spec.gradients
        kinds = [kind for kind in get_args(Gradients) if kind != own]
        specs = {kind: dataclasses.replace(self.deployment.spec, gradients=kind) for kind in kinds}
        return {
            kind: Plan.of(dataclasses.replace(self.deployment, spec=spec), self.machine) for kind, spec in specs.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, in bytes and seconds."""
        plan, spec = self.deployment, self.deployment.spec
        return {
            "rule": spec.rule.name,
            "numel": plan.layout.numel,
            "num_tensors": len(spec.params),
            "gradients": spec.gradients,
            "num_shards": plan.num_shards,
            "num_workers": spec.world_size,
            "num_nodes": plan.num_nodes,
            "machine": dataclasses.asdict(self.machine),
            "shard_bytes": self.shard_bytes,
            "needed_bytes": self.needed_bytes,
            "fits": self.fits,
            "host_bytes": self.host_bytes,
            "worker_bytes": self.worker_bytes,
            "links": [dataclasses.asdict(link) for link in self.links],
            "parts": [dataclasses.asdict(part) for part in self.parts],
            "step_s": self.step_s,
            "bottleneck": self.bottleneck.name,
            "calls_per_step": self.num_calls,
            "otherwise": {
                kind: {"step_s": other.step_s, "needed_bytes": other.needed_bytes, "fits": other.fits}
                for kind, other in self.otherwise().items()
            },
        }


def in_gib(size_bytes: float) -> str:
    """Bytes for people."""
    return f"{size_bytes / GIB:,.2f} GiB" if size_bytes >= GIB / 100 else f"{size_bytes / 2**20:,.3f} MiB"


def in_ms(seconds: float) -> str:
    """Seconds for people."""
    return f"{seconds * 1e3:,.2f} ms" if seconds < 10 else f"{seconds:,.1f} s"
