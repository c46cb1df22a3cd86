"""Files of a checkpoint, on any file system that fsspec reaches."""

from __future__ import annotations

import contextlib
import posixpath
import sys
from collections.abc import Iterator
from typing import BinaryIO

import fsspec
from fsspec import AbstractFileSystem

from .errors import CheckpointError, StepwellError

TEMPORARY = ".tmp"
"""Follows a file's name while it is written."""


def locate(uri: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URI, and its path there.

    Raises:
        CheckpointError: If it is no path and no URI that fsspec knows.
    """
    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise CheckpointError(f"{uri}: expected a path or an fsspec URI ({error})") from error
    return fs, path


@contextlib.contextmanager
def library_errors_told() -> Iterator[None]:
    """Make an ``OSError`` of what the library under a file system raises, such as botocore's errors for S3.

    Python's own errors and ours pass.

    Raises:
        OSError: In place of a library's error.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError | StepwellError) or _is_pythons(error):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error


def _is_pythons(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in sys.stdlib_module_names


def _open_new(fs: AbstractFileSystem, path: str) -> BinaryIO:
    """A new file; its folder is made if it must be there before. A bucket is not: who deleted it meant it."""
    try:
        stream: BinaryIO = fs.open(path, "wb")
    except FileNotFoundError:
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        stream = fs.open(path, "wb")
    return stream


@contextlib.contextmanager
def write_file(uri: str, name: str) -> Iterator[BinaryIO]:
    """A file in the folder ``uri``, written under a temporary name and renamed when the block ends.

    If the block raises there is no file of this name, nor a temporary one as far as the file system still lets go.

    Raises:
        OSError: If the file system refuses.
    """
    fs, folder = locate(uri)
    target = posixpath.join(folder, name)
    temporary, is_complete = target + TEMPORARY, False
    try:
        with library_errors_told():
            with _open_new(fs, temporary) as stream:
                yield stream
            fs.mv(temporary, target)
        is_complete = True
    finally:
        if not is_complete:
            remove_file(uri, name + TEMPORARY)  # what made the block fail is the news


@library_errors_told()
def read_file(uri: str, name: str, *, max_bytes: int) -> bytes:
    """All bytes of a file in the folder ``uri``.

    Raises:
        FileNotFoundError: If there is none.
        OSError: If the file system refuses.
        ValueError: If it is larger than ``max_bytes``.
    """
    fs, folder = locate(uri)
    with fs.open(posixpath.join(folder, name), "rb") as stream:
        data: bytes = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{name} has more than {max_bytes} bytes")
    return data


@library_errors_told()
def size_of(uri: str, name: str) -> int:
    """The size of a file in the folder ``uri``, in bytes.

    Raises:
        FileNotFoundError: If there is none.
        OSError: If the file system refuses.
    """
    fs, folder = locate(uri)
    fs.invalidate_cache()  # a listing from before would be believed
    size_bytes: int = fs.size(posixpath.join(folder, name))
    return size_bytes


@library_errors_told()
def list_names(uri: str) -> list[str]:
    """The names of what lies in the folder ``uri`` now; none if there is no such folder.

    Raises:
        OSError: If the file system refuses.
    """
    fs, folder = locate(uri)
    fs.invalidate_cache()  # others write here too, shards in processes of their own among them
    try:
        return sorted(posixpath.basename(path.rstrip("/")) for path in fs.ls(folder, detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def remove_file(uri: str, name: str) -> None:
    """Remove a file from the folder ``uri``, if the file system lets go of it; a leftover does no harm."""
    fs, folder = locate(uri)
    with contextlib.suppress(OSError), library_errors_told():
        fs.rm_file(posixpath.join(folder, name))


def remove_folder(uri: str) -> None:
    """Remove the folder ``uri`` if it is empty; object stores have no empty ones."""
    fs, folder = locate(uri)
    with contextlib.suppress(OSError), library_errors_told():
        fs.rmdir(folder)
