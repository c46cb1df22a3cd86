"""A checkpoint's tensors: each shard writes a safetensors file of its own, and any number of shards read them all.

docs/checkpoint.md describes the bytes, :mod:`.manifest` what binds the files together.
"""

from __future__ import annotations

import contextlib
import posixpath

from torch import Tensor

from .buffers import StateSource
from .errors import CheckpointError
from .files import locate, write_file
from .manifest import Manifest, ShardFile, TensorPiece, piece_key
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
        tensors = [(piece_key(piece.param, slot, piece.offset), dtype, piece.numel) for slot, piece, dtype in pieces]
        with write_file(uri, name) as stream:
            size_bytes = stream.write(pack_header(tensors)) + snapshot.write(stream)
    except OSError as error:
        raise CheckpointError(f"{uri}: {name} cannot be written ({error})") from error
    finally:
        snapshot.close("it has been written, or could not be")
    return ShardFile(
        name, size_bytes, tuple((piece.param, slot, piece.offset, piece.numel) for slot, piece, _ in pieces)
    )


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
            self._file(piece.file).read_into(piece.key, piece.numel, first, out)
        except (OSError, ValueError, KeyError, TypeError) as error:
            name = self._manifest.files[piece.file][0]
            raise CheckpointError(f"{self._uri}: {name} is damaged ({type(error).__name__}: {error})") from error

    def _file(self, index: int) -> TensorFile:
        if index not in self._open:
            name, size_bytes = self._manifest.files[index]
            fs, path = locate(self._uri)
            stream = self._streams.enter_context(fs.open(posixpath.join(path, name), "rb"))
            self._open[index] = TensorFile(stream, size_bytes)
        return self._open[index]
