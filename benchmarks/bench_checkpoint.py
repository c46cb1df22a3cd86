"""Checkpoints: Stepwell beside `dd`, torch.save and torch.distributed.checkpoint, in interleaved rounds of one run.

All write or read the same bytes, the state of a Prodigy optimizer, in one folder, which is removed at the end. A row is
the median time of each and the median over rounds of their ratio. `dd` copies from /dev/zero to a file, and from the
file to /dev/null; nobody calls fsync. The stall of an asynchronous save is the time until it returns plus what the
next step takes longer than the steps before the save. This process computes with one thread, so that one core of two
is left for whoever writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
from torch import Tensor, nn

import stepwell

dcp: Any = torch.distributed.checkpoint  # which has no types of its own

BYTES_PER_PARAM = 20
"""master_param, exp_avg, exp_avg_sq, s and p0."""
NUM_TENSORS = 16
DD_BLOCK_BYTES = 2**20
STEPS_ALONE = 5
"""Before an asynchronous save; their median is what the step after it is compared with."""

Seconds = float
Row = dict[str, Any]
Pair = tuple[str, str, str]
"""A row's name, our contestant, theirs."""

PAIRS: tuple[Pair, ...] = (
    ("save, 2 Ray shards / dd", "save ray", "save dd"),
    ("save, in process / dd", "save inprocess", "save dd"),
    ("save, in process / torch.save", "save inprocess", "save torch"),
    ("save, 2 Ray shards / torch.distributed.checkpoint.save", "save ray", "save dcp"),
    ("restore, 2 Ray shards / dd", "restore ray", "restore dd"),
    ("restore, in process / dd", "restore inprocess", "restore dd"),
    ("restore, in process / torch.load", "restore inprocess", "restore torch"),
    ("restore, 2 Ray shards / torch.distributed.checkpoint.load", "restore ray", "restore dcp"),
    ("stall, in process / async_save", "stall inprocess", "stall dcp"),
    ("stall, 2 Ray shards / async_save", "stall ray", "stall dcp"),
)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=500, help="bytes of the state")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one is made in it")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args()
    found = measure(size_bytes=args.megabytes * 10**6, rounds=args.rounds, folder=args.folder)
    print(json.dumps(found) if args.json else _table(found))


def rows(quick: bool) -> list[Row]:
    """What `make bench` puts into its page."""
    return measure(size_bytes=20 * 10**6, rounds=1) if quick else measure()


def measure(*, size_bytes: int = 500 * 10**6, rounds: int = 6, folder: Path | None = None) -> list[Row]:
    """The rows of the table.

    Args:
        size_bytes: Of the state.
        rounds: Rounds that count; one before them warms up.
        folder: Where to make the temporary folder that all is written in; None for the system's.

    Returns:
        For each row ``name``, ``ours`` and ``theirs`` (median seconds), ``ratio`` (median over rounds), ``unit`` and
        ``bytes``.
    """
    times: dict[str, list[Seconds]] = {}
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=folder) as scratch,
        _contestants(Path(scratch), size_bytes) as contestants,
    ):
        for index in range(rounds + 1):
            for contestant in contestants:
                for name, seconds in contestant.round().items():
                    if index:
                        times.setdefault(name, []).append(seconds)
    return [_row(pair, times, size_bytes) for pair in PAIRS]


def _row(pair: Pair, times: Mapping[str, list[Seconds]], size_bytes: int) -> Row:
    name, ours, theirs = pair
    return {
        "name": name,
        "ours": statistics.median(times[ours]),
        "theirs": statistics.median(times[theirs]),
        "ratio": statistics.median(a / b for a, b in zip(times[ours], times[theirs], strict=True)),
        "unit": "s",
        "bytes": size_bytes,
    }


def _table(rows: list[Row]) -> str:
    lines = [f"{rows[0]['bytes'] / 1e6:.0f} MB, {torch.get_num_threads()} threads, torch {torch.__version__}"]
    lines += [f"{'':60s}{'ours':>8s}{'theirs':>9s}{'ratio':>8s}"]
    lines += [f"{row['name']:60s}{row['ours']:8.3f}{row['theirs']:9.3f}{row['ratio']:8.2f}" for row in rows]
    return "\n".join(lines)


@contextmanager
def _contestants(folder: Path, size_bytes: int) -> Iterator[list[_Contestant]]:
    logging.getLogger("stepwell").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
    numel = size_bytes // BYTES_PER_PARAM
    with stepwell.launch(num_shards=2, num_cpus_per_shard=0, redundancy=0) as service:
        inprocess = _optimizer(numel, "inprocess")
        optimizers = {"inprocess": inprocess, "ray": _optimizer(numel, service)}
        state = _state_of(inprocess)
        ours = [_Service(name, folder / name, optimizer) for name, optimizer in optimizers.items()]
        yield [
            _Dd(folder / "dd", sum(values.nbytes for values in state.values())),
            *ours,
            _Torch(folder / "torch", state),
            _Dcp(folder / "dcp", state, inprocess.step),
        ]


def _optimizer(numel: int, service: str | stepwell.Service) -> stepwell.ServiceOptimizer:
    params = [nn.Parameter(torch.randn(numel // NUM_TENSORS) * 0.02) for _ in range(NUM_TENSORS)]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-2
    optimizer = stepwell.Prodigy(params, service=service)
    optimizer.step()
    return optimizer


def _state_of(optimizer: stepwell.ServiceOptimizer) -> dict[str, Tensor]:
    """The state as plain tensors, parameters included: what the checkpoint holds."""
    state = optimizer.state_dict()["state"]
    tensors = {
        f"{index}.{name}": value
        for index, slots in state.items()
        for name, value in slots.items()
        if isinstance(value, Tensor) and value.numel() > 1
    }
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return tensors | {f"{index}.param": param.detach().clone() for index, param in enumerate(params)}


def _timed(work: Callable[[], object]) -> Seconds:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@dataclasses.dataclass
class _Contestant:
    """Writes to a folder of its own, which is empty before and after each round."""

    folder: Path

    def round(self) -> dict[str, Seconds]:
        self.folder.mkdir()
        try:
            return self._measure()
        finally:
            shutil.rmtree(self.folder)

    def _measure(self) -> dict[str, Seconds]:
        raise NotImplementedError


@dataclasses.dataclass
class _Dd(_Contestant):
    size_bytes: int

    def _measure(self) -> dict[str, Seconds]:
        target = self.folder / "file"
        blocks = -(-self.size_bytes // DD_BLOCK_BYTES)
        save = _timed(lambda: self._dd("if=/dev/zero", f"of={target}", f"count={blocks}"))
        return {"save dd": save, "restore dd": _timed(lambda: self._dd(f"if={target}", "of=/dev/null"))}

    def _dd(self, *arguments: str) -> None:
        subprocess.run(["dd", f"bs={DD_BLOCK_BYTES}", *arguments], check=True, stderr=subprocess.DEVNULL)


@dataclasses.dataclass
class _Torch(_Contestant):
    state: dict[str, Tensor]

    def _measure(self) -> dict[str, Seconds]:
        target = self.folder / "file"
        save = _timed(lambda: torch.save(self.state, target))
        return {"save torch": save, "restore torch": _timed(lambda: torch.load(target))}


@dataclasses.dataclass
class _Dcp(_Contestant):
    state: dict[str, Tensor]
    step: Callable[[], object]

    def _measure(self) -> dict[str, Seconds]:
        target = self.folder / "sync"
        save = _timed(lambda: dcp.save(self.state, checkpoint_id=target))
        restore = _timed(lambda: dcp.load(self.state, checkpoint_id=target))
        shutil.rmtree(target)
        stall = _stall(self.step, lambda: dcp.async_save(self.state, checkpoint_id=self.folder / "async"))
        return {"save dcp": save, "restore dcp": restore, "stall dcp": stall}


@dataclasses.dataclass(init=False)
class _Service(_Contestant):
    name: str
    optimizer: stepwell.ServiceOptimizer

    def __init__(self, name: str, folder: Path, optimizer: stepwell.ServiceOptimizer) -> None:
        super().__init__(folder)
        self.name, self.optimizer = name, optimizer

    def _measure(self) -> dict[str, Seconds]:
        service, target = self.optimizer.service, str(self.folder / "sync")
        save = _timed(lambda: service.save(target))
        restore = _timed(lambda: service.restore(target))
        self.optimizer.refresh()
        shutil.rmtree(target)
        stall = _stall(self.optimizer.step, lambda: service.save(str(self.folder / "async"), wait=False))
        return {f"save {self.name}": save, f"restore {self.name}": restore, f"stall {self.name}": stall}


def _stall(step: Callable[[], object], save: Callable[[], Any]) -> Seconds:
    """How much longer a step takes for a save that begins before it."""
    alone = statistics.median(_timed(step) for _ in range(STEPS_ALONE))
    began = time.perf_counter()
    pending = save()
    step()
    stalled = time.perf_counter() - began
    pending.result()
    return stalled - alone


if __name__ == "__main__":
    main()
