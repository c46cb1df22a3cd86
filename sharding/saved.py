"""Which checkpoint was written last, so that ranks which ask for the same one get it once."""

from __future__ import annotations

import dataclasses
import hashlib

from .errors import CheckpointError
from .folder import manifest_bytes
from .job import JobSpec
from .reports import ShardStatus


@dataclasses.dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """A checkpoint and the moment that it is of.

    Attributes:
        uri: Where it is.
        spec: The job, which a parameter group may be added to.
        timeline, sequence, step: Where the shards stood.
        digest: Of its manifest, see :func:`manifest_digest`.
    """

    uri: str
    spec: JobSpec
    timeline: int
    sequence: int
    step: int
    digest: str

    @classmethod
    def just_written(cls, uri: str, spec: JobSpec, status: ShardStatus) -> SavedCheckpoint:
        """The checkpoint at ``uri``, just written by shards at ``status``."""
        return cls(uri, spec, status.timeline, status.sequence, status.step, manifest_digest(uri))

    def serves(self, uri: str, spec: JobSpec, status: ShardStatus) -> bool:
        """Whether a save to ``uri`` by shards at ``status`` would write the same again, and it is still there."""
        wanted = (uri, spec, status.timeline, status.sequence)
        if wanted != (self.uri, self.spec, self.timeline, self.sequence):
            return False
        try:
            return manifest_digest(uri) == self.digest
        except CheckpointError:
            return False


def manifest_digest(uri: str) -> str:
    """The SHA-256 of a checkpoint's manifest, which names its files: two saves never have the same.

    Raises:
        CheckpointError: If there is none, or it cannot be read.
    """
    return hashlib.sha256(manifest_bytes(uri)).hexdigest()
