"""Turns what is reStructuredText in our docstrings into Markdown, for the site's reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?(?P<target>[\w.]+)`")
LITERAL = re.compile(r"::$", flags=re.MULTILINE)


class PlainDocstrings(griffe.Extension):
    """Sees each docstring once, when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value, obj)


def to_markdown(text: str, obj: griffe.Object) -> str:
    """Roles become links, where there is something to link to; ``::`` before an indented block becomes a colon."""

    def link(role: re.Match[str]) -> str:
        target = role["target"]
        return f'<autoref optional identifier="{_full_name(target, obj)}"><code>{target}</code></autoref>'

    return LITERAL.sub(lambda match: "" if _stands_alone(match) else ":", ROLE.sub(link, text))


def _stands_alone(match: re.Match[str]) -> bool:
    return match.string[: match.start()].rpartition("\n")[2].strip() == ""


def _full_name(target: str, obj: griffe.Object) -> str:
    """A target's name from the root, as the reference has it: of a method's neighbour with the class before it."""
    if target.startswith("stepwell."):
        return target
    owner = obj if obj.is_class else obj.parent
    if owner is not None and target in owner.all_members:
        return f"{owner.path}.{target}"
    return f"stepwell.{target}"
