"""The cluster file is one that `ray up` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parents[2] / "deploy" / "cluster.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(CLUSTER.read_text())
    return loaded


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of a cluster file, after Ray has held it against its schema."""
    filled: dict[str, Any] = prepare_config(config)
    validate_config(filled)
    return filled


def test_cluster_file_is_valid(config: dict[str, Any]) -> None:
    filled = completed(config)
    (node_type,) = filled["available_node_types"].values()
    assert node_type["min_workers"] == node_type["max_workers"] == len(config["provider"]["worker_ips"])
    assert filled["head_start_ray_commands"] == config["head_start_ray_commands"]


@pytest.mark.parametrize(
    ("change", "part"),
    [({"head_start_ray_command": []}, "head_start_ray_command"), ({"docker": {"images": "stepwell"}}, "images")],
)
def test_broken_cluster_file_is_refused(config: dict[str, Any], change: dict[str, Any], part: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match=part):
        completed({**config, **change})


def test_cluster_asks_for_the_token_that_it_is_given(config: dict[str, Any]) -> None:
    (place,) = config["file_mounts"]
    assert {"--env=RAY_AUTH_MODE=token", f"--env=RAY_AUTH_TOKEN_PATH={place}"} < set(config["docker"]["run_options"])
    assert not any("--dashboard-host" in command for command in config["head_start_ray_commands"])
