"""A file system whose writes wait for the test: whatever goes on beside a save surely goes on before it ends."""

from __future__ import annotations

import contextlib
import errno
import threading
import uuid
from collections.abc import Iterator
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

LIMIT_S = 20.0


class Gate:
    """What the writes of :class:`GatedFileSystem` come to.

    Args:
        num_before: Writes of each file that pass it at once.
        num_files: How many files are waited for by :meth:`wait_until_reached`.
        seekable: Whether what is written can be written again, as in a local file.
    """

    def __init__(self, num_before: int = 0, num_files: int = 1, seekable: bool = True) -> None:
        self._num_before, self._num_files, self.seekable = num_before, num_files, seekable
        self._reached = threading.Semaphore(0)
        self._open = threading.Event()
        self.fails = False

    def wait_until_reached(self) -> None:
        """Wait until every file stands before the gate."""
        for _ in range(self._num_files):
            assert self._reached.acquire(timeout=LIMIT_S), "a file did not come to the gate"

    def open(self, *, fails: bool = False) -> None:
        """Let everything pass, or let it fail."""
        self.fails = fails
        self._open.set()

    def pass_through(self, num_writes: int) -> None:
        """Called by a file before each write, with how many it has done."""
        if num_writes == self._num_before:
            self._reached.release()
        if num_writes >= self._num_before:
            assert self._open.wait(LIMIT_S), "nobody opened the gate"
            if self.fails:
                raise OSError(errno.ENOSPC, "No space left on device")


class GatedFileSystem(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Memory, whose shard files pass a gate; manifests do not."""

    protocol = "gated"
    gate: ClassVar[Gate]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.removeprefix("gated:/"))
        return stripped

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super()._open(path, mode, **options)
        if mode == "wb" and "-shard-" in path:
            write, num_writes, gate = file.write, iter(range(2**40)), self.gate

            def gated(data: bytes) -> int:
                gate.pass_through(next(num_writes))
                count: int = write(data)
                return count

            file.write, file.seekable = gated, lambda: gate.seekable
        return file


fsspec.register_implementation("gated", GatedFileSystem, clobber=True)


@contextlib.contextmanager
def gated(*, num_before: int = 0, num_files: int = 1, seekable: bool = True) -> Iterator[tuple[Gate, str]]:
    """A gate, and a folder behind it that ends with the block; the gate is open afterwards."""
    gate = GatedFileSystem.gate = Gate(num_before, num_files, seekable)
    uri = f"gated://{uuid.uuid4().hex}"
    try:
        yield gate, uri
    finally:
        gate.open()
        files = fsspec.filesystem("gated")
        if files.exists(uri):
            files.rm(uri, recursive=True)
