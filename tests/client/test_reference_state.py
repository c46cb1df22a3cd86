"""State dicts that refer to a checkpoint of the service, in place of the state itself."""

from __future__ import annotations

import copy
import hashlib
import io
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import stepwell
from stepwell.sharding.checkpoint import write_shard
from stepwell.sharding.errors import CheckpointError, HyperparameterError, JobMismatchError
from stepwell.sharding.manifest import MANIFEST_NAME
from tests.client.lines import WAIT_S, SharedShards, SharedTransport, reached_by
from tests.client.training import assert_equal, assert_same_state, make_net, train, values_of

MAKERS = [stepwell.Prodigy, stepwell.AdamW, stepwell.LAMB]


def _form(folder: Path | str) -> dict[str, Any]:
    return {"state_dict_form": "reference", "checkpoint_uri": str(folder)}


def count_writes() -> Any:
    """Counts the shards' files that are written within its block."""
    return mock.patch("stepwell.client.inprocess.write_shard", wraps=write_shard)


def _whole(optimizer: stepwell.ServiceOptimizer) -> dict[str, Any]:
    """The state in torch's form, whatever form the optimizer gives."""
    with mock.patch.object(optimizer, "_reference_uri", None):
        return optimizer.state_dict()


@pytest.mark.parametrize("form", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MAKERS)
def test_reference_resumes_to_the_bit_in_any_optimizer(
    make: Callable[..., stepwell.ServiceOptimizer], dtype: torch.dtype, form: str, tmp_path: Path
) -> None:
    net, resumed = make_net(dtype), make_net(dtype)
    optimizer = make(net.parameters(), lr=0.01, **_form(tmp_path))
    train(net, optimizer, range(4))
    optimizer.param_groups[0]["lr"] = 0.005
    saved = optimizer.state_dict()
    manifest = (tmp_path / "step-00000004" / MANIFEST_NAME).read_bytes()
    digest = hashlib.sha256(manifest).hexdigest()
    assert saved["stepwell"] == {"uri": str(tmp_path / "step-00000004"), "step": 4, "digest": digest}
    assert (saved["state"], saved["param_groups"]) == ({}, _whole(optimizer)["param_groups"])
    options = _form(tmp_path / "other") if form == "reference" else {}
    successor = make(resumed.parameters(), num_shards=3, **options)
    train(resumed, successor, range(50, 52))
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    successor.load_state_dict(torch.load(file, weights_only=True))
    assert_equal(resumed.parameters(), net.parameters())
    assert_same_state(_whole(successor), _whole(optimizer))
    assert successor.service.status()["step"] == 4
    for each, its_optimizer in ((net, optimizer), (resumed, successor)):
        train(each, its_optimizer, range(4, 7))
    assert_equal(resumed.parameters(), net.parameters())


def test_reference_lies_under_any_uri() -> None:
    net = make_net()
    optimizer = stepwell.AdamW(net.parameters(), **_form("memory://run-7/"))
    train(net, optimizer, range(2))
    saved = optimizer.state_dict()
    assert saved["stepwell"]["uri"] == "memory://run-7/step-00000002"
    train(net, optimizer, range(2, 4))
    optimizer.load_state_dict(saved)
    assert optimizer.service.status()["step"] == 2


def test_state_dict_between_the_same_steps_is_saved_once(tmp_path: Path) -> None:
    net = make_net()
    optimizer = stepwell.Prodigy(net.parameters(), **_form(tmp_path))
    train(net, optimizer, range(2))
    with count_writes() as write:
        saved = [optimizer.state_dict()["stepwell"] for _ in range(3)]
        assert write.call_count == 1
        train(net, optimizer, [2])
        assert optimizer.state_dict()["stepwell"]["step"] == 3
        assert write.call_count == 2
    assert saved == [saved[0]] * 3
    optimizer.load_state_dict({**optimizer.state_dict(), "stepwell": saved[0]})
    assert optimizer.param_groups[0]["k"] == 2


@pytest.mark.parametrize("what", ["folder", "manifest", "state"])
def test_state_dict_is_saved_anew_when_the_first_is_gone_or_old(what: str, tmp_path: Path) -> None:
    net = make_net()
    optimizer = stepwell.AdamW(net.parameters(), **_form(tmp_path))
    train(net, optimizer, range(2))
    first = optimizer.state_dict()
    if what == "folder":
        shutil.rmtree(tmp_path)
    elif what == "manifest":
        (tmp_path / "step-00000002" / MANIFEST_NAME).write_bytes(b"another")
    else:
        optimizer.load_state_dict(_whole(optimizer))
    second = optimizer.state_dict()
    assert second["stepwell"]["digest"] != first["stepwell"]["digest"]
    optimizer.load_state_dict(second)
    with pytest.raises(CheckpointError, match="it was replaced since the state dict was made"):
        optimizer.load_state_dict(first)


def test_state_dict_is_saved_anew_after_a_group_was_added(tmp_path: Path) -> None:
    net = make_net()
    optimizer = stepwell.AdamW(net.parameters(), **_form(tmp_path))
    train(net, optimizer, range(2))
    before = optimizer.state_dict()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    after = optimizer.state_dict()
    assert after["stepwell"]["digest"] != before["stepwell"]["digest"]
    optimizer.load_state_dict(after)


def test_all_ranks_get_the_same_reference_and_load_it(tmp_path: Path) -> None:
    shared, nets = SharedShards(num_shards=2), [make_net() for _ in range(3)]
    together = threading.Barrier(3, timeout=WAIT_S)

    def work(rank: int) -> tuple[dict[str, Any], list[torch.Tensor]]:
        optimizer = stepwell.Prodigy(nets[rank].parameters(), rank=rank, world_size=3, **_form(tmp_path))
        train(nets[rank], optimizer, range(2))
        with shared.changed:  # the coordinator's lock, of which there is none here
            saved = optimizer.state_dict()
        after_two = values_of(nets[rank].parameters())
        train(nets[rank], optimizer, range(2, 4))
        together.wait()  # a load sweeps away the result that another rank has yet to fetch
        optimizer.load_state_dict(saved)
        assert_equal(nets[rank].parameters(), after_two)
        assert optimizer.param_groups[0]["k"] == 2
        train(nets[rank], optimizer, range(2, 4))
        return saved, values_of(nets[rank].parameters())

    with (
        reached_by(lambda rank: SharedTransport(shared, rank)),
        count_writes() as write,
        ThreadPoolExecutor(3) as pool,
    ):
        results = [future.result(timeout=60) for future in [pool.submit(work, rank) for rank in range(3)]]
    assert write.call_count == 2, "two shards, once"
    for saved, values in results[1:]:
        assert saved == results[0][0]
        assert_equal(values, results[0][1])


def test_copy_saves_in_the_same_form(tmp_path: Path) -> None:
    optimizer = copy.deepcopy(stepwell.AdamW(make_net().parameters(), **_form(tmp_path)))
    assert optimizer.state_dict()["stepwell"]["uri"] == str(tmp_path / "step-00000000")


# What it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dict_form": "reference"}, "checkpoint_uri: expected where to save to, .* got None"),
        (
            {"state_dict_form": "reference", "checkpoint_uri": ""},
            "checkpoint_uri: expected where to save to, .* got ''",
        ),
        ({"state_dict_form": "sharded"}, "state_dict_form: expected 'torch' or 'reference', got 'sharded'"),
    ],
)
def test_construction_refuses_a_form(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stepwell.AdamW(make_net().parameters(), **options)


def _without_manifest(saved: dict[str, Any]) -> None:
    (Path(saved["stepwell"]["uri"]) / MANIFEST_NAME).unlink()


def _damaged(saved: dict[str, Any]) -> None:
    path = Path(saved["stepwell"]["uri"]) / MANIFEST_NAME
    path.write_bytes(path.read_bytes()[:-1])
    saved["stepwell"]["digest"] = hashlib.sha256(path.read_bytes()).hexdigest()


def _other_digest(saved: dict[str, Any]) -> None:
    saved["stepwell"]["digest"] = "0" * 64


def _not_a_reference(saved: dict[str, Any]) -> None:
    saved["stepwell"] = "somewhere"


def _other_groups(saved: dict[str, Any]) -> None:
    saved["param_groups"].append({**saved["param_groups"][0], "params": []})


def _bad_lr(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["lr"] = -1.0


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (_without_manifest, CheckpointError, "there is no complete checkpoint here"),
        (_damaged, CheckpointError, "the manifest is damaged"),
        (_other_digest, CheckpointError, "expected the checkpoint whose manifest has SHA-256 0{64}, got [0-9a-f]{64}"),
        (
            _not_a_reference,
            CheckpointError,
            "expected 'stepwell' to hold a checkpoint's uri, step and digest, got 'som",
        ),
        (_other_groups, ValueError, "different number of parameter groups: expected 1, got 2"),
        (_bad_lr, HyperparameterError, "group 0: Invalid learning rate: -1.0"),
    ],
)
def test_load_refuses_what_does_not_fit_and_changes_nothing(
    spoil: Callable[[dict[str, Any]], None], error: type[Exception], message: str, tmp_path: Path
) -> None:
    net = make_net()
    optimizer = stepwell.Prodigy(net.parameters(), **_form(tmp_path))
    train(net, optimizer, range(2))
    saved = optimizer.state_dict()
    train(net, optimizer, range(2, 4))
    before, values, status = _whole(optimizer), values_of(net.parameters()), optimizer.service.status()
    spoil(saved)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    assert_same_state(_whole(optimizer), before)
    assert_equal(net.parameters(), values)
    assert optimizer.service.status() == status
    train(net, optimizer, [4])


@pytest.mark.parametrize("flatten", [False, True])
def test_reference_that_was_lost_on_the_way_resets_nothing(flatten: bool, tmp_path: Path) -> None:
    net, options = make_net(), StateDictOptions(flatten_optimizer_state_dict=flatten)
    optimizer = stepwell.Prodigy(net.parameters(), **_form(tmp_path))
    train(net, optimizer, range(2))
    saved = get_optimizer_state_dict(net, optimizer, options=options)
    before = _whole(optimizer)
    with pytest.raises(ValueError, match="expected 'stepwell' or a state, got neither"):
        set_optimizer_state_dict(net, optimizer, saved, options=options)
    assert_same_state(_whole(optimizer), before)
    optimizer.load_state_dict(before)
    assert_same_state(_whole(optimizer), before)


def test_load_refuses_the_checkpoint_of_another_rule(tmp_path: Path) -> None:
    net = make_net()
    saved = stepwell.Adam(net.parameters(), **_form(tmp_path)).state_dict()
    with pytest.raises(JobMismatchError, match=r"rule: the service has AdamW, checkpoint .* has Adam"):
        stepwell.AdamW(net.parameters()).load_state_dict(saved)
