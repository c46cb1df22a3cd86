"""How long a step was at each of its phases."""

from __future__ import annotations

import time

PHASES = {
    "gather": "from the first rank's push to the last one's",
    "log": "until arithmetic begins: the log of what a lost shard would need, and the wait for the thread",
    "vote": "averaging the ranks' gradients, looking at them, and the vote's all-reduce",
    "reduce": "the local pass and the all-reduce of its sums, for a rule that has any",
    "apply": "the pass that moves parameters, which go to the workers' memory where that is shared",
}
"""Name and meaning, in the order in which a step goes through them."""


class Stopwatch:
    """Adds up a step's seconds by phase.

    Attributes:
        seconds: By phase, of those that are over.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin with another step."""
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, phase: str) -> None:
        """What went by since the last lap was this phase."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now
