"""A checkpoint's manifest: what there is and where it lies. docs/checkpoint.md describes its bytes.

A checkpoint is keyed by parameter index; how many shards wrote it does not matter to whoever reads it. Files get names
of their own for each save and the manifest is renamed into place last, so that a save which is cut short leaves the
checkpoint that was there before.
"""

from __future__ import annotations

import dataclasses
import logging
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgpack
from fsspec import AbstractFileSystem

from .buffers import MASTER
from .errors import CheckpointError, MessageError
from .files import locate, remove_file, write_file
from .job import JobSpec
from .reports import ShardStatus

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.msgpack"

logger = logging.getLogger("stepwell")


def piece_key(param: int, slot: str, offset: int) -> str:
    """The name of a piece's tensor in its file."""
    return f"{param}/{slot}/{offset}"


@dataclasses.dataclass(frozen=True, slots=True)
class TensorPiece:
    """Where a run of one slot of one parameter lies.

    Attributes:
        param: Parameter index.
        slot: Slot name; ``master_param`` for the parameter itself.
        offset: Where it starts in the slot's flattened tensor.
        numel: Its elements.
        file: Index into the manifest's files.
    """

    param: int
    slot: str
    offset: int
    numel: int
    file: int

    @property
    def key(self) -> str:
        """Its name in the safetensors file."""
        return piece_key(self.param, self.slot, self.offset)


@dataclasses.dataclass(frozen=True, slots=True)
class ShardFile:
    """One shard's file: its name beside the manifest, its size, and ``[param, slot, offset, numel]`` of each tensor."""

    name: str
    size_bytes: int
    pieces: tuple[tuple[int, str, int, int], ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        spec: The job.
        sequence, step, skipped_steps: As in :class:`StateSource`.
        scalars: The rule's scalars.
        step_counts: Steps of each parameter.
        kernel_identity: What computed it.
        files: File names, with their sizes in bytes.
        pieces: Every piece.
    """

    spec: JobSpec
    sequence: int
    step: int
    skipped_steps: int
    scalars: Mapping[str, float]
    step_counts: tuple[int, ...]
    kernel_identity: str
    files: tuple[tuple[str, int], ...]
    pieces: tuple[TensorPiece, ...]

    def pack(self) -> bytes:
        """The manifest's bytes."""
        fields = {
            "format": "stepwell-checkpoint",
            "version": FORMAT_VERSION,
            "job": self.spec.to_dict(),
            "sequence": self.sequence,
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "scalars": dict(self.scalars),
            "step_counts": list(self.step_counts),
            "kernel_identity": self.kernel_identity,
            "files": [list(file) for file in self.files],
            "pieces": [[piece.param, piece.slot, piece.offset, piece.numel, piece.file] for piece in self.pieces],
        }
        packed: bytes = msgpack.packb(fields)
        return packed

    @classmethod
    def unpack(cls, data: bytes, uri: str) -> Manifest:
        """The reverse of :meth:`pack`.

        Raises:
            CheckpointError: If the bytes are no manifest, a damaged one, or one of a newer format.
        """
        try:
            fields: dict[str, Any] = msgpack.unpackb(data)
            if fields["format"] != "stepwell-checkpoint":
                raise ValueError(f"format is {fields['format']!r}")
            if fields["version"] > FORMAT_VERSION:
                raise CheckpointError(
                    f"{uri}: expected a checkpoint of format {FORMAT_VERSION} or older, got {fields['version']}; "
                    "read it with a newer Stepwell"
                )
            # Before kernels were compiled, checkpoints did not say that theirs were not.
            spec = JobSpec.from_dict({"kernel": "eager", **fields["job"]})
            spec.rule.check_scalars(fields["scalars"], spec.num_groups)
            return cls(
                spec=spec,
                sequence=_count(fields["sequence"]),
                step=_count(fields["step"]),
                skipped_steps=_count(fields["skipped_steps"]),
                scalars=fields["scalars"],
                step_counts=tuple(_count(count) for count in fields["step_counts"]),
                kernel_identity=str(fields["kernel_identity"]),
                files=tuple(_file_entry(name, size) for name, size in fields["files"]),
                pieces=tuple(_piece(len(fields["files"]), *piece) for piece in fields["pieces"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, MessageError, msgpack.UnpackException) as error:
            raise CheckpointError(
                f"{uri}: the manifest is damaged ({type(error).__name__}: {error}); use another checkpoint"
            ) from error


def write_manifest(uri: str, manifest: Manifest) -> None:
    """Write the manifest under a temporary name, rename it, and drop the files that the one it replaces named.

    Raises:
        CheckpointError: If it cannot be written.
    """
    fs, path = locate(uri)
    try:
        replaced = _named_files(fs, posixpath.join(path, MANIFEST_NAME)) - {name for name, _ in manifest.files}
        with write_file(uri, MANIFEST_NAME) as stream:
            stream.write(manifest.pack())
    except OSError as error:
        raise CheckpointError(f"{uri}: the manifest cannot be written ({error})") from error
    for name in replaced:
        remove_file(uri, name)


def read_manifest(uri: str) -> Manifest:
    """Read a checkpoint's manifest and see that its files are there, whole.

    Raises:
        CheckpointError: If there is none, or something is missing or damaged.
    """
    fs, path = locate(uri)
    try:
        data: bytes = fs.cat_file(posixpath.join(path, MANIFEST_NAME))
    except FileNotFoundError as error:
        raise CheckpointError(f"{uri}: there is no complete checkpoint here ({MANIFEST_NAME} is missing)") from error
    except OSError as error:
        raise CheckpointError(f"{uri}: cannot be read ({error})") from error
    manifest = Manifest.unpack(data, uri)
    _require_whole(manifest, uri)
    for name, size_bytes in manifest.files:
        _require_size(fs, uri, posixpath.join(path, name), size_bytes)
    return manifest


def check_restorable(manifest: Manifest, spec: JobSpec, uri: str) -> None:
    """Refuse a checkpoint of another model or rule; the workers' number and kind and which parameters decay may differ.

    Raises:
        JobMismatchError: Naming the first difference.
    """
    saved = manifest.spec
    params = tuple(
        dataclasses.replace(param, decays=spec.params[index].decays) if index < len(spec.params) else param
        for index, param in enumerate(saved.params)
    )
    theirs = dataclasses.replace(saved, params=params, world_size=spec.world_size, gradients=spec.gradients)
    spec.require_same(theirs, whose=f"checkpoint {uri}")


def tell_of_other_kernels(manifest: Manifest, kernel_identity: str, uri: str) -> None:
    """Say so if a checkpoint that is restored was computed by other kernels than what follows it will be."""
    if manifest.kernel_identity != kernel_identity:
        logger.warning(
            "%s was computed by [%s], and the run goes on with [%s]: its state is the same, but later steps may "
            "differ from those of the run before in their last bits",
            uri,
            manifest.kernel_identity,
            kernel_identity,
        )


def build_manifest(spec: JobSpec, files: Sequence[ShardFile], status: ShardStatus) -> Manifest:
    """Put the shards' files together; ``status`` is that of any shard, at rest."""
    pieces = [TensorPiece(*piece, file=index) for index, file in enumerate(files) for piece in file.pieces]
    return Manifest(
        spec=spec,
        sequence=status.sequence,
        step=status.step,
        skipped_steps=status.skipped_steps,
        scalars=status.scalars,
        step_counts=status.step_counts,
        kernel_identity=status.kernel_identity,
        files=tuple((file.name, file.size_bytes) for file in files),
        pieces=tuple(pieces),
    )


def shard_file_name(save_id: str, shard: int, num_shards: int) -> str:
    """The file name of one shard in one save."""
    return f"{save_id}-shard-{shard:05d}-of-{num_shards:05d}.safetensors"


def _named_files(fs: AbstractFileSystem, manifest_path: str) -> set[str]:
    """The files that the manifest at a path names; none if there is no readable one."""
    try:
        return {name for name, _ in Manifest.unpack(fs.cat_file(manifest_path), manifest_path).files}
    except (FileNotFoundError, CheckpointError):
        return set()


def _require_whole(manifest: Manifest, uri: str) -> None:
    """See that every element of every slot lies in exactly one piece."""
    by_slot: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for piece in manifest.pieces:
        by_slot.setdefault((piece.param, piece.slot), []).append((piece.offset, piece.numel))
    for index, lengths in enumerate(_slot_lengths(manifest.spec)):
        for name, expected in lengths.items():
            reached = 0
            for offset, numel in sorted(by_slot.pop((index, name), [])):
                reached = reached + numel if offset == reached else -1
                if reached < 0:
                    break
            if reached != expected:
                raise CheckpointError(
                    f"{uri}: the manifest is damaged: {name} of parameter {index} does not cover its {expected} "
                    "elements once; use another checkpoint"
                )
    if by_slot or len(manifest.step_counts) != len(manifest.spec.params):
        raise CheckpointError(f"{uri}: the manifest is damaged: it does not fit its own job; use another checkpoint")


def _slot_lengths(spec: JobSpec) -> Iterator[dict[str, int]]:
    """How many elements each slot and key slot of each parameter has."""
    rule, keys = spec.rule, spec.keys()
    for index, param in enumerate(spec.params):
        lengths = {slot.name: -(-param.numel // slot.stride) for slot in (MASTER, *rule.slots)}
        yield lengths | {slot.name: keys.count(slot.scope, index) for slot in rule.key_slots}


def _count(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _file_entry(name: object, size_bytes: object) -> tuple[str, int]:
    """A file beside the manifest and its size; a name with a folder in it is refused."""
    if not isinstance(name, str) or not isinstance(size_bytes, int) or name in ("", ".", "..") or "/" in name:
        raise ValueError(f"{name!r} is no name of a file beside it")
    return name, size_bytes


def _piece(num_files: int, param: object, slot: object, offset: object, numel: object, file: object) -> TensorPiece:
    numbers = [value for value in (param, offset, numel, file) if isinstance(value, int) and value >= 0]
    if len(numbers) != 4 or not isinstance(slot, str) or numbers[3] >= num_files:
        raise ValueError(f"{[param, slot, offset, numel, file]!r} is no piece")
    return TensorPiece(numbers[0], slot, numbers[1], numbers[2], numbers[3])


def _require_size(fs: AbstractFileSystem, uri: str, path: str, size_bytes: int) -> None:
    try:
        found = fs.size(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{uri}: {posixpath.basename(path)} is missing; use another checkpoint") from error
    if found != size_bytes:
        raise CheckpointError(
            f"{uri}: {posixpath.basename(path)} was cut short: expected {size_bytes} bytes, got {found}; "
            "use another checkpoint"
        )
