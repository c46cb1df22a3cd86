"""Models that torch has sharded or replicated: FSDP2, HSDP and DDP over real processes, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from stepwell.server import cluster
from tests.integration.conftest import Launch
from tests.integration.model_worker import migrate, train

LIMIT_S = 90.0
D0 = 1e-3


def run_ranks(
    mode: str, world_size: int, folder: Path, service: str, options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Train in ``world_size`` processes; every rank's results."""
    (folder / "options.json").write_text(json.dumps(options))
    environment = {**os.environ, "STEPWELL_SERVICE": service, "RAY_ADDRESS": cluster.address()}
    commands = [
        [sys.executable, "-m", "tests.integration.model_worker", mode, str(rank), str(world_size), str(folder)]
        for rank in range(world_size)
    ]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=LIMIT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world_size, "\n".join(outputs)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


def in_one_process(options: Mapping[str, Any]) -> dict[str, Any]:
    return train("plain", 0, 1, {**options, "service": "inprocess"})


@pytest.mark.parametrize(
    ("mode", "world_size", "gradients", "dtype"),
    [
        ("fsdp2", 2, "sharded", "float32"),
        ("fsdp2", 3, "sharded", "float32"),
        ("hsdp", 4, "sharded", "float64"),
        ("ddp", 2, "replicated", "float32"),
        ("ddp", 3, "replicated", "float64"),
        ("ddp-local", 2, "local", "float64"),
    ],
)
def test_prodigy_gives_what_one_process_does(
    mode: str, world_size: int, gradients: str, dtype: str, launch: Launch, tmp_path: Path
) -> None:
    """A group added on the way, a parameter changed by hand and a state dict saved and loaded included.

    Small steps: else rounding comes back through the gradient, in one process as in several.
    """
    options = {"d0": D0, "d_coef": 0.1, "weight_decay": 0.01, "add": 1, "dtype": dtype}
    expected = in_one_process(options)
    ranks = run_ranks(mode, world_size, tmp_path, launch(2).name, {**options, "dcp": 1})
    assert expected["scalars"]["d"] > 2 * D0
    tolerance = 1e-6 if dtype == "float32" else 1e-10
    for results in ranks:
        assert results["gradients"] == gradients
        assert results["scalars"] == ranks[0]["scalars"]
        assert results["scalars"]["d"] == pytest.approx(expected["scalars"]["d"], rel=tolerance)
        for param, other, wanted in zip(results["params"], ranks[0]["params"], expected["params"], strict=True):
            assert torch.equal(param, other)
            torch.testing.assert_close(param, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["fsdp2", "ddp"])
def test_sgd_is_not_divided_twice(mode: str, launch: Launch, tmp_path: Path) -> None:
    """Prodigy and Adam hide a wrong factor in the gradient, SGD and the gradient's norm do not.

    The gradient is scaled, and overflows on one rank in one step: that moves every rank's scale.
    """
    options = {"rule": "SGD", "lr": 0.1, "max_grad_norm": 0.5, "overflows_at": 7}
    expected = in_one_process(options)
    assert (expected["scale"], expected["skipped"]) == (1024.0, 1), (
        "halved by the overflow, doubled by eight good steps"
    )
    for results in run_ranks(mode, 2, tmp_path, launch(2).name, options):
        assert (results["scale"], results["skipped"]) == (1024.0, 1)
        for param, wanted in zip(results["params"], expected["params"], strict=True):
            torch.testing.assert_close(param, wanted, rtol=1e-5, atol=1e-6)


def test_run_begun_with_torchs_optimizer_goes_on_with_ours(launch: Launch, tmp_path: Path) -> None:
    """torch's state dict of a sharded model holds each rank's part as a DTensor."""
    options = {"lr": 0.01, "weight_decay": 0.1}
    expected = migrate("plain", 0, 1, dict(options))
    for results in run_ranks("fsdp2", 2, tmp_path, launch(2).name, {**options, "migrate": 1}):
        for param, wanted in zip(results["params"], expected["params"], strict=True):
            torch.testing.assert_close(param, wanted, rtol=1e-10, atol=1e-10)


def test_replicas_with_gradients_of_their_own_are_told(launch: Launch, tmp_path: Path) -> None:
    """Each would push a share of its own gradient, and nobody would see it."""
    with pytest.raises(AssertionError, match=r"JobMismatchError: gradients='replicated': expected the same gradients"):
        run_ranks("plain", 2, tmp_path, launch(1).name, {"gradients": "replicated"})
