"""The flat space and its shards: layout, resharding, exact sums, one step, the checkpoint format, the errors.

Knows no Ray and no sockets, and no threads but the one that writes a :class:`Snapshot`. A :class:`Shard` owns a part of
a :class:`JobSpec`'s flat space; :class:`ShardGroup` drives several of them in one process, `stepwell.server` as actors.
"""

from .buffers import MASTER, StateSource
from .checkpoint import CheckpointReader, write_shard
from .errors import StepwellError
from .folder import read_complete, write_manifest
from .inprocess import ShardGroup
from .job import JobSpec
from .layout import Layout, ParamSpec
from .manifest import Manifest, ShardFile
from .push import Push, PushHeader, pack_present, unpack_present
from .reports import Receipt, ShardStatus, StepResult
from .running import Reduction
from .shard import Shard
from .snapshot import Snapshot
from .vote import Decision

__all__ = [
    "MASTER",
    "CheckpointReader",
    "Decision",
    "JobSpec",
    "Layout",
    "Manifest",
    "ParamSpec",
    "Push",
    "PushHeader",
    "Receipt",
    "Reduction",
    "Shard",
    "ShardFile",
    "ShardGroup",
    "ShardStatus",
    "Snapshot",
    "StateSource",
    "StepResult",
    "StepwellError",
    "pack_present",
    "read_complete",
    "unpack_present",
    "write_manifest",
    "write_shard",
]
