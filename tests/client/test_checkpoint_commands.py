"""`stepwell checkpoint ...`, which needs no service and no cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import stepwell
from stepwell.sharding.manifest import MANIFEST_NAME
from tests.command_line import Cli


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Two checkpoints of a small run."""
    param = torch.nn.Parameter(torch.ones(1000))
    optimizer = stepwell.AdamW([param], service=stepwell.InProcessService(num_shards=2, kernel="eager"))
    for _ in range(2):
        param.grad = torch.ones(1000)
        optimizer.step()
        optimizer.service.save(str(tmp_path / "run"), keep_last=2)
    return tmp_path / "run"


def flip_last_bit(folder: Path) -> str:
    victim = max(folder.glob("*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    return victim.name


def test_verify_of_what_is_intact(cli: Cli, run_folder: Path) -> None:
    uri = str(run_folder / "step-00000002")
    run = cli("checkpoint", "verify", uri)
    assert (run.code, run.err) == (0, "")
    assert run.out.startswith("intact: step 2 of AdamW, ")
    assert json.loads(cli("checkpoint", "verify", uri, "--json").out) == {"uri": uri, "intact": True, "damages": []}


def test_verify_of_what_is_damaged_has_a_line_for_each(cli: Cli, run_folder: Path) -> None:
    folder = run_folder / "step-00000001"
    damaged, missing = flip_last_bit(folder), min(folder.glob("*.safetensors"))
    missing.unlink()
    run = cli("checkpoint", "verify", str(folder))
    assert (run.code, run.err) == (1, "")
    assert run.out.splitlines() == [
        f"damaged: {missing.name}: is missing",
        f"damaged: {damaged}: 0/exp_avg_sq/512 (exp_avg_sq of parameter 0, 488 elements): "
        "is damaged: it has not the digest it should",
    ]
    run = cli("checkpoint", "verify", str(folder), "--json")
    found = json.loads(run.out)
    assert (run.code, found["intact"], len(found["damages"])) == (1, False, 2)
    assert found["damages"][0] == {"file": missing.name, "tensor": "", "problem": "is missing"}


def test_verify_of_a_manifest_that_is_damaged_or_missing(cli: Cli, run_folder: Path) -> None:
    (run_folder / "step-00000001" / MANIFEST_NAME).write_bytes(b"")
    (run_folder / "step-00000002" / MANIFEST_NAME).unlink()
    for step, problem in ((1, "the manifest is damaged"), (2, "there is no complete checkpoint here")):
        run = cli("checkpoint", "verify", str(run_folder / f"step-0000000{step}"))
        assert run.code == 1
        assert run.out.startswith(f"damaged: {MANIFEST_NAME}: {run_folder}")
        assert problem in run.out


def test_list_has_what_is_complete(cli: Cli, run_folder: Path) -> None:
    listed = json.loads(cli("checkpoint", "list", str(run_folder), "--json").out)
    assert listed["uri"] == str(run_folder)
    assert [each["step"] for each in listed["checkpoints"]] == [1, 2]
    assert listed["checkpoints"][1]["uri"] == str(run_folder / "step-00000002")
    (run_folder / "step-00000001" / MANIFEST_NAME).unlink()
    run = cli("checkpoint", "list", str(run_folder))
    assert (run.code, run.err) == (0, "")
    assert "AdamW" in run.out
    assert "step-00000001" not in run.out
    assert cli("checkpoint", "list", str(run_folder / "nowhere")).out.startswith("no complete checkpoint in")
