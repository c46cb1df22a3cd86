"""Under Ray Train: a checkpoint of Train's that is the service's too, and a restart that goes back to it.

Train starts all workers again when one fails, or when it goes on with another number of them; the service lives on and
stands where it stood. See *Note: Workers that are gone* in docs/design.md, and docs/trainers/ray-train.md for the loop.
"""

from __future__ import annotations

from typing import Any

import pyarrow.fs
import ray.train
import ray.train.collective

from ..server.service import Service, connect, end, launch
from ..sharding.errors import (
    CheckpointError,
    NotRegisteredError,
    ServiceExistsError,
    ServiceNotFoundError,
    ShardLostError,
)
from ..sharding.folder import step_uri
from .object_store import RECOVERY_TIMEOUT_S
from .optimizer import ServiceOptimizer
from .patience import Patience

_SCHEMES = {"local": "", "s3": "s3://", "gcs": "gs://", "abfs": "abfs://"}
"""What fsspec calls pyarrow's file systems, by the names that those have."""


def resume(name: str, checkpoint: ray.train.Checkpoint | None, *, roll_back: bool = True, **launching: Any) -> Service:
    """Have the service stand where the loop is to begin, whoever trained with it before.

    Called by every worker, before it makes its optimizer with the service that is returned; the loop then begins at
    ``optimizer.num_steps``. A service that is not there is launched. The workers before these, who may have been
    killed, are dismissed; these may be of another number.

    Args:
        name: The service's name. It is this run's alone, as what it holds is given up for what the checkpoint holds.
        checkpoint: What :func:`report` has reported, as ``ray.train.get_checkpoint()`` gives it: the service is
            restored from it. None: there is none yet, and the service is launched anew.
        roll_back: Whether steps after the checkpoint are undone: they are to be taken again, from whatever else the
            checkpoint holds of the loop. False, for a loop whose steps follow from their number alone, data and
            schedule among it: it goes on after the last step that the service has taken. Only with a service that has
            lost its state it goes back then.
        launching: As for :func:`stepwell.launch`, if the service is to be launched.

    Raises:
        CheckpointError: If the checkpoint cannot be read.
        PlacementError: If the cluster has no room for the shards.
        ServiceError: If the service cannot be reached.
    """
    uri = None if checkpoint is None else _uri(checkpoint.filesystem, checkpoint.path)
    if ray.train.get_context().get_world_rank() == 0:
        _take_over(name, uri, roll_back=roll_back, **launching)
    ray.train.collective.barrier()
    return connect(name)


def report(
    optimizer: ServiceOptimizer,
    metrics: dict[str, Any],
    checkpoint: ray.train.Checkpoint | None = None,
    **options: Any,
) -> None:
    """Have the service save, and report that to Train as a checkpoint.

    Called by every worker after the same step, in place of ``ray.train.report``. The shards write into the very folder
    that becomes Train's checkpoint, so ``CheckpointConfig`` says how long it stays; workers and shards must all reach
    ``RunConfig(storage_path=...)``. Returns when it is complete.

    Args:
        optimizer: This worker's.
        metrics: As ``ray.train.report`` takes them.
        checkpoint: What the loop itself wants to keep, a folder that Train copies to the same place. None: nothing.
        options: Others of ``ray.train.report``.

    Raises:
        CheckpointError: If it cannot be written.
    """
    context = ray.train.get_context()
    storage = context.get_storage()
    name = step_uri("", optimizer.num_steps)
    if context.get_world_rank() == 0:
        path = storage.build_checkpoint_path_from_name(name)
        # Nobody takes a step meanwhile: that would need this rank, too.
        optimizer.service.save(_uri(storage.storage_filesystem, path))
        if checkpoint is None:
            checkpoint = ray.train.Checkpoint(path, storage.storage_filesystem)
            options["checkpoint_upload_mode"] = ray.train.CheckpointUploadMode.NO_UPLOAD
    ray.train.report(metrics, checkpoint, checkpoint_dir_name=name, **options)


def _take_over(name: str, uri: str | None, *, roll_back: bool, **launching: Any) -> None:
    """What rank 0 does for all."""
    try:
        service = connect(name)
    except ServiceNotFoundError:
        launch(name, restore=uri, **launching)
        return
    except ServiceExistsError:  # who launched it was killed half-way
        _launch_anew(name, uri, **launching)
        return
    is_lost = False
    try:
        _dismiss(service)
    except NotRegisteredError:
        if uri is None:
            return  # it is new
    except ShardLostError:
        is_lost = True
    else:
        if not roll_back:
            return
    if uri is None:
        _launch_anew(name, uri, **launching)
        return
    service.restore(uri)
    if is_lost:
        _dismiss(service)


def _dismiss(service: Service) -> None:
    """Dismiss the workers, once shards are there that are being brought back."""
    limit_s = RECOVERY_TIMEOUT_S if service.config.redundancy else 0.0
    Patience(limit_s, f"service {service.name!r}").go_on_with(service.dismiss_workers)


def _launch_anew(name: str, uri: str | None, **launching: Any) -> None:
    end(name)
    launch(name, restore=uri, **launching)


def _uri(filesystem: pyarrow.fs.FileSystem, path: str) -> str:
    """What fsspec, and so the shards, call a place in Train's storage.

    Raises:
        CheckpointError: If they have no name for it.
    """
    scheme = _SCHEMES.get(filesystem.type_name)
    if scheme is None:
        raise CheckpointError(
            f"{path}: expected Ray Train's storage on one of {', '.join(_SCHEMES)}, got {filesystem.type_name}: give "
            "RunConfig a storage_path, and no storage_filesystem; or call service.save and ray.train.report yourself"
        )
    return scheme + path
