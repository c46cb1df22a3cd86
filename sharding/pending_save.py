"""A checkpoint that is being written while steps go on."""

from __future__ import annotations

import atexit
import concurrent.futures
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from .errors import CheckpointError, ServiceTimeoutError, StepwellError

SAVE_TIMEOUT_S = 1800.0
EXIT_TIMEOUT_S = 300.0
"""How long a process that ends waits for a checkpoint which would end with it."""

logger = logging.getLogger(__name__)


class PendingSave:
    """A checkpoint that is being written: what ``service.save(uri, wait=False)`` returns.

    Args:
        uri: Where it is written.
        step: The number of steps in it.
        written: Done when the checkpoint is complete, or cannot be written.

    Attributes:
        uri, step: As above.
    """

    def __init__(self, uri: str, step: int, written: Future[None]) -> None:
        self.uri, self.step = uri, step
        self._written = written

    @classmethod
    def in_thread(cls, uri: str, step: int, write: Callable[[], None]) -> PendingSave:
        """Begin to write on a thread of its own, which does not keep the process from ending."""
        written: Future[None] = Future()

        def run() -> None:
            error: StepwellError | None = CheckpointError(f"{uri}: writing it failed; the log has the traceback")
            try:
                write()
                error = None
            except StepwellError as told:
                error = told
            finally:
                if error is None:
                    written.set_result(None)
                else:
                    written.set_exception(error)

        threading.Thread(target=run, name="stepwell-save", daemon=True).start()
        return cls(uri, step, written)

    @classmethod
    def complete(cls, uri: str, step: int) -> PendingSave:
        """A checkpoint that is there already."""
        written: Future[None] = Future()
        written.set_result(None)
        return cls(uri, step, written)

    def __repr__(self) -> str:
        return f"<PendingSave of step {self.step} to {self.uri!r}, {'done' if self.done() else 'being written'}>"

    def done(self) -> bool:
        """Whether it is complete, or has failed."""
        return self._written.done()

    def result(self, timeout_s: float = SAVE_TIMEOUT_S) -> int:
        """Wait until the checkpoint is complete.

        Returns:
            The number of steps in it.

        Raises:
            CheckpointError: If it cannot be written.
            ServiceTimeoutError: If it is not complete within ``timeout_s``; it is still being written.
        """
        self.wait(timeout_s)
        self._written.result()
        return self.step

    def wait(self, timeout_s: float = SAVE_TIMEOUT_S) -> None:
        """As :meth:`result`, but without a word on a failure."""
        concurrent.futures.wait([self._written], timeout_s)
        if not self.done():
            raise ServiceTimeoutError(f"the checkpoint {self.uri} was not complete within {timeout_s:g} s; wait again")

    def finish(self) -> None:
        """Wait for a checkpoint that what comes next would cut short; called when its service or process ends."""
        if not self.done():
            logger.warning("waiting up to %g s for the checkpoint %s to be written", EXIT_TIMEOUT_S, self.uri)
        try:
            self.wait(EXIT_TIMEOUT_S)
        except ServiceTimeoutError:
            logger.error("the checkpoint %s is cut short: it was not complete within %g s", self.uri, EXIT_TIMEOUT_S)

    def watch(self, *, ends_with_process: bool) -> None:
        """Log a failure, of which the caller may never ask.

        Args:
            ends_with_process: Whether this process is to wait for the checkpoint before it ends, see :meth:`finish`.
        """
        self._written.add_done_callback(self._log_failure)
        if ends_with_process:
            atexit.register(self.finish)
            self._written.add_done_callback(lambda _: atexit.unregister(self.finish))

    def _log_failure(self, written: Future[None]) -> None:
        error = written.exception()
        if error is not None:
            logger.error("the checkpoint of step %d was not written: %s", self.step, error)
