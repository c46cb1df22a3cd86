"""Saves that nobody waits for, in the training process: what is told, when, and what is written if it ends."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from concurrent.futures import Future
from pathlib import Path

import pytest

import stepwell
from stepwell.sharding.errors import CheckpointError, ServiceTimeoutError
from tests.client.training import assert_equal, assert_same_state, make_net, train
from tests.gated_files import LIMIT_S, gated

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("num_shards", [1, 3])
def test_save_without_waiting_is_of_its_step_while_steps_go_on(num_shards: int) -> None:
    net, successor_net = make_net(), make_net()
    optimizer = stepwell.Prodigy(net.parameters(), service=stepwell.InProcessService(num_shards=num_shards))
    train(net, optimizer, range(4))
    expected = optimizer.state_dict()
    with gated() as (gate, uri):
        save = optimizer.service.save(uri, wait=False)
        assert isinstance(save, stepwell.PendingSave)
        assert (save.uri, save.step) == (uri, 4)
        gate.wait_until_reached()
        train(net, optimizer, range(4, 7))
        assert not save.done()
        assert repr(save) == f"<PendingSave of step 4 to {uri!r}, being written>"
        with pytest.raises(ServiceTimeoutError, match=f"{uri} was not complete within 0 s; wait again"):
            save.result(timeout_s=0)
        gate.open()
        assert save.result(timeout_s=LIMIT_S) == 4
        assert save.done()
        successor = stepwell.Prodigy(successor_net.parameters(), num_shards=2)
        successor.service.restore(uri)
        successor.refresh()
        assert_same_state(successor.state_dict(), expected)
    train(successor_net, successor, range(4, 7))
    assert_equal(successor_net.parameters(), net.parameters())


def test_save_of_the_same_step_is_not_written_again(tmp_path: Path) -> None:
    net = make_net()
    optimizer = stepwell.AdamW(net.parameters())
    train(net, optimizer, range(2))
    assert optimizer.service.save(str(tmp_path)) == 2
    files = set(tmp_path.iterdir())
    save = optimizer.service.save(str(tmp_path), wait=False)
    assert save.done()
    assert save.result() == 2
    assert set(tmp_path.iterdir()) == files


def test_save_that_fails_is_told_and_logged_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    net = make_net()
    optimizer = stepwell.AdamW(net.parameters())
    train(net, optimizer, range(2))
    with gated() as (gate, uri), caplog.at_level(logging.ERROR):
        save = optimizer.service.save(uri, wait=False)
        gate.wait_until_reached()
        train(net, optimizer, range(2, 4))
        gate.open(fails=True)
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"-shard-00000-of-00001\.safetensors.*No space left"):
                save.result(timeout_s=LIMIT_S)
        gate.fails = False
        assert optimizer.service.save(uri) == 4
    assert "the checkpoint of step 2 was not written" in caplog.text


def test_save_whose_writing_breaks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("threading.excepthook", lambda _: None)  # else the log has the traceback
    save = stepwell.PendingSave.in_thread("somewhere", 3, broken)
    with pytest.raises(CheckpointError, match="somewhere: writing it failed; the log has the traceback"):
        save.result(timeout_s=LIMIT_S)


def test_closing_the_optimizer_waits_for_the_save(tmp_path: Path) -> None:
    net = make_net()
    optimizer = stepwell.AdamW(net.parameters())
    train(net, optimizer, range(2))
    save = optimizer.service.save(str(tmp_path), wait=False)
    optimizer.close()
    assert save.done()


def test_save_that_does_not_end_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("stepwell.sharding.pending_save.EXIT_TIMEOUT_S", 0.01)
    stepwell.PendingSave("somewhere", 3, Future()).finish()
    assert "waiting up to 0.01 s for the checkpoint somewhere" in caplog.text
    assert "the checkpoint somewhere is cut short" in caplog.text


PROCESS = """
    import sys, threading, torch, stepwell
    from tests.gated_files import GatedFileSystem, Gate
    from stepwell.sharding.folder import read_complete
    import atexit

    param = torch.nn.Parameter(torch.ones(1000))
    param.grad = torch.ones(1000)
    atexit.register(lambda: print("read", read_complete(uri).step))  # runs after what was registered later
    optimizer = stepwell.AdamW([param])
    optimizer.step()
    gate, uri = Gate(), "gated://at-exit"
    GatedFileSystem.gate = gate
    save = optimizer.service.save(uri, wait=False)
    gate.wait_until_reached()
    atexit.register(lambda: threading.Timer(0.2, gate.open).start())
    print("ends")
"""


def test_process_ends_after_its_save() -> None:
    command = [sys.executable, "-c", textwrap.dedent(PROCESS)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:2] == ["ends", "read 1"]
    assert "waiting up to 300 s for the checkpoint gated://at-exit to be written" in run.stderr
