"""An optimizer of a service in a cluster: its copies, and state dicts that refer to a checkpoint."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import stepwell
from tests.integration.conftest import Launch
from tests.integration.training import Oracle, Trainer, assert_same_training, make_workers, on_all, small_in_order


def _pickled(optimizer: stepwell.Prodigy) -> stepwell.Prodigy:
    copied: stepwell.Prodigy = pickle.loads(pickle.dumps(optimizer))
    return copied


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled])
def test_copy_is_detached_and_says_what_to_do(module_launch: Launch, duplicate: Callable[[Any], Any]) -> None:
    service = module_launch(1)
    worker = Trainer(small_in_order(), stepwell.Prodigy, service=service).run(2)
    copied = duplicate(duplicate(worker.optimizer))
    assert repr(copied) == repr(worker.optimizer)
    assert copied.param_groups[0]["k"] == 2
    for use in (copied.step, copied.state_dict, copied.refresh, lambda: copied.service):
        with pytest.raises(
            RuntimeError, match=f"copy of an optimizer of service '{service.name}', .* use the original"
        ):
            use()
    copied.close()
    expected = Trainer(small_in_order(), stepwell.Prodigy, service="inprocess").run(4)
    assert_same_training(worker.run(4), expected)


def test_state_dict_of_several_ranks_is_one_checkpoint(module_launch: Launch, tmp_path: Path) -> None:
    workers = make_workers(module_launch(2), 2, state_dict_form="reference", checkpoint_uri=str(tmp_path))
    oracle = Oracle(2)
    on_all(workers, lambda worker: worker.run(3))
    saved = on_all(workers, lambda worker: worker.optimizer.state_dict())
    assert saved[0]["stepwell"] == saved[1]["stepwell"] == workers[0].optimizer.state_dict()["stepwell"]
    assert (saved[0]["state"], saved[0]["stepwell"]["step"]) == ({}, 3)
    on_all(workers, lambda worker: worker.run(5))
    on_all(workers, lambda worker: worker.optimizer.load_state_dict(saved[worker.rank]))
    for worker in workers:
        worker.step = 3
    on_all(workers, lambda worker: worker.run(6))
    successor = Trainer(small_in_order(), stepwell.Prodigy, shift=9.0, d0=0.1)
    successor.optimizer.load_state_dict(workers[0].optimizer.state_dict())
    for trainer in (*workers, successor):
        if trainer is not successor:
            trainer.optimizer._reference_uri = None
        oracle.to(6).require_same(trainer)
