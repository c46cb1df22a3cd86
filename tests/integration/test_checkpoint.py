"""Checkpoints of services that train: resumed elsewhere, taken back, written in the middle of it all."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import stepwell
from stepwell.sharding.checkpoint import CheckpointReader
from stepwell.sharding.errors import CheckpointError, JobMismatchError, TimelineError
from stepwell.sharding.folder import read_complete
from tests.integration.conftest import Launch
from tests.integration.training import (
    D0,
    LIMIT_S,
    Oracle,
    Trainer,
    assert_same_state_dict,
    errors_on_all,
    make_workers,
    on_all,
    small_in_order,
)
from tests.zoo import NUM_STEPS, assert_same_tensors

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two workers on two shards."""

    service: stepwell.Service
    workers: list[Trainer]

    @property
    def step(self) -> int:
        return self.workers[0].step

    def train(self, num_steps: int) -> None:
        stop = self.step + num_steps
        on_all(self.workers, lambda worker: worker.run(stop))

    def refresh(self, step: int) -> None:
        """Go on at ``step`` with what the service holds."""
        on_all(self.workers, lambda worker: worker.optimizer.refresh())
        for worker in self.workers:
            worker.step = step

    def require_undisturbed(self) -> None:
        oracle = Oracle(2).to(self.step)
        for worker in self.workers:
            oracle.require_same(worker)


@pytest.fixture(scope="module")
def module_pair(module_launch: Launch) -> Pair:
    service = module_launch(2)
    return Pair(service, make_workers(service, 2))


@pytest.fixture
def pair(module_pair: Pair) -> Iterator[Pair]:
    """A pair in the middle of its training, which goes on after the test as if nothing had been."""
    module_pair.train(3)
    yield module_pair
    module_pair.train(3)
    module_pair.require_undisturbed()


def test_resume_in_another_process_on_another_number_of_shards(launch: Launch, tmp_path: Path) -> None:
    service, uri, out = launch(2), str(tmp_path / "checkpoint"), str(tmp_path / "out.pt")
    worker = Trainer(small_in_order(), stepwell.Prodigy, d0=D0, service=service).run(NUM_STEPS // 2)
    assert service.save(uri) == NUM_STEPS // 2
    worker.optimizer.close()
    command = [sys.executable, "-m", "tests.integration.resume", uri, "3", str(NUM_STEPS // 2), str(NUM_STEPS), out]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert run.returncode == 0, run.stderr
    resumed = torch.load(out)
    undisturbed = Trainer(small_in_order(), stepwell.Prodigy, d0=D0, service="inprocess").run(NUM_STEPS)
    assert_same_tensors(resumed["params"], undisturbed.params, "parameter")
    assert_same_state_dict(resumed["state_dict"], undisturbed.optimizer.state_dict())


def test_restore_takes_a_running_job_back(pair: Pair, tmp_path: Path) -> None:
    saved_step = pair.step
    pair.service.save(str(tmp_path))
    pair.train(4)
    assert pair.service.restore(str(tmp_path)) == saved_step
    for worker in pair.workers:
        worker.set_gradients()
    for error in errors_on_all(pair.workers, lambda worker: worker.optimizer.step()):
        assert isinstance(error, TimelineError)
        assert "Call refresh() on every rank" in str(error)
    pair.refresh(saved_step)
    pair.require_undisturbed()


def test_restore_tells_a_worker_that_waits_in_a_step(pair: Pair, tmp_path: Path) -> None:
    saved_step = pair.step
    pair.service.save(str(tmp_path))
    errors: list[BaseException | None] = []
    waiting = threading.Thread(
        target=lambda: errors.extend(errors_on_all(pair.workers[:1], lambda w: w.run(w.step + 1)))
    )
    waiting.start()
    deadline = time.monotonic() + LIMIT_S
    while waiting.is_alive() and time.monotonic() < deadline:
        pair.service.restore(str(tmp_path))
    assert [type(error) for error in errors] == [TimelineError]
    pair.refresh(saved_step)


def test_load_state_dict_on_all_ranks_is_one_timeline(pair: Pair) -> None:
    """The other ranks must see the timeline of rank 0's load, not the one before."""
    for _ in range(5):
        state_dict = pair.workers[0].optimizer.state_dict()
        on_all(pair.workers, lambda worker: worker.optimizer.load_state_dict(state_dict))  # noqa: B023
        pair.train(1)


def test_save_from_another_process_is_of_one_step(pair: Pair, local_ray: str, tmp_path: Path) -> None:
    uri = str(tmp_path / "checkpoint")
    code = "from stepwell.client.command_line import main; main()"
    arguments = ["save", pair.service.name, uri, "--address", local_ray, "--json"]
    began = pair.step
    saving = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    while saving.poll() is None:
        pair.train(2)
    saved = json.loads(saving.communicate(timeout=LIMIT_S)[0])
    assert began < saved["step"] < pair.step
    require_checkpoint_of(saved["step"], uri)


def require_checkpoint_of(step: int, uri: str) -> None:
    """See that a checkpoint holds what an undisturbed run has after a step, to the bit."""
    manifest, oracle = read_complete(uri), Oracle(2).to(step).run.state()
    assert (manifest.step, dict(manifest.scalars), manifest.step_counts) == (
        step,
        dict(oracle.scalars),
        oracle.step_counts,
    )
    with CheckpointReader(uri, manifest) as reader:
        for name, tensors in oracle.slots.items():
            for index, tensor in enumerate(tensors):
                read = torch.empty_like(tensor)
                reader.read(index, name, 0, read)
                assert torch.equal(read, tensor), f"{name} of parameter {index}"


def test_saves_that_nobody_waits_for_are_of_their_steps(pair: Pair, tmp_path: Path) -> None:
    """Four of them, each asked for while the one before may be being written; steps go on beside all."""
    saves = []
    for index in range(4):
        saves.append(pair.service.save(str(tmp_path / str(index)), wait=False))
        assert saves[-1].step == pair.step
        pair.train(2)
    for save in saves:
        assert save.result(LIMIT_S) == save.step
        require_checkpoint_of(save.step, save.uri)


def test_save_that_nobody_waits_for_tells_its_failure(pair: Pair, tmp_path: Path) -> None:
    uri = tmp_path / "checkpoint"
    (uri / "manifest.msgpack.tmp").mkdir(parents=True)
    save = pair.service.save(str(uri), wait=False)
    pair.train(1)
    with pytest.raises(CheckpointError, match=f"{uri}: the manifest cannot be written"):
        save.result(LIMIT_S)
    assert save.done()
    assert [path.name for path in uri.iterdir()] == ["manifest.msgpack.tmp"]


def test_service_keeps_the_last_checkpoints_of_a_run(pair: Pair, tmp_path: Path) -> None:
    for _ in range(3):
        pair.train(1)
        assert pair.service.save(str(tmp_path), keep_last=2) == pair.step
    first, last = pair.service.checkpoints(str(tmp_path))
    assert (first.step, last.step) == (pair.step - 1, pair.step)
    assert len(list(tmp_path.iterdir())) == 2
    require_checkpoint_of(last.step, last.uri)


def test_shutdown_waits_for_the_save(launch: Launch, tmp_path: Path) -> None:
    service = launch(2)
    worker = Trainer(small_in_order(), stepwell.Prodigy, d0=D0, service=service).run(3)
    save = service.save(str(tmp_path), wait=False)
    service.shutdown()
    assert save.done()
    assert read_complete(str(tmp_path)).step == worker.step


def test_save_to_an_unwritable_place_names_it_and_leaves_the_last_checkpoint(pair: Pair, tmp_path: Path) -> None:
    taken = tmp_path / "a file"
    taken.write_text("")
    with pytest.raises(CheckpointError, match="a file/checkpoint"):
        pair.service.save(str(taken / "checkpoint"))
    uri = tmp_path / "checkpoint"
    step = pair.service.save(str(uri))
    pair.train(1)
    (uri / "manifest.msgpack.tmp").mkdir()
    with pytest.raises(CheckpointError, match=f"{uri}: the manifest cannot be written"):
        pair.service.save(str(uri))
    assert read_complete(str(uri)).step == step
    pair.service.restore(str(uri))
    pair.refresh(step)


@pytest.mark.parametrize("shard", [0, 1])
def test_restore_of_a_damaged_checkpoint_changes_nothing(
    pair: Pair, launch: Launch, tmp_path: Path, shard: int
) -> None:
    pair.service.save(str(tmp_path))
    victim = sorted(tmp_path.glob("*.safetensors"))[shard]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    pair.train(1)
    with pytest.raises(CheckpointError, match=f"{victim.name}: .* of parameter .*is damaged.*use another checkpoint"):
        pair.service.restore(str(tmp_path))
    pair.train(1)
    fresh = launch(1)
    with pytest.raises(CheckpointError, match=victim.name):
        fresh.restore(str(tmp_path))
    assert fresh.status()["rule"] is None


def test_restore_that_fails_changes_nothing(pair: Pair, launch: Launch, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no complete checkpoint here"):
        pair.service.restore(str(tmp_path / "nothing"))
    uri = tmp_path / "cut"
    pair.service.save(str(uri))
    shard = sorted(uri.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=f"{shard.name} was cut short"):
        pair.service.restore(str(uri))
    optimizer = stepwell.AdamW([torch.nn.Parameter(torch.ones(5))])
    optimizer.service.save(str(tmp_path / "other"))
    with pytest.raises(JobMismatchError, match=r"rule: the service has Prodigy, checkpoint .*other has AdamW"):
        pair.service.restore(str(tmp_path / "other"))
    pair.train(1)
