"""What a run of the demo is asked to do, checked once and handed to its workers as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import ClassVar

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]


class DemoError(Exception):
    """A demo that cannot go on; the message is one line for the person at the terminal."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """The options of one run. Two runs with equal settings take equal steps.

    Attributes:
        rule: `prodigy`, `adamw` or `lamb`.
        steps: optimizer steps in all, those before a resume included.
        num_shards: shards of the embedded service.
        num_workers: data-parallel training processes.
        resume: the checkpoint to go on from, a path or a URI.
        out: the folder for events, logs, the checkpoint and the picture.
        batch_size: sequences in a step, over all workers.
        context_numel: bytes in a sequence.
        seed: fixes the model's first parameters and every batch.
    """

    LEARNING_RATES: ClassVar[dict[str, float]] = {"prodigy": 1.0, "adamw": 1e-3, "lamb": 1e-2}

    rule: str = "prodigy"
    steps: int = 800
    num_shards: int = 2
    num_workers: int = 2
    resume: str | None = None
    out: str = "stepwell-demo"
    batch_size: int = 16
    context_numel: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what cannot be run.

        Raises:
            DemoError: an option is out of range; the message names it and says what to give.
        """
        if self.rule not in self.LEARNING_RATES:
            raise DemoError(f"--rule must be one of {', '.join(self.LEARNING_RATES)}, got {self.rule!r}")
        if self.steps < 2:
            raise DemoError(f"--steps must be at least 2, got {self.steps}: try --steps 100")
        if not 1 <= self.num_shards <= 64:
            raise DemoError(f"--shards must be from 1 to 64, got {self.num_shards}: try --shards 2")
        if self.num_workers < 1 or self.batch_size % self.num_workers:
            counts = [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
            raise DemoError(
                f"--workers must divide the {self.batch_size} sequences of a step, got {self.num_workers}: "
                f"take one of {', '.join(map(str, counts))}"
            )

    @property
    def learning_rate(self) -> float:
        """The learning rate before the schedule."""
        return self.LEARNING_RATES[self.rule]

    @property
    def save_step(self) -> int:
        """The step after which the checkpoint is saved: half way."""
        return self.steps // 2

    @property
    def held_out_every(self) -> int:
        """Steps between two looks at the held-out text."""
        return max(1, self.steps // 10)

    def lr_factor(self, step: int) -> float:
        """The cosine schedule in closed form, so that a resumed run gets the same bits.

        Args:
            step: steps applied so far.

        Returns:
            What the learning rate is multiplied by in the next step: 1 at the start, 0 at the end.
        """
        return 0.5 * (1.0 + math.cos(math.pi * min(step, self.steps) / self.steps))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What one training process is told.

    Attributes:
        demo: the settings of the run, equal on all ranks.
        rank: which of the workers this is.
        rendezvous: a file that the workers find each other by; the parent owns its folder.
        checkpoint: where rank 0 saves half way.
    """

    demo: DemoSettings
    rank: int
    rendezvous: str
    checkpoint: str

    def to_json(self) -> str:
        """One line, for a command line."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> WorkerSettings:
        """The inverse of `to_json`."""
        fields = json.loads(text)
        return WorkerSettings(demo=DemoSettings(**fields.pop("demo")), **fields)


def counted(count: int, word: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
