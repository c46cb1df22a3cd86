"""Chaos: training goes on while processes are killed at random, and ends with the bits of a run left alone.

``make chaos ARGS="--kills 100 --seed 3"``. The worker is a process of its own; shards, the coordinator and the worker
are killed, one or two at a time, at moments that the seed decides as far as the machine allows. Says how long it took
from each kill to the next step that was completed.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Ray reads these when it is first imported.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"

import torch

import stepwell
from stepwell.server import cluster
from tests.integration.training import D0, Trainer, assert_same_state_dict
from tests.integration.victims import Name, Victims
from tests.zoo import assert_same_tensors, straddling

SERVICE = "chaos"
RULES = ("Prodigy", "AdamW", "LAMB")
STEPS_BETWEEN_KILLS = 3
LIMIT_S = 120.0
WORKER = "worker"


def main(arguments: Sequence[str] | None = None) -> None:
    """Kill, in every rule and number of shards in turn, until there were as many kills as were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills in all (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims (default 0)")
    parser.add_argument("--worker", nargs=3, metavar=("RULE", "FOLDER", "ADDRESS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        _work(options.worker[0], Path(options.worker[1]), options.worker[2])
        return
    rounds = [(rule, num_shards) for num_shards in (2, 3, 4) for rule in RULES]
    took: dict[str, list[float]] = {}
    cluster.start_embedded(num_cpus=1)
    for number, (rule, num_shards) in enumerate(rounds):
        kills = options.kills * (number + 1) // len(rounds) - options.kills * number // len(rounds)
        for kind, seconds in run_chaos(rule, num_shards, kills=kills, seed=options.seed + number).items():
            took.setdefault(kind, []).extend(seconds)
    for kind, seconds in sorted(took.items()):
        print(f"{kind}: {len(seconds)} kills, median {statistics.median(seconds):.1f} s, worst {max(seconds):.1f} s")


def run_chaos(rule: str, num_shards: int, *, kills: int, seed: int) -> dict[str, list[float]]:
    """One run under a Ray that this process is in.

    Returns:
        Kind of victims to the seconds from each kill to the next completed step.

    Raises:
        AssertionError: If it does not go on, or ends with other bits.
    """
    chance, took = random.Random(seed), dict[str, list[float]]()
    with tempfile.TemporaryDirectory(prefix="stepwell-chaos-") as name:
        folder = Path(name)
        with stepwell.launch(SERVICE, num_shards=num_shards, num_cpus_per_shard=0, redundancy=1) as service:
            worker = _Worker(rule, folder)
            worker.await_step(STEPS_BETWEEN_KILLS)
            victims = Victims(service)
            for number in range(kills):
                names = _choose(chance, num_shards)
                time.sleep(chance.uniform(0.0, 0.3))
                begun, moment = worker.step, time.monotonic()
                _kill(names, victims, worker, chance)
                worker.await_step(begun + 1)
                kind = " and ".join(sorted({_kind(each) for each in names}))
                took.setdefault(kind, []).append(worker.time_of(begun + 1) - moment)
                print(f"{rule}, {num_shards} shards, kill {number + 1}: {names} at step {begun}", flush=True)
                worker.await_step(worker.step + STEPS_BETWEEN_KILLS)
                victims.await_successors()
            worker.finish()
        _compare(rule, folder)
    return took


def _choose(chance: random.Random, num_shards: int) -> list[Name]:
    everybody: list[Name] = [*range(num_shards), *range(num_shards), "coordinator", WORKER]
    return list(dict.fromkeys(chance.sample(everybody, chance.choice([1, 1, 2]))))


def _kind(name: Name) -> str:
    return name if isinstance(name, str) else "shard"


def _kill(names: Sequence[Name], victims: Victims, worker: _Worker, chance: random.Random) -> None:
    for name in names:
        if name == WORKER:
            worker.kill()
        else:
            victims.kill(name)
        time.sleep(chance.choice([0.0, 0.0, 0.02, 0.5]))


class _Worker:
    """The training process, and what it writes of its progress."""

    def __init__(self, rule: str, folder: Path) -> None:
        self._command = [sys.executable, "-m", "tests.chaos", "--worker", rule, str(folder), cluster.address()]
        self._progress, self._last = folder / "progress", folder / "last"
        self._progress.touch()
        self._process = subprocess.Popen(self._command)

    @property
    def step(self) -> int:
        """The last step that was completed."""
        return max(self._times(), default=0)

    def time_of(self, step: int) -> float:
        """When a step, or one after it, was completed."""
        return min(moment for number, moment in self._times().items() if number >= step)

    def await_step(self, step: int) -> None:
        deadline = time.monotonic() + LIMIT_S
        while self.step < step:
            assert self._process.poll() is None, f"the worker ended with {self._process.returncode}"
            assert time.monotonic() < deadline, f"expected step {step} within {LIMIT_S:g} s, got {self.step}"
            time.sleep(0.01)

    def kill(self) -> None:
        """Kill it and start its successor."""
        self._process.kill()
        self._process.wait()
        self._process = subprocess.Popen(self._command)

    def finish(self) -> None:
        """Have it end a few steps from now."""
        self._last.write_text(str(self.step + 2 * STEPS_BETWEEN_KILLS))
        assert self._process.wait(timeout=LIMIT_S) == 0, f"the worker ended with {self._process.returncode}"

    def _times(self) -> dict[int, float]:
        whole, _, _ = self._progress.read_text().rpartition("\n")
        lines = (line.split() for line in whole.splitlines())
        return {int(step): float(moment) for step, moment in lines}


def _make(rule: str, service: Any) -> Trainer:
    options: dict[str, Any] = {"d0": D0} if rule == "Prodigy" else {}
    return Trainer(straddling(), getattr(stepwell, rule), service=service, **options)


def _work(rule: str, folder: Path, address: str) -> None:
    """Train on from wherever the service stands, until there is a last step."""
    service, last = stepwell.connect(SERVICE, address=address), folder / "last"
    trainer = _make(rule, service)
    trainer.step = service.status()["step"]
    with (folder / "progress").open("a") as progress:
        while not last.exists() or trainer.step < int(last.read_text() or 0):
            trainer.run(trainer.step + 1)
            progress.write(f"{trainer.step} {time.monotonic()}\n")
            progress.flush()
    values = [param.detach() for param in trainer.params]
    torch.save({"step": trainer.step, "params": values, "state": trainer.optimizer.state_dict()}, folder / "end")
    trainer.optimizer.close()


def _compare(rule: str, folder: Path) -> None:
    """See that the end is that of a run in one process."""
    end = torch.load(folder / "end")
    alone = _make(rule, "inprocess").run(end["step"])
    assert_same_tensors(end["params"], [param.detach() for param in alone.params], "parameter")
    assert_same_state_dict(end["state"], alone.optimizer.state_dict())
    print(f"{rule}: {end['step']} steps, the same bits as of one process", flush=True)


if __name__ == "__main__":
    main()
