"""The service's metrics: their names, kinds, units and meaning, and how they get into Ray's exporter.

Prometheus finds them at each node's metrics port with ``ray_`` before the name, and Ray's labels beside ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from ray.util.metrics import Counter, Gauge, Histogram

PREFIX = "ray_"
"""What Ray's exporter puts before every name."""
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of the histograms' buckets."""


@dataclasses.dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: Without Ray's prefix.
        kind: As Prometheus has it.
        unit: Of its values.
        meaning: What it says.
        labels: Names of our labels.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    meaning: str
    labels: tuple[str, ...] = ("service", "shard")


_OF_SERVICE, _OF_GROUP = ("service",), ("service", "group")

METRICS = (
    Metric("stepwell_steps_total", "counter", "steps", "Steps that the shard has taken, skipped ones included."),
    Metric(
        "stepwell_skipped_steps_total",
        "counter",
        "steps",
        "Steps of these that were skipped, for inf or NaN in a gradient.",
    ),
    Metric(
        "stepwell_aborted_steps_total", "counter", "tries", "Tries at a step that were voted down; workers push again."
    ),
    Metric(
        "stepwell_step_seconds",
        "histogram",
        "seconds",
        "How long a step was at each phase: gather, log, vote, reduce, apply.",
        ("service", "shard", "phase"),
    ),
    Metric("stepwell_pushes_total", "counter", "pushes", "Pushes that the shard has taken, of all ranks."),
    Metric("stepwell_pushed_bytes_total", "counter", "bytes", "What their gradients were in size."),
    Metric("stepwell_retries_total", "counter", "pushes", "Pushes of these that were a worker's second or later try."),
    Metric("stepwell_refused_pushes_total", "counter", "pushes", "Pushes that were answered with an error."),
    Metric("stepwell_waiting_pushes", "gauge", "pushes", "Ranks whose push is in, while others are missing."),
    Metric("stepwell_step", "gauge", "steps", "The job's number of steps, those before a restore included."),
    Metric("stepwell_state_bytes", "gauge", "bytes", "Memory of the shard's part of the state."),
    Metric("stepwell_process_bytes", "gauge", "bytes", "Resident memory of the shard's process, with shared memory."),
    Metric("stepwell_epoch", "gauge", "1", "Rises by one with each coordinator that takes the service over."),
    Metric("stepwell_generation", "gauge", "1", "Of the shards' group, within the epoch; rises when one is lost."),
    Metric("stepwell_loss", "gauge", "1", "The last loss that the trainer has told.", _OF_SERVICE),
    Metric("stepwell_gradient_norm", "gauge", "1", "Before clipping, if a limit is set.", _OF_SERVICE),
    Metric("stepwell_d", "gauge", "1", "The estimated distance, for a rule that has one.", _OF_GROUP),
    Metric("stepwell_learning_rate", "gauge", "1", "Of each parameter group, as rank 0 sent it.", _OF_GROUP),
    Metric("stepwell_recoveries_total", "counter", "recoveries", "How often shards were brought back.", _OF_SERVICE),
    Metric("stepwell_recovery_seconds", "histogram", "seconds", "How long that took each time.", _OF_SERVICE),
)
"""All of them. docs/metrics.md shows this table; dashboards and alerts name nothing else."""

_BY_NAME = {metric.name: metric for metric in METRICS}


class Instruments:
    """This process's part of the metrics.

    Args:
        labels: What is the same for all of them.
    """

    def __init__(self, **labels: str) -> None:
        self._labels = labels
        self._made: dict[str, Any] = {}
        self._counted: dict[str, float] = {}

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge; what is not finite leaves it alone."""
        if math.isfinite(value):
            self._of(name).set(float(value), labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Put a value into a histogram."""
        self._of(name).observe(float(value), labels)

    def count(self, totals: Mapping[str, float]) -> None:
        """Bring counters up to what they have come to in this process."""
        for name, total in totals.items():
            more = total - self._counted.get(name, 0)
            if more > 0:
                self._of(name).inc(float(more))
                self._counted[name] = total

    def _of(self, name: str) -> Any:
        if name not in self._made:
            metric = _BY_NAME[name]
            made = _make(metric)
            made.set_default_tags({label: self._labels[label] for label in metric.labels if label in self._labels})
            self._made[name] = made
        return self._made[name]


def _make(metric: Metric) -> Counter | Gauge | Histogram:
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.meaning, list(SECONDS), metric.labels)
    return (Counter if metric.kind == "counter" else Gauge)(metric.name, metric.meaning, metric.labels)
