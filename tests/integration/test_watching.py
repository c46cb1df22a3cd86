"""A service that is watched: its history, its metrics as Prometheus gets them, its commands and its log."""

from __future__ import annotations

import csv
import json
import math
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

import stepwell
from stepwell.server.metrics import METRICS, PREFIX, Metric
from tests.command_line import Cli
from tests.integration.conftest import launcher
from tests.integration.training import D0, Trainer, small_in_order
from tests.integration.victims import Victims

LIMIT_S = 90.0
KILLED_AFTER, NUM_STEPS = 9, 15
BY_CHANCE = {"stepwell_aborted_steps_total", "stepwell_refused_pushes_total", "stepwell_retries_total"}
"""Counters that appear with their first count: whether there is one depends on when the shard dies."""


@pytest.fixture(scope="module", autouse=True)
def _settings() -> Iterator[None]:
    """Ray's processes report once a second, in place of ten; ours log as JSON."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        patch.setenv("STEPWELL_LOG", "json")
        yield


@pytest.fixture(scope="module")
def service(_settings: None, local_ray: str) -> Iterator[stepwell.Service]:
    """A service of two shards after some steps, one of them skipped, within which its first shard was lost."""
    with launcher() as launch:
        service = launch(2, redundancy=1)
        trainer = Trainer(small_in_order(), stepwell.Prodigy, service=service, d0=D0, max_grad_norm=math.inf)
        victims = Victims(service)
        for step in range(1, NUM_STEPS + 1):
            trainer.set_gradients()
            if step == 3:
                gradient = trainer.params[0].grad
                assert gradient is not None
                gradient.fill_(math.nan)
            trainer.optimizer.report(loss=1.0 / step)
            trainer.take_step()
            if step == KILLED_AFTER:
                victims.kill(0)
        yield service
        trainer.optimizer.close()


def test_history_outlives_the_shard_that_keeps_it(service: stepwell.Service) -> None:
    columns = service.history()
    assert columns["step"] == columns["sequence"] == list(range(1, NUM_STEPS + 1))
    assert columns["loss"] == [1.0 / step for step in range(1, NUM_STEPS + 1)]
    assert columns["skipped_steps"] == [0, 0, *[1] * (NUM_STEPS - 2)]
    assert [norm for norm in columns["grad_norm"] if not math.isfinite(norm)] == [columns["grad_norm"][2]]
    assert columns["d"][-1] == service.status()["scalars"]["d"]
    assert all(columns[f"{phase}_s"][-1] >= 0 for phase in ("gather", "log", "vote", "reduce", "apply"))
    assert service.history(2)["step"] == [NUM_STEPS - 1, NUM_STEPS]


def test_prometheus_gets_every_metric(service: stepwell.Service) -> None:
    certain, deadline = [metric for metric in METRICS if metric.name not in BY_CHANCE], time.monotonic() + LIMIT_S
    of_second = {"service": service.name, "shard": "1"}
    while True:
        families = scrape()
        missing = [metric.name for metric in certain if not is_there(metric, families, service.name)]
        if not missing and values(families, "stepwell_steps_total", **of_second) == NUM_STEPS:
            break
        assert time.monotonic() < deadline, f"never published: {missing or 'the last steps'}; there: {sorted(families)}"
        time.sleep(1.0)
    assert values(families, "stepwell_pushes_total", **of_second) >= NUM_STEPS
    assert values(families, "stepwell_skipped_steps_total", **of_second) == 1
    assert values(families, "stepwell_step_seconds_count", **of_second, phase="vote") == NUM_STEPS
    assert values(families, "stepwell_step", service=service.name, shard="0") == NUM_STEPS
    assert values(families, "stepwell_recoveries_total", service=service.name) == 1
    assert values(families, "stepwell_d", service=service.name) == service.status()["scalars"]["d"]


def scrape() -> dict[str, Family]:
    """What the node's metrics port tells, by the metric's name."""
    untyped_ray: Any = ray
    (node,) = untyped_ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=LIMIT_S) as reply:
        text = reply.read().decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def is_there(metric: Metric, families: dict[str, Family], service: str) -> bool:
    """Whether it is published for a service, as the kind that it is, with the labels that it has."""
    family = families.get(PREFIX + metric.name.removesuffix("_total" if metric.kind == "counter" else ""))
    if family is None or family.type != metric.kind:
        return False
    ours = [sample.labels for sample in family.samples if sample.labels.get("service") == service]
    return any(labels.keys() >= set(metric.labels) for labels in ours)


def values(families: dict[str, Family], sample_name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels, whichever process they are of."""
    samples = [
        sample for family in families.values() for sample in family.samples if sample.name == PREFIX + sample_name
    ]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def test_commands_show_the_run(service: stepwell.Service, cli: Cli, tmp_path: Path) -> None:
    status = json.loads(cli("status", service.name, "--json").out)
    assert status["last_step"]["loss"] == 1.0 / NUM_STEPS
    assert status["steps_per_s"] > 0
    shown = cli("status", service.name).out
    assert re.search(r"last step .* ms: gather .*, log .*, vote .*, reduce .*, apply", shown), shown

    top = cli("top", service.name, "--once").out
    assert f"{service.name}  Prodigy  2 shards  1 workers" in top
    assert "state of each shard in MiB" in top

    picture, table = tmp_path / "run.svg", tmp_path / "run.csv"
    run = cli("plot", service.name, "-o", str(picture), "--csv", str(table), "--json")
    assert json.loads(run.out)["written"] == [str(picture), str(table)]
    assert picture.read_text().count("<svg") == 1
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, NUM_STEPS + 1))


def test_log_lines_say_what_they_are_of(service: stepwell.Service) -> None:
    """The coordinator has warned of the lost shard."""
    untyped_ray: Any = ray
    logs = Path(untyped_ray._private.worker._global_node.get_logs_dir_path())
    lines = [line for path in logs.glob("worker-*.err") for line in path.read_text().splitlines()]
    ours = [json.loads(line) for line in lines if line.startswith("{")]
    (lost,) = [line for line in ours if "shard 0 is lost" in line["message"]]
    assert (lost["service"], lost["level"], lost["coordinator"]) == (service.name, "WARNING", 1)
