"""Every error of Stepwell.

StepwellError
 ├─ RequestError                 a request was refused; nothing has changed
 │   ├─ MessageError             the bytes are not a request
 │   │   ├─ UnknownVersionError
 │   │   └─ TruncatedMessageError
 │   ├─ NotRegisteredError       the service holds no job yet, or the shard lost it
 │   ├─ JobMismatchError         this model or rule is not the service's job
 │   │   └─ CoverageError        the ranks' parts of a parameter leave a gap or overlap
 │   ├─ UnknownRankError
 │   ├─ RankExcludedError        the job goes on without this rank, as it did not push in time
 │   ├─ IncarnationError         another process has taken this rank's place
 │   ├─ SequenceError            the step number is not the next one
 │   │   ├─ StaleRequestError
 │   │   ├─ FutureRequestError
 │   │   └─ TimelineError        the service was restored or loaded since
 │   ├─ EpochError               the coordinator that asks was replaced by another
 │   ├─ AttemptError             an older try of a step, or one that came while the step was decided
 │   ├─ ShapeMismatchError
 │   └─ DTypeMismatchError
 ├─ HyperparameterError          a parameter group holds a value that the rule cannot use (also a ValueError)
 ├─ UnsupportedParameterError    sparse, complex or integer parameters (also a TypeError)
 ├─ StepAbortedError             the step was given up on all shards; nothing has changed
 │   └─ MissingRankError
 ├─ NonFiniteGradientError       the step was skipped on all shards, and the caller asked to be told
 ├─ KernelError                  kernels cannot be compiled here as the job asks for
 ├─ CheckpointError              a checkpoint is missing, damaged, or cannot be written
 │   └─ CheckpointAccessError    the file system does not let it be read; it may be whole
 └─ ServiceError                 the service cannot be reached or started
     ├─ ServiceNotFoundError
     ├─ ServiceExistsError
     ├─ PlacementError           the cluster has no room for the shards
     ├─ ServiceTimeoutError      a wait ran out; the message names it
     ├─ SegmentError             memory that a worker and a shard share cannot be had, or not be reached
     ├─ ShardsMovedError         other shards have taken the place of those that were asked
     └─ ShardLostError           a shard died, and may come back
         └─ CheckpointRestoreNeededError    nobody has what it held; the message names the last checkpoint

Each message says what was expected, what came and what to do. An error carries its message alone, so that it crosses
process boundaries unchanged.
"""

from __future__ import annotations


class StepwellError(Exception):
    """The root of the tree."""


class RequestError(StepwellError):
    """A request was refused; nothing has changed."""


class MessageError(RequestError):
    """The bytes are not a request of this service."""


class UnknownVersionError(MessageError):
    """The message is of a version that this process does not speak."""


class TruncatedMessageError(MessageError):
    """The message ends before it is complete."""


class NotRegisteredError(RequestError):
    """The service holds no job yet, or the shard lost it."""


class JobMismatchError(RequestError):
    """This model or rule is not the service's job."""


class CoverageError(JobMismatchError):
    """The parts of a sharded parameter that the ranks hold leave a gap, or overlap."""


class UnknownRankError(RequestError):
    """The rank is not one of the job's."""


class RankExcludedError(RequestError):
    """The elastic job goes on without this rank, as it did not push in time."""


class IncarnationError(RequestError):
    """Another process has taken this rank's place."""


class SequenceError(RequestError):
    """The step number is not the next one."""


class StaleRequestError(SequenceError):
    """The step is long decided."""


class FutureRequestError(SequenceError):
    """The step before this one was not decided yet."""


class TimelineError(SequenceError):
    """The service was restored or loaded since the sender last heard from it."""


class EpochError(RequestError):
    """The coordinator that asks was replaced: another one has taken the service over since."""


class AttemptError(RequestError):
    """An older try of this step, or one that came while the step was being decided."""


class ShapeMismatchError(RequestError):
    """A gradient or mask has not the length that the layout says."""


class DTypeMismatchError(RequestError):
    """A gradient has a dtype that cannot be averaged."""


class HyperparameterError(StepwellError, ValueError):
    """A parameter group holds a value that the rule cannot use."""


class UnsupportedParameterError(StepwellError, TypeError):
    """A parameter that cannot be kept in the flat space: sparse, complex, quantized or integer."""


class StepAbortedError(StepwellError):
    """The step was given up on all shards; nothing has changed and it may be tried again."""


class MissingRankError(StepAbortedError):
    """The step was given up because a rank did not push in time."""


class NonFiniteGradientError(StepwellError):
    """The averaged gradient held inf or NaN; the step was skipped on all shards."""


class KernelError(StepwellError):
    """Kernels cannot be compiled here as the job asks for."""


class CheckpointError(StepwellError):
    """A checkpoint is missing, damaged, or cannot be written."""


class CheckpointAccessError(CheckpointError):
    """The file system does not let a checkpoint be read; it may be whole."""


class ServiceError(StepwellError):
    """The service cannot be reached or started."""


class ServiceNotFoundError(ServiceError):
    """There is no service of this name."""


class ServiceExistsError(ServiceError):
    """There is a service of this name already."""


class PlacementError(ServiceError):
    """The cluster has no room for the shards."""


class ServiceTimeoutError(ServiceError):
    """A wait ran out."""


class SegmentError(ServiceError):
    """Memory that a worker and a shard of one node share cannot be had, or not be reached."""


class ShardsMovedError(ServiceError):
    """Other shards have taken the place of those that were asked, with all that they held; ask again."""


class ShardLostError(ServiceError):
    """A shard died; where somebody has what it held it comes back."""


class CheckpointRestoreNeededError(ShardLostError):
    """More was lost at once than the redundancy survives; the message names the last checkpoint, to be restored."""
