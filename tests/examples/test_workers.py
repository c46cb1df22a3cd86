"""The examples of several workers that leave averaging to the service."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.running import assert_falls, lines_in, losses_in, run


@pytest.mark.timeout(500)
def test_ray_train_whose_worker_fails_learns_what_torchrun_does(tmp_path: Path) -> None:
    plain = losses_in(run("torchrun_plain.py", folder=tmp_path, num_workers=2))
    assert_falls(plain, to=0.1)
    out = run("ray_train.py", "--fail", folder=tmp_path)
    losses = losses_in(out)
    assert losses == {step: pytest.approx(plain[step], rel=1e-2) for step in (20, 40, 60)}
    assert lines_in(out, "the service") == ["the service stands at step 60 of timeline 2"], "restored once"
