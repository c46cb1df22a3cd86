"""What a worker tells the parent, one JSON object a line: {"event": "step", "step": 12, ...}."""

from __future__ import annotations

import dataclasses
import json
from typing import ClassVar


@dataclasses.dataclass(frozen=True, slots=True)
class Phase:
    """Something slow begins, before the first step or after the last."""

    tag: ClassVar[str] = "phase"
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Start:
    """The service is up and the first step comes next.

    Attributes:
        step: steps already applied, 0 unless resumed.
        numel: the model's parameters.
        train_bytes: size of the text that is trained on.
    """

    tag: ClassVar[str] = "start"
    step: int
    numel: int
    train_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """A step has been applied.

    Attributes:
        step: steps applied, this one included.
        loss: mean over the global batch, nats per byte.
        d: Prodigy's estimate after the step; None for a rule that has none.
        lr: the learning rate that the step was taken with.
        step_s: wall time of the whole step.
    """

    tag: ClassVar[str] = "step"
    step: int
    loss: float
    d: float | None
    lr: float
    step_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class HeldOut:
    """The loss on text that is never trained on, nats per byte."""

    tag: ClassVar[str] = "held_out"
    step: int
    loss: float


@dataclasses.dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint is complete."""

    tag: ClassVar[str] = "saved"
    step: int
    uri: str


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """Training is over.

    Attributes:
        step: steps applied.
        params_digest: sha256 over the bytes of all parameters, in order.
        sample: text that the model wrote.
    """

    tag: ClassVar[str] = "done"
    step: int
    params_digest: str
    sample: str


@dataclasses.dataclass(frozen=True, slots=True)
class Failed:
    """The worker gives up, for a reason that it can put into words."""

    tag: ClassVar[str] = "failed"
    message: str


Event = Phase | Start | Step | HeldOut | Saved | Done | Failed
_KINDS: dict[str, type[Event]] = {kind.tag: kind for kind in (Phase, Start, Step, HeldOut, Saved, Done, Failed)}


def encode(event: Event) -> str:
    """One line of JSON, without its newline."""
    return json.dumps({"event": event.tag, **dataclasses.asdict(event)})


def decode(line: str) -> Event:
    """The inverse of `encode`.

    Raises:
        ValueError: the line is no event.
    """
    fields = json.loads(line)
    if not isinstance(fields, dict) or fields.get("event") not in _KINDS:
        raise ValueError(f"not an event: {line!r}")
    return _KINDS[fields.pop("event")](**fields)
