"""What signals mean to a service's processes."""

from __future__ import annotations

import ctypes
import signal


def end_at_sigterm() -> None:
    """Let SIGTERM end this process at once, so that Ray starts it again and it is brought back.

    Ray's handler ends Python instead, which waits for threads. One that is in a step may wait for this process's event
    loop, which has ended; the process stays, Ray takes it for alive, and nobody brings it back.
    """
    # Python's own function works in the main thread alone, in which Ray does not make actors.
    ctypes.CDLL(None).signal(signal.SIGTERM, 0)  # SIG_DFL
