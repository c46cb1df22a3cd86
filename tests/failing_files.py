"""A file system that fails as disks, permissions and networks do, when a test says so."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import uuid
from collections.abc import Iterator
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


@dataclasses.dataclass
class Disk:
    """What :class:`FailingFileSystem` writes to.

    Attributes:
        free_bytes: How many can still be written; None for any number.
        denied: What every change raises; None for no error.
    """

    free_bytes: int | None = None
    denied: OSError | None = None

    def take(self, size_bytes: int) -> None:
        if self.denied is not None:
            raise self.denied
        if self.free_bytes is not None:
            if size_bytes > self.free_bytes:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.free_bytes -= size_bytes


class FailingFileSystem(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Memory that is full, or may not be written to."""

    protocol = "failing"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    disk: ClassVar[Disk] = Disk()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.removeprefix("failing:/"))
        return stripped

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.disk.take(0)
        super().makedirs(path, exist_ok)

    def mv(self, *args: Any, **options: Any) -> None:
        self.disk.take(0)
        super().mv(*args, **options)

    def rm_file(self, path: str) -> None:
        if self.disk.denied is not None:
            raise self.disk.denied
        super().rm_file(path)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "wb":
            self.disk.take(0)
        file = super()._open(path, mode, **options)
        if mode == "wb":
            write, disk = file.write, self.disk

            def limited(data: bytes) -> int:
                disk.take(memoryview(data).nbytes)
                count: int = write(data)
                return count

            file.write = limited
        return file


fsspec.register_implementation("failing", FailingFileSystem, clobber=True)


@contextlib.contextmanager
def failing() -> Iterator[tuple[Disk, str]]:
    """A disk that fails when it is told to, and a folder on it that ends with the block."""
    disk = FailingFileSystem.disk = Disk()
    uri = f"failing://{uuid.uuid4().hex}"
    try:
        yield disk, uri
    finally:
        FailingFileSystem.disk = Disk()
        files = fsspec.filesystem("failing")
        if files.exists(uri):
            files.rm(uri, recursive=True)
