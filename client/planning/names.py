"""Names as people type them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def named(text: str, known: Iterable[str], *, what: str) -> str:
    """The one of ``known`` that ``text`` is, whatever its case, hyphens and underscores.

    Args:
        text: What was typed.
        known: All names.
        what: What they name, for the message.

    Raises:
        ValueError: If it is none of them; the message has the nearest ones.
    """
    by_plain = {_plain(name): name for name in known}
    if _plain(text) in by_plain:
        return by_plain[_plain(text)]
    near = [by_plain[plain] for plain in difflib.get_close_matches(_plain(text), by_plain, n=3, cutoff=0.5)]
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"unknown {what} {text!r}. {hint}This version knows {', '.join(sorted(by_plain.values()))}")


def _plain(name: str) -> str:
    return name.casefold().replace("-", "").replace("_", "").replace(" ", "")
