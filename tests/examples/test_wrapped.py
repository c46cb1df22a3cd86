"""The examples of several workers whose wrapper averages or shards the gradients."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.running import assert_falls, losses_in, run


@pytest.mark.timeout(500)
def test_ddp_learns_what_workers_without_it_do(tmp_path: Path) -> None:
    plain = losses_in(run("torchrun_plain.py", folder=tmp_path, num_workers=2))
    wrapped = losses_in(run("torchrun_ddp.py", folder=tmp_path, num_workers=2))
    assert wrapped == {step: pytest.approx(loss, rel=1e-2) for step, loss in plain.items()}


@pytest.mark.timeout(400)
def test_fsdp2_learns(tmp_path: Path) -> None:
    assert_falls(losses_in(run("torchrun_fsdp2.py", folder=tmp_path, num_workers=2)), to=0.1)
