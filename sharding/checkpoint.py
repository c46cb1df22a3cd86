"""A checkpoint's tensors: each shard writes a safetensors file of its own, and any number of shards read them all.

docs/checkpoint.md describes the bytes, :mod:`.manifest` what binds the files together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import posixpath
from collections.abc import Iterator

from torch import Tensor

from .buffers import StateSource
from .digests import digest_of
from .errors import CheckpointAccessError, CheckpointError
from .files import library_errors_told, locate, write_file
from .folder import read_manifest, size_problem
from .manifest import MANIFEST_NAME, FileEntry, Manifest, ShardFile, TensorPiece, piece_key, shorten
from .pieces import MissingPieceError, read_across
from .snapshot import Snapshot
from .tensor_file import TensorFile, pack_header


def write_shard(snapshot: Snapshot, uri: str, name: str) -> ShardFile:
    """Write one shard's tensors beside where the manifest will be. Called by every shard, before the manifest.

    The snapshot is of no more use afterwards.

    Raises:
        CheckpointError: If the file cannot be written, or the snapshot is closed meanwhile.
    """
    try:
        pieces = list(snapshot.pieces())
        header = pack_header(
            [(piece_key(piece.param, slot, piece.offset), dtype, piece.numel) for slot, piece, dtype in pieces]
        )
        with write_file(uri, name) as stream:
            stream.write(header)
            digests = snapshot.write(stream)
    except OSError as error:
        raise CheckpointError(
            f"{uri}: {name} cannot be written ({error}); free or mend that place, or save to another. "
            "What was there before is as it was, and steps go on"
        ) from error
    finally:
        snapshot.close("it has been written, or could not be")
    size_bytes = len(header) + sum(piece.numel * dtype.itemsize for _, piece, dtype in pieces)
    return ShardFile(
        FileEntry(name, size_bytes, digest_of(header)),
        tuple(
            (piece.param, slot, piece.offset, piece.numel, digest)
            for (slot, piece, _), digest in zip(pieces, digests, strict=True)
        ),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Damage:
    """Something in a checkpoint that is not as it was written.

    Attributes:
        file: The file's name.
        tensor: Names the tensor; empty if it is the file as a whole.
        problem: What is wrong with it; follows the name of what it is wrong with.
    """

    file: str
    tensor: str
    problem: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.file, self.tensor, self.problem)))


def find_damages(uri: str) -> list[Damage]:
    """Read all of a checkpoint; what is not as it was written. Called by one process, with or without a service."""
    try:
        manifest = read_manifest(uri)
    except CheckpointError as error:
        return [Damage(MANIFEST_NAME, "", str(error))]
    with CheckpointReader(uri, manifest) as reader:
        return [damage for index in range(len(manifest.files)) for damage in reader.damages(index)]


class CheckpointReader:
    """Reads tensors of a checkpoint piece by piece; a context manager, as it holds files open.

    Args:
        uri: Where the checkpoint is.
        manifest: Its manifest.
    """

    def __init__(self, uri: str, manifest: Manifest) -> None:
        self._uri, self._manifest = uri, manifest
        self._by_slot: dict[tuple[int, str], list[TensorPiece]] = {}
        for piece in sorted(manifest.pieces, key=lambda piece: piece.offset):
            self._by_slot.setdefault((piece.param, piece.slot), []).append(piece)
        self._streams = contextlib.ExitStack()
        self._open: dict[int, TensorFile] = {}

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()
        self._streams.close()

    def require_intact(self, shard: int = 0, num_shards: int = 1) -> None:
        """Read one shard's share of the files, every byte of them, and compare with their digests.

        Called by every shard before a restore changes any of them.

        Raises:
            CheckpointError: Naming the first damage.
        """
        for index in range(shard, len(self._manifest.files), num_shards):
            for damage in self.damages(index):
                raise CheckpointError(f"{self._uri}: {damage}; use another checkpoint")

    def damages(self, file: int) -> Iterator[Damage]:
        """What is not as it was written in a file, all of which is read."""
        entry, pieces = self._manifest.files[file], self._manifest.file_pieces[file]
        try:
            problem = size_problem(self._uri, entry)
            if problem is not None:
                yield Damage(entry.name, "", problem)
                return
            with library_errors_told():
                places = self._file(file).places
            for piece in sorted(pieces, key=lambda piece: places[piece.key].begin):
                with library_errors_told():
                    digest = self._file(file).digest(places[piece.key])
                if digest != piece.digest:
                    yield Damage(
                        entry.name, self._manifest.describe(piece), "is damaged: it has not the digest it should"
                    )
        except (OSError, CheckpointAccessError) as error:
            yield Damage(entry.name, "", f"cannot be read ({shorten(str(error))})")
        except ValueError as error:
            yield Damage(entry.name, "", f"is damaged ({shorten(str(error))})")

    def source(self) -> StateSource:
        """The checkpoint as a state to load. Reads happen while it is loaded."""
        return StateSource(
            read=self.read,
            available=frozenset(self._by_slot),
            step_counts=dict(enumerate(self._manifest.step_counts)),
            scalars=self._manifest.scalars,
            sequence=self._manifest.sequence,
            step=self._manifest.step,
            skipped_steps=self._manifest.skipped_steps,
        )

    def read(self, param: int, slot: str, offset: int, out: Tensor) -> None:
        """Fill ``out`` with elements of a slot from ``offset`` on, whichever files they lie in.

        Raises:
            CheckpointError: If they are not there.
        """
        pieces = [(piece.offset, piece.numel, piece) for piece in self._by_slot[param, slot]]
        try:
            read_across(pieces, offset, out, self._read_piece)
        except MissingPieceError as error:
            raise CheckpointError(f"{self._uri}: {error} of {slot} of parameter {param} are missing") from None

    def _read_piece(self, piece: TensorPiece, first: int, out: Tensor) -> None:
        try:
            with library_errors_told():
                self._file(piece.file).read_into(piece.key, piece.numel, first, out)
        except (OSError, ValueError) as error:
            name = self._manifest.files[piece.file].name
            raise CheckpointError(
                f"{self._uri}: {name} is damaged ({shorten(str(error))}); use another checkpoint"
            ) from error

    def _file(self, index: int) -> TensorFile:
        """A file, opened, with the very tensors in it that the manifest says.

        Raises:
            ValueError: If its header is damaged or says otherwise.
        """
        if index not in self._open:
            entry = self._manifest.files[index]
            fs, path = locate(self._uri)
            stream = self._streams.enter_context(fs.open(posixpath.join(path, entry.name), "rb"))
            file = TensorFile(
                stream,
                size_bytes=entry.size_bytes,
                header_bytes=self._manifest.header_bytes(index),
                header_digest=entry.header_digest,
            )
            file.require_tensors(
                {piece.key: (self._manifest.dtype(piece), piece.numel) for piece in self._manifest.file_pieces[index]}
            )
            self._open[index] = file
        return self._open[index]
