"""A checkpoint's folder, and a run's folder of checkpoints: what is in there, what is complete, what is removed when.

Files get names of their own for each save and the manifest is renamed into place last, so that a save which is cut
short leaves the checkpoint that was there before.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re

from .errors import CheckpointAccessError, CheckpointError
from .files import TEMPORARY, list_names, read_file, remove_file, remove_folder, size_of, write_file
from .manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileEntry, Manifest, is_shard_file


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        uri: Where it lies.
        step: The number of steps in it.
        saved_at: When it was written, in seconds since 1970 by the writer's clock.
        size_bytes: Of its tensor files.
        rule: The update rule's name.
    """

    uri: str
    step: int
    saved_at: float
    size_bytes: int
    rule: str


def manifest_bytes(uri: str) -> bytes:
    """A checkpoint's manifest as it lies there.

    Raises:
        CheckpointError: If there is none.
        CheckpointAccessError: If it cannot be read.
    """
    try:
        return read_file(uri, MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise CheckpointError(f"{uri}: there is no complete checkpoint here ({MANIFEST_NAME} is missing)") from error
    except OSError as error:
        raise _unreadable(uri, error) from error
    except ValueError as error:
        raise CheckpointError(f"{uri}: the manifest is damaged ({error}); use another checkpoint") from error


def read_manifest(uri: str) -> Manifest:
    """Read a checkpoint's manifest, without a look at its files.

    Raises:
        CheckpointError: If there is none, or it is damaged.
    """
    return Manifest.unpack(manifest_bytes(uri), uri)


def read_complete(uri: str) -> Manifest:
    """As :func:`read_manifest`; and see that its files are there, with the size that they should have.

    Raises:
        CheckpointError: If there is none, or something is missing or damaged.
        CheckpointAccessError: If that cannot be told.
    """
    manifest = read_manifest(uri)
    for entry in manifest.files:
        problem = size_problem(uri, entry)
        if problem is not None:
            raise CheckpointError(f"{uri}: {entry.name} {problem}; use another checkpoint")
    return manifest


def size_problem(uri: str, entry: FileEntry) -> str | None:
    """What is wrong with a file as far as its size tells; None if nothing is.

    Raises:
        CheckpointAccessError: If the file system does not say.
    """
    try:
        found = size_of(uri, entry.name)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        raise _unreadable(posixpath.join(uri, entry.name), error) from error
    if found == entry.size_bytes:
        return None
    return (
        f"was {'cut short' if found < entry.size_bytes else 'added to'}: expected {entry.size_bytes} bytes, got {found}"
    )


def is_of_save(uri: str, save_id: str) -> bool:
    """Whether the checkpoint at ``uri`` is the one that the save of this name wrote.

    Raises:
        CheckpointAccessError: If that cannot be told.
    """
    try:
        manifest = read_manifest(uri)
    except CheckpointAccessError:
        raise
    except CheckpointError:
        return False
    return any(entry.name.startswith(f"{save_id}-") for entry in manifest.files)


def write_manifest(uri: str, manifest: Manifest) -> None:
    """Complete a checkpoint: write its manifest, and remove what other saves have left in its folder.

    Raises:
        CheckpointError: If it cannot be written.
    """
    packed = manifest.pack()
    if len(packed) > MAX_MANIFEST_BYTES:
        raise CheckpointError(
            f"{uri}: the manifest of {len(manifest.pieces)} pieces would have {len(packed)} bytes, expected at most "
            f"{MAX_MANIFEST_BYTES}; use fewer shards, or larger chunks. What was there before is as it was"
        )
    try:
        with write_file(uri, MANIFEST_NAME) as stream:
            stream.write(packed)
    except OSError as error:
        raise CheckpointError(
            f"{uri}: the manifest cannot be written ({error}); free or mend that place, or save to another. "
            "What was there before is as it was"
        ) from error
    remove_leftovers(uri, kept={entry.name for entry in manifest.files})


def remove_leftovers(uri: str, *, kept: set[str]) -> None:
    """Remove all files of saves from a checkpoint's folder but some; what is none of ours stays."""
    try:
        names = list_names(uri)
    except OSError:
        return  # the next save that succeeds does it
    for name in names:
        if (is_shard_file(name) and name not in kept) or name == MANIFEST_NAME + TEMPORARY:
            remove_file(uri, name)


# A run's folder of checkpoints


@dataclasses.dataclass(frozen=True, slots=True)
class Destination:
    """Where a checkpoint goes.

    Attributes:
        uri: Its own folder.
        folder_uri: The run's folder that it is in, if older ones there are to be removed.
        num_kept: How many stay then.
    """

    uri: str
    folder_uri: str = ""
    num_kept: int = 0

    @classmethod
    def of(cls, uri: str, keep_last: int | None, step: int) -> Destination:
        """What ``service.save(uri, keep_last=...)`` means for the checkpoint of a step."""
        require_keep_last(keep_last)
        return cls(uri) if keep_last is None else cls(step_uri(uri, step), uri, keep_last)

    def complete(self, manifest: Manifest) -> None:
        """Write the manifest, and then remove what is not kept.

        Raises:
            CheckpointError: If the manifest cannot be written; nothing is removed.
        """
        write_manifest(self.uri, manifest)
        if self.num_kept:
            remove_all_but_last(self.folder_uri, self.num_kept, newest_uri=self.uri)


def require_keep_last(num_kept: int | None) -> None:
    """Refuse to keep no checkpoint.

    Raises:
        ValueError: If the number is less than 1.
    """
    if num_kept is not None and num_kept < 1:
        raise ValueError(f"keep_last: expected at least 1, got {num_kept}")


def step_uri(folder_uri: str, step: int) -> str:
    """Where a checkpoint lies in a run's folder."""
    return posixpath.join(folder_uri, f"step-{step:08d}")


def list_checkpoints(uri: str) -> list[Checkpoint]:
    """The complete checkpoints in a run's folder, the one that was written last at the end.

    Args:
        uri: The run's folder; or that of a single checkpoint, which is listed alone.

    Raises:
        CheckpointAccessError: If it cannot be told which are complete.
    """
    found = [_look_at(candidate) for candidate in (uri, *_step_uris(uri))]
    return sorted((each for each in found if each is not None), key=lambda each: (each.saved_at, each.step))


def remove_all_but_last(folder_uri: str, num_kept: int, *, newest_uri: str) -> None:
    """Remove what a run's folder holds beside its last complete checkpoints, leftovers of interrupted saves among it.

    Called when the newest checkpoint is complete. A folder that holds something else too keeps that.

    Args:
        folder_uri: The run's folder.
        num_kept: How many checkpoints stay, 1 at least.
        newest_uri: The one that was just written, which stays whatever its clock says.
    """
    try:
        complete = [each.uri for each in list_checkpoints(folder_uri) if each.uri not in (folder_uri, newest_uri)]
        uris = _step_uris(folder_uri)
    except CheckpointAccessError:
        return  # what cannot be read may be whole; the next save that succeeds does it
    kept = {newest_uri, *complete[max(len(complete) - num_kept + 1, 0) :]}
    for uri in uris:
        if uri not in kept:
            _remove_checkpoint(uri)


def _remove_checkpoint(uri: str) -> None:
    """Remove a checkpoint, its manifest first: there is none from there on, rather than half of one."""
    remove_file(uri, MANIFEST_NAME)
    try:
        is_gone = MANIFEST_NAME not in list_names(uri)
    except OSError:
        return
    if is_gone:
        remove_leftovers(uri, kept=set())
        remove_folder(uri)


def _step_uris(folder_uri: str) -> list[str]:
    try:
        names = list_names(folder_uri)
    except OSError as error:
        raise _unreadable(folder_uri, error) from error
    return [posixpath.join(folder_uri, name) for name in names if re.fullmatch(r"step-\d+", name)]


def _unreadable(what: str, error: OSError) -> CheckpointAccessError:
    return CheckpointAccessError(f"{what}: cannot be read ({error}); mend that place and try again")


def _look_at(uri: str) -> Checkpoint | None:
    """What lies at a URI, if that is a complete checkpoint."""
    try:
        manifest = read_complete(uri)
    except CheckpointAccessError:
        raise
    except CheckpointError:
        return None
    return Checkpoint(uri, manifest.step, manifest.saved_at, manifest.size_bytes, manifest.spec.rule.name)
