"""What machines are capable of: GPUs by name, hosts, networks, and what a step costs whatever its size.

Sources of all numbers: docs/planning.md.
"""

from __future__ import annotations

import dataclasses

from .names import named

GIB = 2**30


@dataclasses.dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU.

    Attributes:
        memory_bytes: Its memory.
        bytes_per_s: Its memory's bandwidth by its data sheet.
        link_bytes_per_s: To its host, one way, by its data sheet.
    """

    memory_bytes: int
    bytes_per_s: float
    link_bytes_per_s: float


GPUS = {
    "v100": Gpu(32 * GIB, 0.900e12, 16e9),
    "a10g": Gpu(24 * GIB, 0.600e12, 32e9),
    "a100-40gb": Gpu(40 * GIB, 1.555e12, 32e9),
    "a100-80gb": Gpu(80 * GIB, 2.039e12, 32e9),
    "l4": Gpu(24 * GIB, 0.300e12, 32e9),
    "l40s": Gpu(48 * GIB, 0.864e12, 32e9),
    "h100": Gpu(80 * GIB, 3.35e12, 64e9),
    "h100-pcie": Gpu(80 * GIB, 2.0e12, 64e9),
    "h200": Gpu(141 * 10**9, 4.8e12, 64e9),
    "b200": Gpu(180 * 10**9, 8.0e12, 64e9),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Latency:
    """What a step takes whatever its size, in seconds. Measured on two cores, see docs/planning.md.

    Attributes:
        step_s: With one shard and one worker, in a service: Ray there and back, threads, Python.
        shard_s: For each further shard that a worker calls.
        worker_s: For each further worker that a shard is called by.
        hop_s: For each neighbour in the ring of an all-reduce: it goes around twice.
        tensor_s: For each tensor.
        keeper_s: Until a keeper has a step's pushes.
    """

    step_s: float = 8e-3
    shard_s: float = 0.1e-3
    worker_s: float = 0.3e-3
    hop_s: float = 0.1e-3
    tensor_s: float = 10e-6
    keeper_s: float = 4.5e-3


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """One node and what connects it.

    Attributes:
        name: What it is.
        memory_bytes: What one shard may take, of its device or of its host's memory.
        bytes_per_s: What torch's fused AdamW gets of the memory that the state lies in: of a GPU, or of all cores
            together.
        host_bytes_per_s: The same of the host's memory.
        is_gpu: Whether shards and workers have a GPU each.
        link_bytes_per_s: Between a GPU and its host, one way; of no account without.
        network_bytes_per_s: Between two nodes, one way, as far as it is reached.
        store_bytes_per_s: Through Ray's object store, of one process, one way.
        latency: See there.
    """

    name: str
    memory_bytes: int
    bytes_per_s: float
    host_bytes_per_s: float
    is_gpu: bool
    link_bytes_per_s: float
    network_bytes_per_s: float
    store_bytes_per_s: float
    latency: Latency


REACHED = 0.85
"""Of a data sheet's bandwidth; of a network's and a link's too."""

HOST_BYTES_PER_S = 200e9
"""What a server's memory is taken for."""

STORE_BYTES_PER_S = 7.2e9


def gpu_named(name: str) -> Gpu:
    """A GPU.

    Raises:
        ValueError: If none of this name is known; the message has the nearest ones.
    """
    return GPUS[named({"a100": "a100-80gb"}.get(name.casefold(), name), GPUS, what="GPU")]


def with_gpu(name: str, network_gbps: float, memory_gib: float | None = None) -> Machine:
    """Nodes with GPUs of a kind.

    Args:
        name: Of the GPU.
        network_gbps: Gigabits per second of a node's network, one way.
        memory_gib: What one shard may take; None for all of its GPU.
    """
    gpu = gpu_named(name)
    return Machine(
        name=name,
        memory_bytes=gpu.memory_bytes if memory_gib is None else int(memory_gib * GIB),
        bytes_per_s=REACHED * gpu.bytes_per_s,
        host_bytes_per_s=HOST_BYTES_PER_S,
        is_gpu=True,
        link_bytes_per_s=REACHED * gpu.link_bytes_per_s,
        network_bytes_per_s=REACHED * network_gbps * 1e9 / 8,
        store_bytes_per_s=STORE_BYTES_PER_S,
        latency=Latency(),
    )


def without_gpu(memory_gib: float, network_gbps: float, host_bytes_per_s: float = HOST_BYTES_PER_S) -> Machine:
    """Nodes whose shards keep the state in the host's memory; arguments as for :func:`with_gpu`."""
    return Machine(
        name="CPU",
        memory_bytes=int(memory_gib * GIB),
        bytes_per_s=host_bytes_per_s,
        host_bytes_per_s=host_bytes_per_s,
        is_gpu=False,
        link_bytes_per_s=float("inf"),
        network_bytes_per_s=REACHED * network_gbps * 1e9 / 8,
        store_bytes_per_s=STORE_BYTES_PER_S,
        latency=Latency(),
    )
