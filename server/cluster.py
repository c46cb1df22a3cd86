"""Which Ray cluster to use: the one this process is in, a named one, or one of our own on this machine."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from ..sharding.errors import ServiceError, ServiceNotFoundError, ServiceTimeoutError
from . import access
from .config import (
    NAMESPACE,
    ray_address,
    ray_auth_mode,
    set_ray_defaults,
    state_folder,
    token_file,
    use_token,
    use_token_file,
)

LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
"""Ray replaces 127.0.0.1 by the host's outward address; any other loopback address it leaves alone."""
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


def attach(address: str | None = None) -> None:
    """Connect this process to a cluster, unless it is in one already.

    Args:
        address: A cluster's address; None takes ``$RAY_ADDRESS``, else the Ray that ``stepwell up`` started here.

    Raises:
        ServiceNotFoundError: If there is no cluster to be found.
        ServiceError: If it does not answer.
    """
    if ray.is_initialized():
        return
    own = _read_state()
    wanted = address or ray_address() or (None if own is None else str(own["address"]))
    if wanted is None:
        raise ServiceNotFoundError(
            "there is no Ray cluster here: set RAY_ADDRESS, call ray.init() first, "
            "or start a service with `stepwell up NAME`"
        )
    if own is not None and wanted == own["address"] and own.get("token"):
        use_token_file(Path(own["token"]))
    set_ray_defaults()
    _init(wanted)


def start_embedded(num_cpus: int) -> None:
    """Start a Ray of this process's own; it ends with the process.

    Its processes listen on every interface, whatever address it is given. So it asks for a token, made for it alone,
    unless ``$RAY_AUTH_MODE`` is "disabled".
    """
    if ray_auth_mode() != "disabled":
        use_token(access.new_token())
    set_ray_defaults()
    _init("local", num_cpus=num_cpus, include_dashboard=False, _node_ip_address=LOOPBACK)


def address() -> str:
    """The address of the cluster that this process is in."""
    found: str = ray.get_runtime_context().gcs_address
    return found


def describe_for_peers(service: str) -> dict[str, str]:
    """What another process of this host needs to find a service here: the cluster's address and token, and its name."""
    return {"address": address(), "token": access.shown_token(), "name": service}


def start_own(num_cpus: int) -> str:
    """Start a Ray on this machine that outlives this process, remember and attach to it; returns its address.

    It asks for this user's token, as that of :func:`start_embedded` does for its own, unless ``$RAY_AUTH_MODE`` says
    what it is to ask for.

    Raises:
        ServiceError: If the token is not this user's alone, or Ray ends at once.
        ServiceTimeoutError: If it does not come up.
    """
    folder = state_folder()
    folder.mkdir(parents=True, exist_ok=True)
    token = None if ray_auth_mode() else access.own_token(token_file())
    if token is not None:
        use_token_file(token)
    set_ray_defaults()
    port = _free_port()
    # Of its own, so that it can be removed with the Ray; its path is short, as those of sockets have to be.
    temporary = tempfile.mkdtemp(prefix="stepwell-ray-", dir="/tmp")
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}",
        f"--node-ip-address={LOOPBACK}", f"--num-cpus={num_cpus}", "--include-dashboard=false", "--disable-usage-stats",
        f"--temp-dir={temporary}",
    ]  # fmt: skip
    log_path = folder / "ray.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    _await_port(process, port, log_path)
    _init(f"{LOOPBACK}:{port}")
    state = {
        "address": address(), "pid": process.pid, "temporary": temporary, "token": None if token is None else str(token)
    }  # fmt: skip
    _state_file().write_text(json.dumps(state))
    return address()


def stop_own() -> None:
    """End the Ray that :func:`start_own` started, by its process id, and remove its files; nothing if there is none."""
    state = _read_state()
    if state is None:
        return
    pid = int(state["pid"])
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        _await_end(pid)
    shutil.rmtree(state["temporary"], ignore_errors=True)
    _state_file().unlink(missing_ok=True)


def is_own() -> bool:
    """Whether this process is in the Ray that :func:`start_own` started."""
    state = _read_state()
    return state is not None and ray.is_initialized() and state["address"] == address()


def _init(address: str, **options: Any) -> None:
    access.settle()
    try:
        ray.init(
            address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
            **options,
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ServiceError(
            f"the Ray cluster at {address} does not answer ({reason}); check RAY_ADDRESS and, where the cluster asks "
            "for a token, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        ) from error


def _state_file() -> Path:
    return state_folder() / "ray.json"


def _read_state() -> dict[str, Any] | None:
    """What is remembered of our own Ray, if that process still lives."""
    try:
        state: dict[str, Any] = json.loads(_state_file().read_text())
        os.kill(int(state["pid"]), 0)
    except (FileNotFoundError, ProcessLookupError, PermissionError, ValueError, KeyError):
        return None
    return state


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _await_port(process: subprocess.Popen[bytes], port: int, log_path: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServiceError(f"Ray ended while starting, with code {process.returncode}; {log_path} says why")
        with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=1.0):
            return
        time.sleep(0.1)
    process.terminate()
    raise ServiceTimeoutError(f"waited {START_TIMEOUT_S:g} s for Ray to start; {log_path} says more")


def _await_end(pid: int) -> None:
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # one that this process started has not ended before it is waited for
        os.kill(pid, 0)
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
