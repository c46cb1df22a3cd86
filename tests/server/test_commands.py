from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

import stepwell
from tests.command_line import LIMIT_S, Cli, cli_process
from tests.integration.processes import assert_all_end, processes_with


@pytest.fixture(scope="module")
def own_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The state folder of a Ray that `stepwell up trainer` started with two shards; it is full with them."""
    state = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(state))
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.delenv("RAY_AUTH_MODE")  # as it is on a machine where nobody has said anything
        patch.setattr(os, "cpu_count", lambda: 2)
        up = cli_process("up", "trainer", "--shards", "2", "--cpus-per-shard", cpus_per_shard(), "--json")
        assert up.code == 0, up.err
        fields = json.loads(up.out)
        assert (fields["name"], fields["num_shards"], fields["rule"]) == ("trainer", 2, None)
        assert fields["address"].startswith("127.0.0.2:")
        temporary = Path(json.loads((state / "stepwell" / "ray.json").read_text())["temporary"])
        assert temporary.is_dir()
        yield state
        ray.shutdown()  # commands that ran in this process left it in that Ray, and a process ends with its Ray
        down = cli_process("down", "trainer", "--json")
        assert json.loads(down.out) == {"name": "trainer", "ended_ray": True}, down.err
        assert not (state / "stepwell" / "ray.json").exists()
        assert not temporary.exists()
        assert_all_end(processes_with("XDG_STATE_HOME", str(state)))


def cpus_per_shard() -> str:
    """So many that two shards fill the Ray that `up` starts."""
    return str((os.cpu_count() or 1) / 2)


@pytest.fixture(scope="module")
def checkpoint(own_ray: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A checkpoint of three steps that `stepwell save` wrote; the job goes on existing."""
    uri = str(tmp_path_factory.mktemp("checkpoint") / "trainer")
    model = torch.nn.Linear(30, 30)
    optimizer = stepwell.Prodigy(model.parameters(), service="trainer")
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 30)).square().sum().backward()
        optimizer.step()
    yield uri
    optimizer.close()


def test_commands_without_a_cluster_say_how_to_start_one(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.shutdown()
    for arguments in (["status"], ["status", "trainer", "--json"], ["save", "trainer", "/tmp/x"], ["down", "trainer"]):
        cli(*arguments).require_error("there is no Ray cluster here", "RAY_ADDRESS", "stepwell up NAME")
    assert list(tmp_path.iterdir()) == []


def test_commands_with_a_state_file_of_a_ray_that_ended_say_so(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(LIMIT_S)
    (tmp_path / "stepwell").mkdir()
    (tmp_path / "stepwell" / "ray.json").write_text(json.dumps({"address": "127.0.0.2:1", "pid": ended.pid}))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.shutdown()
    cli("status").require_error("there is no Ray cluster here")


def test_up_refuses_a_token_that_others_may_read(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE")
    token = tmp_path / "stepwell" / "ray-token"
    token.parent.mkdir()
    token.touch(mode=0o644)
    cli("up", "trainer").require_error(str(token), "only you can read", "got mode 644", "remove it")


def test_up_refuses_a_wrong_placement_before_it_starts_anything(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    run = cli("up", "trainer", "--placement", "anywhere")
    assert run.code == 2
    assert "expected one of PACK, SPREAD" in run.err
    assert list(tmp_path.iterdir()) == []


def test_up_that_fails_ends_the_ray_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cli_process("up", "trainer", "--gpus-per-shard", "1").require_error("the cluster has 0 on 1 node(s)")
    assert not (tmp_path / "stepwell" / "ray.json").exists()
    assert_all_end(processes_with("XDG_STATE_HOME", str(tmp_path)))


@pytest.mark.parametrize("command", ["up", "status", "save", "down", "top", "plot", "ui"])
def test_unknown_option_is_named(cli: Cli, command: str) -> None:
    run = cli(command, "--nonsense", "1")
    assert run.code == 2
    assert "--nonsense" in run.err
    assert "Traceback" not in run.err
    assert run.out == ""


@pytest.mark.parametrize("command", ["up", "status", "save", "down", "top", "plot", "ui"])
def test_help_has_an_example(cli: Cli, command: str) -> None:
    run = cli(command, "--help")
    assert run.code == 0
    assert f"Example: stepwell {command}" in run.out


def test_status_of_a_new_service_shows_no_job(own_ray: Path, cli: Cli) -> None:
    run = cli("status", "trainer")
    assert run.code == 0
    assert "none yet: no worker has registered" in run.out
    assert [line.split()[1:4:2] for line in run.out.splitlines() if "epoch" in line or "restarts" in line] == [
        ["epoch", "1"],
        ["restarts", "0"],
    ]
    cli("save", "trainer", str(own_ray / "nothing")).require_error("service 'trainer' has no job yet")
    cli("plot", "trainer").require_error("service 'trainer' has taken no step yet")
    assert "no worker has registered" in cli("top", "trainer", "--once").out


def test_save_and_status_json_print_one_object(own_ray: Path, checkpoint: str, cli: Cli) -> None:
    assert json.loads(cli("save", "trainer", checkpoint, "--json").out) == {
        "name": "trainer",
        "uri": checkpoint,
        "step": 3,
    }
    status = json.loads(cli("status", "trainer", "--json").out)
    assert (status["name"], status["rule"], status["step"], status["numel"]) == ("trainer", "Prodigy", 3, 930)
    assert set(status["scalars"]) == {"d", "d_max", "d_numerator", "k"}
    every = cli("status", "--json")
    assert json.loads(every.out) == {"services": [status]}
    assert every.err == ""


def test_save_and_status_say_it_in_words(own_ray: Path, checkpoint: str, cli: Cli) -> None:
    assert f"saved step 3 of service trainer to {checkpoint}" in cli("save", "trainer", checkpoint).out
    kept = cli("save", "trainer", str(own_ray / "run"), "--keep-last", "2", "--json")
    assert json.loads(kept.out)["uri"] == str(own_ray / "run" / "step-00000003")
    shown = cli("status").out
    assert "Prodigy" in shown
    assert re.search(r"redundancy\s+│ 1 (wanted|of each shard)", shown)
    assert re.search(r"recoveries\s+│ 0 ", shown)


def test_save_to_an_unwritable_place_names_it(own_ray: Path, checkpoint: str, cli: Cli) -> None:
    cli("save", "trainer", "/proc/nowhere").require_error("/proc/nowhere")


def test_up_made_a_token_and_nobody_gets_in_without_it(
    own_ray: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = own_ray / "stepwell" / "ray-token"
    assert (stat.S_IMODE(token.stat().st_mode), len(token.read_text())) == (0o600, 64)
    address = json.loads((own_ray / "stepwell" / "ray.json").read_text())["address"]
    monkeypatch.setenv("RAY_NUM_REDIS_GET_RETRIES", "2")  # Ray tries 20 times, a second each
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))  # where another user's is
    for mode in ("disabled", "token"):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "guessed"))
        (tmp_path / "guessed").write_text("0" * 64)
        run = cli_process("status", "--address", address)
        assert (run.code, run.out) == (1, "")
        assert "InvalidAuthToken" in run.err  # Ray's own lines
        error = run.err.splitlines()[-1]
        assert error.startswith(f"error: the Ray cluster at {address} does not answer")
        assert "RAY_AUTH_TOKEN_PATH" in error


@pytest.mark.parametrize("command", [["status"], ["save"], ["down"]])
def test_commands_on_no_such_service_list_those_that_run(own_ray: Path, cli: Cli, command: list[str]) -> None:
    uri = ["/tmp/x"] if command == ["save"] else []
    run = cli(*command, "trainor", *uri)
    run.require_error("there is no service 'trainor' in this cluster", "running: trainer", "stepwell up trainor")


UP_ERRORS = {
    "second of the same name": (["up", "trainer"], ["there is a service 'trainer' already", "stepwell down trainer"]),
    "name with a slash": (["up", "a/b"], ["name: expected a name without '/', got 'a/b'"]),
    "GPUs where there are none": (
        ["up", "other", "--gpus-per-shard", "1"],
        ["1 shards with 1 GPU each need 1 GPUs; the cluster has 0", "num_gpus_per_shard"],
    ),
    "more shards than there is room for": (
        ["up", "other", "--shards", "5000"],
        ["5000 shards with 1 CPU each need 5000 CPUs; the cluster has ", "fewer shards"],
    ),
    "busy cluster": (
        ["up", "other", "--placement-timeout-s", "2"],
        ["no room for 1 shards", "within 2 s; free now: ", " has 0 of "],
    ),
    "no checkpoint": (
        ["up", "other", "--cpus-per-shard", "0", "--restore", "/nowhere/at-all"],
        ["/nowhere/at-all: there is no complete checkpoint here"],
    ),
}


@pytest.mark.parametrize("case", UP_ERRORS)
def test_up_that_fails_leaves_nothing(own_ray: Path, cli: Cli, case: str) -> None:
    arguments, parts = UP_ERRORS[case]
    cli(*arguments).require_error(*parts)
    services = json.loads(cli("status", "--json").out)["services"]
    assert [service["name"] for service in services] == ["trainer"]
    live = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
    assert [group["name"] for group in live] == ["trainer/set-0.0"]


def test_up_from_a_checkpoint_that_was_cut_short_leaves_nothing(
    own_ray: Path, checkpoint: str, cli: Cli, tmp_path: Path
) -> None:
    assert cli("save", "trainer", checkpoint).code == 0
    cut = shutil.copytree(checkpoint, tmp_path / "cut")
    shard = sorted(cut.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    run = cli("up", "other", "--cpus-per-shard", "0", "--restore", str(cut))
    run.require_error(f"{cut}: {shard.name} was cut short: expected {shard.stat().st_size + 1} bytes")
    assert "other" not in cli("status").out


def test_up_from_a_checkpoint_begins_with_it(own_ray: Path, checkpoint: str, cli: Cli) -> None:
    assert cli("save", "trainer", checkpoint).code == 0
    up = cli("up", "other", "--cpus-per-shard", "0", "--restore", checkpoint, "--json")
    assert up.code == 0, up.err
    fields = json.loads(up.out)
    assert (fields["rule"], fields["step"], fields["num_shards"]) == ("Prodigy", 3, 1)
    down = cli("down", "other", "--json")
    assert json.loads(down.out) == {"name": "other", "ended_ray": False}
    assert "other" not in cli("status").out
