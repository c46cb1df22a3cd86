"""The examples of one worker, and the checkpoints of the trainers: a resumed run ends as one that went on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.running import assert_falls, lines_in, losses_in, run


def test_plain_loop_learns(tmp_path: Path) -> None:
    assert_falls(losses_in(run("plain_loop.py", folder=tmp_path)), to=0.1)


@pytest.mark.timeout(400)
def test_hf_trainer_learns_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = run("hf_trainer.py", folder=tmp_path)
    assert_falls(losses_in(whole), to=0.1)
    assert (tmp_path / "hf-out" / "checkpoint-40" / "optimizer.pt").exists()
    resumed = run("hf_trainer.py", "--resume", "hf-out/checkpoint-40", folder=tmp_path)
    assert len(lines_in(resumed, "{'loss'")) < len(lines_in(whole, "{'loss'")), "it began anew"
    for word in ("step", "d "):
        assert lines_in(resumed, word) == lines_in(whole, word)


def test_hf_trainer_makes_the_optimizer_from_its_class(tmp_path: Path) -> None:
    assert_falls(losses_in(run("hf_trainer_by_class.py", folder=tmp_path)), to=0.1)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_accelerate_learns_and_resumes_to_the_same_bits(num_workers: int, tmp_path: Path) -> None:
    whole = run("accelerate_loop.py", folder=tmp_path, num_workers=num_workers)
    assert_falls(losses_in(whole), to=0.25)
    resumed = run("accelerate_loop.py", "--resume", folder=tmp_path, num_workers=num_workers)
    assert lines_in(resumed, "epoch") == lines_in(whole, "epoch")[5:]


@pytest.mark.timeout(400)
def test_lightning_learns_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = run("lightning_module.py", folder=tmp_path)
    assert_falls(losses_in(whole), to=0.25)
    resumed = run("lightning_module.py", "--resume", folder=tmp_path)
    assert lines_in(resumed, "step") == lines_in(whole, "step")[5:]
