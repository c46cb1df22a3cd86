"""Files of a checkpoint, on any file system that fsspec reaches."""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Iterator
from typing import BinaryIO

import fsspec
from fsspec import AbstractFileSystem

from .errors import CheckpointError


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
def write_file(uri: str, name: str) -> Iterator[BinaryIO]:
    """A file in the folder ``uri``, written under a temporary name and renamed when the block ends.

    If the block raises there is no file of this name, nor a temporary one as far as the file system still lets go.

    Raises:
        OSError: If the file system refuses.
    """
    fs, folder = locate(uri)
    target = posixpath.join(folder, name)
    temporary, is_complete = target + ".tmp", False
    fs.makedirs(folder, exist_ok=True)
    try:
        with fs.open(temporary, "wb") as stream:
            yield stream
        fs.mv(temporary, target)
        is_complete = True
    finally:
        if not is_complete:
            remove_file(uri, name + ".tmp")  # what made the block fail is the news


def remove_file(uri: str, name: str) -> None:
    """Remove a file from the folder ``uri``, if the file system lets go of it; a leftover does no harm."""
    fs, folder = locate(uri)
    with contextlib.suppress(OSError):
        fs.rm_file(posixpath.join(folder, name))
