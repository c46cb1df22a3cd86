"""A run's folder of checkpoints: which are listed, which stay, and what is cleared away."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

import stepwell
from stepwell.sharding.checkpoint import find_damages, write_shard
from stepwell.sharding.errors import CheckpointAccessError, CheckpointError, StepwellError
from stepwell.sharding.manifest import MANIFEST_NAME, shard_file_name
from tests.client.training import make_net, train
from tests.gated_files import LIMIT_S, gated


class Run:
    """A training script that saves into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.uri, self.net = folder, str(folder), make_net()
        self.service = stepwell.InProcessService(num_shards=2, kernel="eager")
        self.optimizer = stepwell.AdamW(self.net.parameters(), service=self.service)
        self.step = 0

    def train(self, num_steps: int = 1) -> None:
        train(self.net, self.optimizer, range(self.step, self.step + num_steps))
        self.step += num_steps

    def save(self, keep_last: int, num_saves: int = 1) -> None:
        for _ in range(num_saves):
            self.train()
            assert self.service.save(self.uri, keep_last=keep_last) == self.step

    def listed(self) -> list[int]:
        return [checkpoint.step for checkpoint in self.service.checkpoints(self.uri)]

    def folders(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path / "run")
    yield made
    made.optimizer.close()


def test_last_checkpoints_stay(run: Run) -> None:
    assert run.listed() == []
    for num_saved in range(1, 4):
        run.save(keep_last=3)
        assert run.listed() == list(range(1, num_saved + 1))
    run.save(keep_last=3, num_saves=2)
    assert run.listed() == [3, 4, 5]
    assert run.folders() == ["step-00000003", "step-00000004", "step-00000005"]
    run.save(keep_last=1)
    assert run.listed() == [6]
    assert run.folders() == ["step-00000006"]


def test_listed_checkpoint_is_described_and_restores(run: Run) -> None:
    before = time.time()
    run.save(keep_last=2, num_saves=2)
    first, last = run.service.checkpoints(run.uri)
    assert (last.uri, last.step, last.rule) == (f"{run.uri}/step-00000002", 2, "AdamW")
    assert before <= first.saved_at < last.saved_at <= time.time()
    assert last.size_bytes == sum(path.stat().st_size for path in Path(last.uri).glob("*.safetensors"))
    assert find_damages(last.uri) == []
    assert run.service.checkpoints(last.uri) == [last]
    run.train(3)
    assert run.service.restore(first.uri) == 1


def test_save_tells_where_it_went(run: Run) -> None:
    run.train(7)
    save = run.service.save(run.uri, keep_last=2, wait=False)
    assert (save.uri, save.step) == (f"{run.uri}/step-00000007", 7)
    assert save.result(LIMIT_S) == 7
    assert run.service.save(run.uri, keep_last=2) == 7
    assert run.listed() == [7]


def test_run_that_was_taken_back_keeps_what_it_writes_now(run: Run) -> None:
    """Step 5 is of a history that was given up: older than the new step 2, though its number is greater."""
    run.save(keep_last=10, num_saves=5)
    run.service.restore(f"{run.uri}/step-00000001")
    run.optimizer.refresh()
    run.step = 1
    run.save(keep_last=2)
    assert run.listed() == [5, 2]
    run.save(keep_last=1)
    assert run.listed() == [3]


@pytest.mark.parametrize("num_kept", [0, -1])
def test_keeping_none_is_refused(run: Run, num_kept: int) -> None:
    run.train()
    with pytest.raises(ValueError, match=f"keep_last: expected at least 1, got {num_kept}"):
        run.service.save(run.uri, keep_last=num_kept)
    assert not run.folder.exists()


# Interrupted and damaged ones


def interrupt_save(run: Run, uri: str, num_files: int) -> None:
    """What a process that was killed leaves behind."""
    for index, shard in enumerate(run.service.group.shards[:num_files]):
        write_shard(shard.snapshot(), uri, shard_file_name("0123456789ab", index, 2))
    (Path(uri) / f"{shard_file_name('0123456789ab', 1, 2)}.tmp").write_bytes(b"half")
    (Path(uri) / f"{MANIFEST_NAME}.tmp").write_bytes(b"half")


def test_interrupted_save_is_not_listed_and_the_next_one_clears_it_away(run: Run) -> None:
    run.save(keep_last=2, num_saves=2)
    run.train()
    interrupt_save(run, f"{run.uri}/step-00000003", 2)
    assert run.listed() == [1, 2]
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        run.service.restore(f"{run.uri}/step-00000003")
    run.save(keep_last=2)
    assert run.folders() == ["step-00000002", "step-00000004"]


def test_interrupted_save_over_a_checkpoint_is_cleared_away_by_the_next(run: Run) -> None:
    run.train()
    run.service.save(run.uri)
    interrupt_save(run, run.uri, 1)
    (run.folder / "notes.safetensors").write_bytes(b"somebody else's")
    assert run.listed() == [1]
    run.train()
    run.service.save(run.uri)
    assert len(run.folders()) == 2 + 1 + 1
    assert "notes.safetensors" in run.folders()
    assert find_damages(run.uri) == []


def test_damaged_checkpoints_do_not_count_for_the_good_ones(run: Run) -> None:
    """Two are kept: with 3 and 4 cut short, 2 is the last good one beside the new one."""
    run.save(keep_last=4, num_saves=4)
    for step in (3, 4):
        victim = next((run.folder / f"step-0000000{step}").glob("*-00001-of-00002.safetensors"))
        victim.write_bytes(victim.read_bytes()[:-1])
    assert run.listed() == [1, 2]
    run.save(keep_last=2)
    assert run.listed() == [2, 5]
    assert run.folders() == ["step-00000002", "step-00000005"]


def test_save_that_fails_removes_nothing(run: Run) -> None:
    run.save(keep_last=2, num_saves=2)
    run.train()
    (run.folder / "step-00000003").write_bytes(b"a file in the way")
    with pytest.raises(CheckpointError, match="step-00000003"):
        run.service.save(run.uri, keep_last=1)
    assert run.listed() == [1, 2]


def test_what_is_none_of_ours_stays(run: Run) -> None:
    run.save(keep_last=1)
    kept = [run.folder / "step-00000001" / "loss.txt", run.folder / "best" / "model.safetensors"]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"somebody else's")
    run.save(keep_last=1)
    assert run.folders() == ["best", "step-00000001", "step-00000002"]
    assert [path.read_bytes() for path in kept] == [b"somebody else's"] * 2
    assert run.listed() == [2]


def test_saves_that_nobody_waits_for_keep_the_last(caplog: pytest.LogCaptureFixture) -> None:
    with gated() as (gate, uri), caplog.at_level(logging.ERROR):
        gate.open()
        run = Run(Path("unused"))
        for _ in range(4):
            run.train()
            run.service.save(uri, keep_last=2, wait=False)
        run.optimizer.close()
        assert [checkpoint.step for checkpoint in run.service.checkpoints(uri)] == [3, 4]
    assert not caplog.text


def test_checkpoint_that_cannot_be_read_now_is_not_removed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be whole, and is left to the next save."""
    run.save(keep_last=3, num_saves=3)
    real = LocalFileSystem.open

    def flaky(self: LocalFileSystem, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "rb" and "step-00000002" in path:
            raise TimeoutError("timed out")
        return real(self, path, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "open", flaky)
        run.save(keep_last=1)
        with pytest.raises(CheckpointAccessError, match="step-00000002: cannot be read"):
            run.listed()
    assert run.listed() == [1, 2, 3, 4]
    run.save(keep_last=1)
    assert run.listed() == [5]


def test_checkpoint_whose_manifest_stays_keeps_its_files(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.save(keep_last=1)
    real = LocalFileSystem.rm_file

    def denied(self: LocalFileSystem, path: str) -> None:
        if path.endswith(MANIFEST_NAME):
            raise PermissionError("denied")
        real(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "rm_file", denied)
        run.save(keep_last=1)
    assert run.listed() == [1, 2]
    assert find_damages(f"{run.uri}/step-00000001") == []


def test_folder_that_cannot_be_listed_is_an_error(run: Run) -> None:
    with pytest.raises(StepwellError, match="expected a path or an fsspec URI"):
        run.service.checkpoints("nosuch://bucket/run")
    assert run.service.checkpoints(f"{run.uri}/nowhere") == []
