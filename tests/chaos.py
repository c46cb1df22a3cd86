"""Chaos: training goes on while processes are killed, and ends with the bits of a run left alone.

``make chaos ARGS="--kills 100 --seed 3"``: the worker is a process of its own; shards, the coordinator and the worker
are killed, one or two at a time, at moments that the seed decides as far as the machine allows. Writes down how long it
took from each kill to the next step that was completed, and what that is made of.

``make chaos ARGS=--matrix``: declared faults at every point, alone and in pairs; ``--part 3/8`` does an eighth.
``make chaos ARGS=--nodes``: at every point of a step a shard's whole node is lost, on a cluster of several.
``make chaos ARGS="--minutes 30"``: kills for so long, and says what grows.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Ray reads these when it is first imported.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"

import ray
import torch

import stepwell
from stepwell.server import cluster
from tests.declared import Declared
from tests.faults import Fault, matrix, node_losses
from tests.integration.nodes import Nodes, node_of
from tests.integration.training import D0, Trainer, assert_same_state_dict
from tests.integration.victims import Name, Victims, await_copies
from tests.zoo import assert_same_tensors, straddling

SERVICE = "chaos"
RULES = ("Prodigy", "AdamW", "LAMB")
STEPS_BETWEEN_KILLS = 3
LIMIT_S = 120.0
WORKER = "worker"
CASES_OF_A_SERVICE = 40


@dataclasses.dataclass(frozen=True, slots=True)
class Kill:
    """One moment's kills.

    Attributes:
        kind: Of those killed.
        seconds: To the next completed step.
        parts: Seconds of what the coordinator did of it, by part; empty where it brought nobody back.
    """

    kind: str
    seconds: float
    parts: Mapping[str, float]


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the arguments say; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills in all (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims (default 0)")
    parser.add_argument("--standby", type=int, default=0, help="spare processes of each service (default 0)")
    parser.add_argument("--matrix", action="store_true", help="declared faults, all of them")
    parser.add_argument("--nodes", action="store_true", help="nodes that are lost at declared points, all of them")
    parser.add_argument("--part", default="1/1", help="of the matrix")
    parser.add_argument("--minutes", type=float, help="kill for so long, and watch what grows")
    parser.add_argument("--write", type=Path, help="where the figures go, beside the terminal")
    parser.add_argument("--worker", nargs=3, metavar=("RULE", "FOLDER", "ADDRESS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        _work(options.worker[0], Path(options.worker[1]), options.worker[2])
        return
    if not options.nodes:
        cluster.start_embedded(num_cpus=1)
    if options.nodes:
        text = run_node_losses()
    elif options.matrix:
        text = run_matrix(*map(int, options.part.split("/")))
    elif options.minutes:
        text = run_soak(options.minutes, seed=options.seed, standby=options.standby)
    else:
        text = _all_rules(options.kills, options.seed, options.standby)
    print(text)
    if options.write:
        options.write.write_text(text)


def _all_rules(num_kills: int, seed: int, standby: int) -> str:
    """Kill, in every rule and number of shards in turn; a page of what it took."""
    rounds = [(rule, num_shards) for num_shards in (2, 3, 4) for rule in RULES]
    kills = list[Kill]()
    for number, (rule, num_shards) in enumerate(rounds):
        share = num_kills * (number + 1) // len(rounds) - num_kills * number // len(rounds)
        kills += run_chaos(rule, num_shards, kills=share, seed=seed + number, standby=standby)
    kinds = sorted({kill.kind for kill in kills})
    said = (
        f"{len(kills)} moments, seed {seed}, standby {standby}: the same bits in every run. Seconds; parts are medians."
    )
    head = "| killed | moments | median | worst | restart | rebuild | rest | form | resume | the rest |"
    rows = [_row(kind, [kill for kill in kills if kill.kind == kind]) for kind in kinds]
    return "\n".join([said, "", head, "|---" * 10 + "|", *rows, ""])


def _row(kind: str, kills: Sequence[Kill]) -> str:
    brought_back = [kill for kill in kills if kill.parts]
    names = ("restart", "rebuild", "rest", "form", "resume")
    parts = [statistics.median(kill.parts[name] for kill in brought_back) if brought_back else 0.0 for name in names]
    rest = statistics.median(kill.seconds - sum(kill.parts.values()) for kill in kills)
    seconds = [kill.seconds for kill in kills]
    figures = [statistics.median(seconds), max(seconds), *parts, rest]
    return f"| {kind} | {len(kills)} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |"


def run_chaos(rule: str, num_shards: int, *, kills: int, seed: int, standby: int = 0) -> list[Kill]:
    """One run under a Ray that this process is in.

    Raises:
        AssertionError: If it does not go on, or ends with other bits.
    """
    with _training(rule, num_shards, standby) as run:
        chance = random.Random(seed)
        return [run.kill(chance) for _ in range(kills)]


def run_matrix(part: int, num_parts: int) -> str:
    """Declared faults at every point, alone and in pairs; one service suffers some of them one after the other."""
    cases, ends = matrix(step=1), list[str]()
    mine = cases[part - 1 :: num_parts]
    for first in range(0, len(mine), CASES_OF_A_SERVICE):
        with (
            tempfile.TemporaryDirectory(prefix="stepwell-matrix-") as folder,
            stepwell.launch(SERVICE, num_shards=3, num_cpus_per_shard=0, redundancy=1) as service,
        ):
            declared = Declared(service, _make("Prodigy", service), _make("Prodigy", "inprocess"), Path(folder))
            ends += [_suffer(declared, faults) for faults in mine[first : first + CASES_OF_A_SERVICE]]
    return f"{len(mine)} of {len(cases)} cases: {_counted(ends)}"


def run_node_losses() -> str:
    """A shard's node is lost at every point of a step, alone and with the coordinator while it brings the shard back.

    Three shards and their keepers are on nodes of their own, and there is one more node, which takes the lost one's.
    """
    cases, ends, nodes = node_losses(step=1), list[str](), Nodes(4)
    with (
        contextlib.closing(nodes),
        tempfile.TemporaryDirectory(prefix="stepwell-matrix-") as folder,
        stepwell.launch(SERVICE, num_shards=3, num_cpus_per_shard=1, redundancy=1) as service,
    ):
        declared = Declared(service, _make("Prodigy", service), _make("Prodigy", "inprocess"), Path(folder))
        for faults in cases:
            lost = node_of(service.find_shards()[int(faults[0].who)])
            ends.append(_suffer(declared, faults))
            nodes.lose(lost)
            nodes.add()
    return f"{len(cases)} cases: {_counted(ends)}"


def _suffer(declared: Declared, faults: Sequence[Fault]) -> str:
    end = declared.suffer(faults)
    print(f"{' and '.join(map(str, faults))}: {end}", flush=True)
    return end


def _counted(ends: Sequence[str]) -> str:
    return ", ".join(f"{ends.count(end)} ended with {end}" for end in dict.fromkeys(ends))


def run_soak(minutes: float, *, seed: int, standby: int) -> str:
    """Kill now and then for some minutes; a page of what every process had at the begin and at the end."""
    with _training("Prodigy", 3, standby) as run:
        chance, deadline = random.Random(seed), time.monotonic() + 60 * minutes
        samples, num_kills = [run.sample()], 0
        while time.monotonic() < deadline:
            run.kill(chance)
            num_kills += 1
            samples.append(run.sample())
    rows = [f"{minutes:g} minutes, {num_kills} moments of kills, seed {seed}: the same bits.", ""]
    rows += ["| | first quarter | last quarter |", "|---|---|---|"]
    quarter = max(1, len(samples) // 4)
    for name in samples[0]:
        first, last = (
            statistics.median(sample[name] for sample in part) for part in (samples[:quarter], samples[-quarter:])
        )
        rows.append(f"| {name} | {first:.0f} | {last:.0f} |")
    return "\n".join([*rows, ""])


@contextlib.contextmanager
def _training(rule: str, num_shards: int, standby: int) -> Iterator[_Training]:
    """A service and its worker; at the end it is seen that the bits are the same."""
    with tempfile.TemporaryDirectory(prefix="stepwell-chaos-") as name:
        folder = Path(name)
        options: dict[str, Any] = {"num_cpus_per_shard": 0, "redundancy": 1, "standby": standby}
        with stepwell.launch(SERVICE, num_shards=num_shards, **options) as service:
            worker = _Worker(rule, folder)
            worker.await_step(STEPS_BETWEEN_KILLS)
            yield _Training(f"{rule}, {num_shards} shards", service, worker)
            worker.finish()
        _compare(rule, folder)


class _Training:
    """What is killed, and how it goes on."""

    def __init__(self, name: str, service: stepwell.Service, worker: _Worker) -> None:
        self._name, self._service, self._worker = name, service, worker
        self._victims, self._num_shards = Victims(service), len(service.shards)

    def kill(self, chance: random.Random) -> Kill:
        """Kill one or two, and see that steps go on and all come back."""
        worker, names = self._worker, _choose(chance, self._num_shards)
        time.sleep(chance.uniform(0.0, 0.3))
        begun, moment = worker.step, time.monotonic()
        _kill(names, self._victims, worker, chance)
        worker.await_step(begun + 1)
        seconds = worker.time_of(begun + 1) - moment
        kind = " and ".join(sorted({_kind(each) for each in names}))
        worker.await_step(worker.step + STEPS_BETWEEN_KILLS)
        self._victims.await_successors()
        await_copies(self._service)
        last = self._service.status()["recoveries"]["last"]
        # Else the coordinator that is here now brought back nobody of these.
        is_of_these = last is not None and set(last["shards"]) == {each for each in names if isinstance(each, int)}
        parts = last["seconds"] if is_of_these else {}
        shown = "".join(f", {part} {took:.2f}" for part, took in parts.items())
        print(f"{self._name}: {names} at step {begun}, {seconds:.2f} s{shown}", flush=True)
        return Kill(kind, seconds, parts)

    def sample(self) -> dict[str, float]:
        """Memory in MiB and open files of every process, and how many actors there are."""
        pids = {**self._victims.pids(), WORKER: self._worker.pid, "driver": os.getpid()}
        pids |= {"raylet": _child("raylet"), "gcs": _child("gcs_server")}
        sample: dict[str, float] = {}
        for name, pid in pids.items():
            shown = f"shard {name}" if isinstance(name, int) else name
            sample[f"{shown}, MiB"] = _resident_mib(pid)
            sample[f"{shown}, open files"] = len(os.listdir(f"/proc/{pid}/fd"))
        return {**sample, "actors": len(ray.util.list_named_actors(all_namespaces=True))}


def _resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _child(name: str) -> int:
    """The process of this one's Ray that runs a program."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            command, _, rest = status.read_text().rpartition(")")
            if command.endswith(f"({name}") and int(rest.split()[1]) == os.getpid():
                return int(status.parent.name)
    raise AssertionError(f"this process has no child {name}")


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
    def pid(self) -> int:
        """Of the process that trains now."""
        return self._process.pid

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
    trainer.step = trainer.optimizer._registered.num_steps
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
