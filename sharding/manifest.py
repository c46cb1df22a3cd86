"""A checkpoint's manifest: what there is and where it lies. docs/checkpoint.md describes its bytes.

A checkpoint is keyed by parameter index; how many shards wrote it does not matter to whoever reads it. Whatever bytes
are given for a manifest, it is read in time and memory that their number limits, and what comes of it fits together.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgpack
import torch

from .buffers import MASTER
from .digests import DIGEST_BYTES, digest_of, to_bytes
from .errors import CheckpointError, MessageError
from .job import JobSpec
from .reports import ShardStatus

FORMAT = "stepwell-checkpoint"
FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.msgpack"
MAX_MANIFEST_BYTES = 2**26
"""Some two million pieces. What is larger is not written, and not read into memory, where it may take 64 times that."""
HEADER_BYTES_PER_TENSOR = 1024
"""More than a file's header has for each tensor; what a header may have beside that is two pages."""
MAX_TEXT = 500
"""Characters of a text for people that a manifest holds."""

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
        digest: Of its bytes.
    """

    param: int
    slot: str
    offset: int
    numel: int
    file: int
    digest: int

    @property
    def key(self) -> str:
        """Its name in the safetensors file."""
        return piece_key(self.param, self.slot, self.offset)


@dataclasses.dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of tensors: its name beside the manifest, its size, and the digest of its header."""

    name: str
    size_bytes: int
    header_digest: int


@dataclasses.dataclass(frozen=True, slots=True)
class ShardFile:
    """What one shard has written: its file, and ``(param, slot, offset, numel, digest)`` of each tensor in it."""

    entry: FileEntry
    pieces: tuple[tuple[int, str, int, int, int], ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        spec: The job.
        sequence, step, skipped_steps: As in :class:`StateSource`.
        scalars: The rule's scalars.
        step_counts: Steps of each parameter.
        kernel_identity: What computed it.
        saved_at: When it was written, in seconds since 1970 by the writer's clock.
        files: The files.
        pieces: Every piece.
    """

    spec: JobSpec
    sequence: int
    step: int
    skipped_steps: int
    scalars: Mapping[str, float]
    step_counts: tuple[int, ...]
    kernel_identity: str
    saved_at: float
    files: tuple[FileEntry, ...]
    pieces: tuple[TensorPiece, ...]

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(file.size_bytes for file in self.files)

    @functools.cached_property
    def file_pieces(self) -> tuple[tuple[TensorPiece, ...], ...]:
        """The pieces of each file."""
        by_file: list[list[TensorPiece]] = [[] for _ in self.files]
        for piece in self.pieces:
            by_file[piece.file].append(piece)
        return tuple(map(tuple, by_file))

    def dtype(self, piece: TensorPiece) -> torch.dtype:
        """The dtype of a piece in its file."""
        return self._slot_dtypes[piece.slot](self.spec.params[piece.param].state_dtype)

    def header_bytes(self, file: int) -> int:
        """How many bytes stand before a file's tensors."""
        tensors = sum(piece.numel * self.dtype(piece).itemsize for piece in self.file_pieces[file])
        return self.files[file].size_bytes - tensors

    def describe(self, piece: TensorPiece) -> str:
        """Names a piece for people."""
        param = self.spec.params[piece.param]
        name = f" '{param.name}'" if param.name else ""
        return f"{piece.key} ({piece.slot} of parameter {piece.param}{name}, {piece.numel} elements)"

    def pack(self) -> bytes:
        """The manifest's bytes."""
        fields = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "job": self.spec.to_dict(),
            "sequence": self.sequence,
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "scalars": dict(self.scalars),
            "step_counts": list(self.step_counts),
            "kernel_identity": self.kernel_identity,
            "saved_at": self.saved_at,
            "files": [[file.name, file.size_bytes, file.header_digest] for file in self.files],
            "pieces": [
                [piece.param, piece.slot, piece.offset, piece.numel, piece.file, piece.digest] for piece in self.pieces
            ],
        }
        packed: bytes = msgpack.packb(fields)
        return packed + to_bytes(digest_of(packed))

    @classmethod
    def unpack(cls, data: bytes, uri: str) -> Manifest:
        """The reverse of :meth:`pack`.

        Raises:
            CheckpointError: If the bytes are no manifest, a damaged one, or one of another format.
        """
        packed = data[:-DIGEST_BYTES]
        is_intact = to_bytes(digest_of(packed)) == data[-DIGEST_BYTES:]
        fields = _fields_in(packed if is_intact else data)  # before there were digests, there was nothing behind them
        _refuse_version(fields, uri)
        try:
            if not is_intact:
                raise ValueError("its bytes have not the digest at its end")
            manifest = cls._of_fields(fields)
            manifest._require_whole()
        except _DAMAGE as error:
            what = f"{type(error).__name__}: {shorten(str(error))}"
            raise CheckpointError(f"{uri}: the manifest is damaged ({what}); use another checkpoint") from error
        return manifest

    @classmethod
    def _of_fields(cls, fields: Mapping[str, Any]) -> Manifest:
        if fields["format"] != FORMAT:
            raise ValueError(f"format is {fields['format']!r}")
        spec = JobSpec.from_dict(fields["job"])
        spec.rule.check_scalars(fields["scalars"], spec.num_groups)
        files = tuple(_file_entry(*file) for file in fields["files"])
        if len({file.name for file in files}) != len(files):
            raise ValueError("it names a file twice")
        return cls(
            spec=spec,
            sequence=_count(fields["sequence"]),
            step=_count(fields["step"]),
            skipped_steps=_count(fields["skipped_steps"]),
            scalars=fields["scalars"],
            step_counts=tuple(_count(count) for count in fields["step_counts"]),
            kernel_identity=_text(fields["kernel_identity"]),
            saved_at=_moment(fields["saved_at"]),
            files=files,
            pieces=tuple(_piece(len(files), *piece) for piece in fields["pieces"]),
        )

    @functools.cached_property
    def _slot_dtypes(self) -> dict[str, Callable[[torch.dtype], torch.dtype]]:
        rule = self.spec.rule
        of_slots = {slot.name: slot.dtype for slot in (MASTER, *rule.slots)}
        return of_slots | {slot.name: lambda _: torch.float64 for slot in rule.key_slots}

    def _require_whole(self) -> None:
        """See that every element of every slot lies in exactly one piece, and that the pieces fit into their files.

        Raises:
            ValueError: If not.
        """
        if len(self.step_counts) != len(self.spec.params):
            raise ValueError(f"it has {len(self.step_counts)} step counts for {len(self.spec.params)} parameters")
        by_slot: dict[tuple[int, str], list[TensorPiece]] = {}
        for piece in self.pieces:
            if piece.param >= len(self.spec.params) or piece.slot not in self._slot_dtypes:
                raise ValueError(f"its job has no {piece.key}")
            by_slot.setdefault((piece.param, piece.slot), []).append(piece)
        for index, file in enumerate(self.files):
            header_bytes, num_tensors = self.header_bytes(index), len(self.file_pieces[index])
            if not 8 < header_bytes <= 2 * 4096 + HEADER_BYTES_PER_TENSOR * num_tensors:
                raise ValueError(f"{num_tensors} tensors in {file.name} leave {header_bytes} bytes to its header")
        for index, lengths in enumerate(_slot_lengths(self.spec)):
            for name, expected in lengths.items():
                _require_cover(by_slot.get((index, name), []), expected, f"{name} of parameter {index}")


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
    pieces = [
        TensorPiece(param, slot, offset, numel, index, digest)
        for index, file in enumerate(files)
        for param, slot, offset, numel, digest in file.pieces
    ]
    return Manifest(
        spec=spec,
        sequence=status.sequence,
        step=status.step,
        skipped_steps=status.skipped_steps,
        scalars=status.scalars,
        step_counts=status.step_counts,
        kernel_identity=status.kernel_identity,
        saved_at=time.time(),
        files=tuple(file.entry for file in files),
        pieces=tuple(pieces),
    )


def shard_file_name(save_id: str, shard: int, num_shards: int) -> str:
    """The file name of one shard in one save."""
    return f"{save_id}-shard-{shard:05d}-of-{num_shards:05d}.safetensors"


def shorten(text: str) -> str:
    """A text as far as a line of an error has room for it: what comes from a file may be of any length."""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ..."


def is_shard_file(name: str) -> bool:
    """Whether a file of this name was written by a save, or was to be; only these are ever removed."""
    return re.fullmatch(r"[0-9a-z-]+-shard-\d{5}-of-\d{5}\.safetensors(\.tmp)?", name) is not None


_DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    MessageError,
    msgpack.UnpackException,
)
"""What reading fields that are not as they should be may raise."""


def _fields_in(packed: bytes) -> dict[str, Any]:
    """The map that a manifest is; an empty one if it is none."""
    try:
        fields = msgpack.unpackb(packed)
    except _DAMAGE:
        return {}
    return fields if isinstance(fields, dict) else {}


def _refuse_version(fields: Mapping[str, Any], uri: str) -> None:
    """Refuse a manifest of another version than this one reads; what is no manifest at all is for others to say.

    Raises:
        CheckpointError: Naming both versions.
    """
    version = fields.get("version") if fields.get("format") == FORMAT else FORMAT_VERSION
    if version != FORMAT_VERSION:
        is_newer = isinstance(version, int) and version > FORMAT_VERSION
        remedy = "read it with a newer Stepwell" if is_newer else "restore it with the Stepwell that wrote it"
        raise CheckpointError(
            f"{uri}: expected a checkpoint of format version {FORMAT_VERSION}, the only one that this Stepwell reads, "
            f"got version {shorten(str(version))}; {remedy}"
        )


def _require_cover(pieces: Sequence[TensorPiece], expected: int, what: str) -> None:
    reached = 0
    for piece in sorted(pieces, key=lambda piece: piece.offset):
        if piece.offset != reached or not piece.numel:
            break
        reached += piece.numel
    else:
        if reached == expected:
            return
    raise ValueError(f"{what} does not cover its {expected} elements once")


def _slot_lengths(spec: JobSpec) -> Iterator[dict[str, int]]:
    """How many elements each slot and key slot of each parameter has."""
    rule, keys = spec.rule, spec.keys()
    for index, param in enumerate(spec.params):
        lengths = {slot.name: -(-param.numel // slot.stride) for slot in (MASTER, *rule.slots)}
        yield lengths | {slot.name: keys.count(slot.scope, index) for slot in rule.key_slots}


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**62:  # the next one must be an int64, too
        raise ValueError(f"{value!r} is no count")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ValueError(f"{value!r} is no line of text")
    return value


def _moment(value: object) -> float:
    if not isinstance(value, float) or not 0 <= value < 2**37:  # some thousand years
        raise ValueError(f"{value!r} is no moment")
    return value


def _digest(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**64:
        raise ValueError(f"{value!r} is no digest")
    return value


def _file_entry(name: object, size_bytes: object, header_digest: object) -> FileEntry:
    """A file beside the manifest; a name that leads elsewhere is refused."""
    if not isinstance(name, str) or re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}", name) is None:
        raise ValueError(f"{name!r} is no name of a file beside it")
    return FileEntry(name, _count(size_bytes), _digest(header_digest))


def _piece(
    num_files: int, param: object, slot: object, offset: object, numel: object, file: object, digest: object
) -> TensorPiece:
    if not isinstance(slot, str) or _count(file) >= num_files:
        raise ValueError(f"{[param, slot, offset, numel, file]!r} is no piece")
    return TensorPiece(_count(param), slot, _count(offset), _count(numel), _count(file), _digest(digest))
