"""How the scalars of several groups share one flat mapping: group 1's ``d`` is ``d[1]``, a model-wide one plain ``d``.

Whatever carries scalars (messages, checkpoints, the status) knows the flat mapping alone; a parameter group shows its
own under their plain names.
"""

from __future__ import annotations

from collections.abc import Mapping


def group_scalar(name: str, group: int) -> str:
    """The flat name of one group's scalar."""
    return f"{name}[{group}]"


def split_scalar(key: str) -> tuple[str, int | None]:
    """A flat name's plain name and group; None for a scalar of the whole model."""
    name, bracket, rest = key.partition("[")
    return name, int(rest.removesuffix("]")) if bracket else None


def scalars_of_group(scalars: Mapping[str, float], group: int) -> dict[str, float]:
    """What a group shows of the flat mapping: the model's scalars and its own, under their plain names."""
    parts = ((split_scalar(key), value) for key, value in scalars.items())
    return {name: value for (name, owner), value in parts if owner in (None, group)}
