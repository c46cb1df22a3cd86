"""Finding the service that an optimizer is to use."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgpack
import torch
import torch.distributed as dist

from ..server.config import default_service, use_token
from ..sharding.compiling import KernelChoice
from ..sharding.errors import JobMismatchError, ServiceError, ServiceNotFoundError, StepwellError
from .inprocess import InProcessService, InProcessTransport
from .transport import Transport

if TYPE_CHECKING:
    from ..server.service import Service

ANNOUNCEMENT_BYTES = 4096


def resolve_ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """This worker's rank and the number of workers: as given, else torch.distributed's, else 0 and 1.

    Raises:
        ValueError: If only one is given, or they do not fit.
    """
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank and world_size: expected both or neither, got {rank} and {world_size}")
    if rank is None or world_size is None:
        initialized = dist.is_available() and dist.is_initialized()
        return (dist.get_rank(), dist.get_world_size()) if initialized else (0, 1)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
    return rank, world_size


def resolve_service(
    service: str | Service | InProcessService | None,
    *,
    rank: int,
    world_size: int,
    num_shards: int | None,
    kernel: KernelChoice | None,
    device: torch.device,
) -> Transport:
    """The line to ``service``; see :class:`stepwell.ServiceOptimizer` for what it may be.

    Raises:
        ServiceNotFoundError: If no service of this name is found.
        JobMismatchError: If the service cannot serve so many workers.
        ValueError: If ``num_shards`` or ``kernel`` is given for a service that has its own.
    """
    wanted = service or default_service() or ("inprocess" if world_size == 1 else "embedded")
    for name, given in (("num_shards", num_shards), ("kernel", kernel)):
        if given is not None and wanted not in ("inprocess", "embedded"):
            raise ValueError(f"{name}: expected None, as service {wanted!r} has its own, got {given!r}")
    if isinstance(wanted, InProcessService):
        return InProcessTransport(wanted)
    if wanted == "inprocess":
        if world_size != 1:
            raise JobMismatchError(
                f"service 'inprocess' is for one worker, got world_size {world_size}; leave service out"
            )
        wanted_shards = 1 if num_shards is None else num_shards
        return InProcessTransport(InProcessService(num_shards=wanted_shards, device=device, kernel=kernel))
    from .object_store import ObjectStoreTransport

    if wanted == "embedded":
        wanted_shards = world_size if num_shards is None else num_shards
        return ObjectStoreTransport(_embedded(rank, world_size, wanted_shards, kernel), owned=rank == 0)
    if isinstance(wanted, str):
        from ..server.service import connect

        return ObjectStoreTransport(connect(wanted))
    return ObjectStoreTransport(wanted)


def _embedded(rank: int, world_size: int, num_shards: int, kernel: KernelChoice | None) -> Service:
    """Rank 0 starts the shards and announces them over torch.distributed; the others of its host join."""
    from ..server.cluster import describe_for_peers
    from ..server.service import connect, launch

    if world_size > 1 and not (dist.is_available() and dist.is_initialized()):
        raise ServiceNotFoundError(
            "an embedded service with several workers needs torch.distributed to announce itself: call "
            "init_process_group first, or start a service with `stepwell up NAME` and pass service=NAME"
        )
    if rank == 0:
        try:
            service = launch(num_shards=num_shards, num_cpus_per_shard=0, kernel=kernel)
        except StepwellError as error:
            _broadcast({"error": str(error)}, world_size)
            raise
        _broadcast({**describe_for_peers(service.name), "host": socket.gethostname()}, world_size)
        return service
    found = _broadcast({}, world_size)
    if "error" in found:
        raise ServiceError(f"rank 0 could not start the embedded service: {found['error']}")
    if found["host"] != socket.gethostname():
        raise ServiceNotFoundError(
            f"an embedded service serves one host: rank 0 is on {found['host']}, rank {rank} on "
            f"{socket.gethostname()}. Start one for the cluster with `stepwell up NAME` and pass service=NAME"
        )
    if found["token"]:
        use_token(found["token"])
    return connect(found["name"], address=found["address"])


def _broadcast(message: Mapping[str, str], world_size: int) -> dict[str, str]:
    """Send a small message from rank 0 to all; every rank calls it."""
    if world_size == 1:
        return dict(message)
    packed = msgpack.packb(message)
    if len(packed) > ANNOUNCEMENT_BYTES - 4:
        packed = msgpack.packb({"error": "its message was too long to pass on; see rank 0"})
    data = len(packed).to_bytes(4, "big") + packed
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    buffer = torch.zeros(ANNOUNCEMENT_BYTES, dtype=torch.uint8, device=device)
    buffer[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    dist.broadcast(buffer, src=0)
    received = bytes(buffer.cpu().numpy())
    fields: dict[str, str] = msgpack.unpackb(received[4 : 4 + int.from_bytes(received[:4], "big")])
    return fields
