"""The table of metrics against what names them: the page, the dashboard and the alert rules; and how a shard counts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

from stepwell.optim import ProdigyRule
from stepwell.server.collective import Generation
from stepwell.server.meter import ShardMeter, Tally
from stepwell.server.metrics import METRICS, PREFIX, Metric
from stepwell.sharding.errors import MissingRankError, ShardLostError
from stepwell.sharding.reports import StepResult
from stepwell.sharding.stopwatch import PHASES
from stepwell.sharding.vote import Decision
from tests.zoo import Run, small

ROOT = Path(__file__).parents[2]
FUNCTIONS = {
    "by", "changes", "histogram_quantile", "increase", "max", "min", "min_over_time", "or", "rate", "sum",
}  # fmt: skip


def samples() -> dict[str, Metric]:
    """What Prometheus stores, by name."""
    suffixes = {"counter": [""], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    return {PREFIX + metric.name + suffix: metric for metric in METRICS for suffix in suffixes[metric.kind]}


def dashboard_queries() -> Iterator[str]:
    dashboard = json.loads((ROOT / "deploy/grafana/stepwell.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield re.sub(r"label_values\((\w+), (\w+)\)", r"max by (\2) (\1)", variable["query"]["query"])


def alert_queries() -> Iterator[str]:
    for group in yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]


def misnamed(query: str) -> list[str]:
    """What a query names that is no sample of ours, no label of the sample's, or no function that we know."""
    query = re.sub(r'"[^"]*"|\[[^]]*\]', "", query)
    names = set(re.findall(r"[a-zA-Z_:][\w:]*", query))
    metrics = [samples()[name] for name in names if name in samples()]
    labels = {label for metric in metrics for label in metric.labels} | ({"le"} if "_bucket" in query else set())
    wrong = names - samples().keys() - labels - FUNCTIONS
    return sorted(wrong) if metrics else [query]


@pytest.mark.parametrize("query", [*dashboard_queries(), *alert_queries()])
def test_query_names_what_exists(query: str) -> None:
    assert misnamed(query) == []


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ("rate(ray_stepwell_stepz_total[5m]) / ray_stepwell_step", ["ray_stepwell_stepz_total"]),
        ("ray_stepwell_step_seconds / ray_stepwell_step", ["ray_stepwell_step_seconds"]),
        ('max by (phase) (ray_stepwell_step{service="a"})', ["phase"]),
        ("sum by (le) (ray_stepwell_step)", ["le"]),
        ("ray_node_mem", ["ray_node_mem"]),
    ],
)
def test_query_that_names_something_else_is_told(query: str, wrong: list[str]) -> None:
    assert misnamed(query) == wrong


def test_alert_rules_have_what_prometheus_and_a_person_need() -> None:
    (group,) = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text())["groups"]
    assert len({rule["alert"] for rule in group["rules"]}) == len(group["rules"])
    for rule in group["rules"]:
        assert rule.keys() - {"for"} == {"alert", "expr", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"].keys() == {"summary", "action"}


def table(page: str, source: str) -> list[str]:
    found = re.search(rf"<!-- from {re.escape(source)} -->\n(.*?)<!-- end -->", page, flags=re.DOTALL)
    assert found is not None
    return found[1].splitlines()[2:]


def test_page_shows_the_tables_of_the_code() -> None:
    page = (ROOT / "docs/metrics.md").read_text()
    assert table(page, "server/metrics.py") == [
        f"| `{PREFIX}{metric.name}` | {metric.kind} | {metric.unit} | {', '.join(metric.labels)} | {metric.meaning} |"
        for metric in METRICS
    ]
    assert table(page, "sharding/stopwatch.py") == [f"| `{name}` | {meaning} |" for name, meaning in PHASES.items()]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_name_says_kind_and_unit(metric: Metric) -> None:
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    for unit in ("bytes", "seconds"):
        assert (unit in metric.name) == (metric.unit == unit)
    assert metric.meaning.endswith(".")


# How a shard counts


class Recorder:
    """In the place of Ray's metrics: what was published, by name and labels."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], list[float]] = {}

    def make(self, metric: Metric) -> Any:
        made = mock.Mock()
        defaults: dict[str, str] = {}
        made.set_default_tags.side_effect = defaults.update

        def record(value: float, labels: dict[str, str] | None = None) -> None:
            tags = {**defaults, **(labels or {})}
            assert tags.keys() == set(metric.labels), metric.name
            self.values.setdefault((metric.name, frozenset(tags.items())), []).append(value)

        made.inc.side_effect = made.set.side_effect = made.observe.side_effect = record
        return made

    def of(self, name: str, **labels: str) -> list[float]:
        return self.values.get((name, frozenset(labels.items())), [])


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr("stepwell.server.metrics._make", recorder.make)
    return recorder


def result(decision: Decision) -> StepResult:
    return StepResult(1, decision, {}, MissingRankError("gone") if decision is Decision.ABORT else None)


def test_meter_publishes_what_came_up_since_the_last_time(recorder: Recorder) -> None:
    run, tally = Run(small(), ProdigyRule(d0=0.1), rank_0={"loss": 2.5}), Tally()
    meter = ShardMeter("trainer", 0, tally, lambda: (run.group.shards[0], Generation(2, 3)))
    (push,) = run.pushes()
    for attempt in (0, 0, 1):
        tally.take(run.pushes(attempt=attempt)[0])
    run.step()
    seconds = {"vote": 0.25, "apply": 0.5}
    tally.end(result(Decision.COMMIT), seconds)
    tally.end(result(Decision.SKIP), seconds)
    tally.end(result(Decision.ABORT), seconds)
    tally.end(ShardLostError("gone"), seconds)
    meter.publish()
    meter.publish()
    tally.end(result(Decision.COMMIT), seconds)
    tally.refuse()
    meter.publish()
    of_shard = {"service": "trainer", "shard": "0"}
    size = sum(part.nbytes for part in push.gradient)
    assert size > 0
    expected = {
        "stepwell_pushes_total": [3],
        "stepwell_pushed_bytes_total": [3 * size],
        "stepwell_retries_total": [1],
        "stepwell_refused_pushes_total": [1],
        "stepwell_steps_total": [2, 1],
        "stepwell_skipped_steps_total": [1],
        "stepwell_aborted_steps_total": [1],
        "stepwell_epoch": [2] * 3,
        "stepwell_generation": [3] * 3,
        "stepwell_step": [1] * 3,
        "stepwell_waiting_pushes": [0] * 3,
        "stepwell_state_bytes": [run.group.shards[0].buffers.size_bytes] * 3,
    }
    assert {name: recorder.of(name, **of_shard) for name in expected} == expected
    assert recorder.of("stepwell_step_seconds", **of_shard, phase="vote") == [0.25] * 3
    assert recorder.of("stepwell_loss", service="trainer") == [2.5] * 3
    assert recorder.of("stepwell_d", service="trainer", group="0") == [run.group.shards[0].scalars["d"]] * 3
    assert recorder.of("stepwell_learning_rate", service="trainer", group="1") == [1.0] * 3
    assert min(recorder.of("stepwell_process_bytes", **of_shard)) > 2**20


def test_meter_of_another_shard_leaves_to_the_first_what_all_have_in_common(recorder: Recorder) -> None:
    run = Run(small(), ProdigyRule(), num_shards=2)
    meter = ShardMeter("trainer", 1, Tally(), lambda: (run.group.shards[1], Generation(1, 1)))
    run.step()
    meter.publish()
    assert recorder.of("stepwell_step", service="trainer", shard="1") == [1]
    assert not [name for name, _ in recorder.values if name in ("stepwell_d", "stepwell_learning_rate")]


def test_meter_without_a_job_publishes_that_the_process_lives(recorder: Recorder) -> None:
    ShardMeter("trainer", 0, Tally(), lambda: (None, Generation(0, 0))).publish()
    assert {name for name, _ in recorder.values} == {"stepwell_epoch", "stepwell_generation", "stepwell_process_bytes"}


def test_gauge_keeps_its_value_where_there_is_no_number(recorder: Recorder) -> None:
    run = Run(small(), ProdigyRule(), rank_0={"loss": torch.inf})
    run.step()
    ShardMeter("trainer", 0, Tally(), lambda: (run.group.shards[0], Generation(1, 1))).publish()
    assert recorder.of("stepwell_loss", service="trainer") == []
