"""Ray's token: who has it may enter a Ray that Stepwell starts, and run code there."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path
from typing import Any

import ray._raylet

from ..sharding.errors import ServiceError

TOKEN_BYTES = 32

untyped_raylet: Any = ray._raylet


def new_token() -> str:
    """A token that nobody guesses."""
    return secrets.token_hex(TOKEN_BYTES)


def own_token(path: Path) -> Path:
    """The file of this user's token, made if there is none; nobody else can read it.

    Args:
        path: Where it is; the folder is there.

    Raises:
        ServiceError: If other users may read what is there already.
    """
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise ServiceError(
                f"{path} holds the token of your Ray: expected a file that only you can read (mode 600), "
                f"got mode {mode:o}; others may know it, so remove it, and a new one is made"
            ) from None
        return path
    with os.fdopen(file, "w", encoding="ascii") as token:
        token.write(new_token())
    return path


def settle() -> None:
    """Have Ray read its mode and token from the environment again: it does so when it is imported, and not after."""
    untyped_raylet.Config.initialize("")
    untyped_raylet.AuthenticationTokenLoader.instance().reset_cache()


def shown_token() -> str:
    """The token that this process shows, from wherever it has it; empty if it shows none."""
    if untyped_raylet.get_authentication_mode() != untyped_raylet.AuthenticationMode.TOKEN:
        return ""
    token: str = untyped_raylet.AuthenticationTokenLoader.instance().get_raw_token()
    return token
