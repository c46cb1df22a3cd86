from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from stepwell.server.collective import Collective, Listener
from stepwell.sharding.errors import ShardLostError

HOST = "127.0.0.1"
LIMIT_S = 30.0

KEY = b"k" * 16

MEMBER = """
import sys, torch
from stepwell.server.collective import Collective, Listener
from stepwell.sharding.errors import ShardLostError

index, listener = int(sys.argv[1]), Listener("127.0.0.1")
print(listener.address[1], flush=True)
addresses = [("127.0.0.1", int(port)) for port in sys.stdin.readline().split()]
member = Collective(
    1, index, listener=listener, addresses=addresses, key=bytes(16), forming_timeout_s=60, timeout_s=60
)
member.all_reduce(torch.ones(3))
print("formed", flush=True)
try:
    while True:
        member.all_reduce(torch.ones(3))
except ShardLostError as error:
    print("lost", flush=True)
sys.stdin.read()  # stay, so that no connection closes by this process's end
"""


class Forming:
    """The shards of one generation, before they come together."""

    def __init__(self, num_shards: int, generation: int = 1, timeout_s: float = LIMIT_S) -> None:
        self.generation, self.timeout_s = generation, timeout_s
        self.listeners = [Listener(HOST) for _ in range(num_shards)]

    def member(self, shard: int, *, key: bytes = KEY, generation: int | None = None) -> Collective:
        return Collective(
            self.generation if generation is None else generation,
            shard,
            listener=self.listeners[shard],
            addresses=[listener.address for listener in self.listeners],
            key=key,
            forming_timeout_s=self.timeout_s,
            timeout_s=self.timeout_s,
        )

    def all(self) -> list[Collective]:
        with ThreadPoolExecutor(len(self.listeners)) as pool:
            return list(pool.map(self.member, range(len(self.listeners)), timeout=LIMIT_S))


def on_all(work: Callable[[int], Tensor], num_shards: int) -> list[Tensor]:
    with ThreadPoolExecutor(num_shards) as pool:
        return list(pool.map(work, range(num_shards), timeout=LIMIT_S))


@pytest.fixture(params=[2, 3, 4, 7])
def group(request: pytest.FixtureRequest) -> Iterator[list[Collective]]:
    members = Forming(request.param).all()
    yield members
    for member in members:
        member.close()


def test_all_reduce_of_int64_is_exact(group: list[Collective]) -> None:
    values = [torch.tensor([2**62, -(2**62), shard, 0]) for shard in range(len(group))]
    expected = torch.stack(values).sum(dim=0)
    for total in on_all(lambda shard: group[shard].all_reduce(values[shard].clone()), len(group)):
        assert torch.equal(total, expected)


@pytest.mark.parametrize("numel", [3, 300, 4096, 4097, 1_000_000])
def test_all_reduce_of_float64_with_zeros_elsewhere_keeps_the_bits(group: list[Collective], numel: int) -> None:
    whole = torch.randn(numel, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-200
    parts = torch.zeros(len(group), numel, dtype=torch.float64)
    for part, chunk in zip(parts, torch.arange(numel).tensor_split(len(group)), strict=True):
        part[chunk] = whole[chunk]
    for total in on_all(lambda shard: group[shard].all_reduce(parts[shard].clone()), len(group)):
        assert torch.equal(total, whole)


def test_all_reduce_keeps_its_shape_and_adds_in_place(group: list[Collective]) -> None:
    def work(shard: int) -> Tensor:
        vector = torch.full((2, 3), float(shard), dtype=torch.float64)
        assert group[shard].all_reduce(vector) is vector
        return vector

    for total in on_all(work, len(group)):
        assert torch.equal(total, torch.full((2, 3), float(sum(range(len(group)))), dtype=torch.float64))


def test_all_reduce_alone_needs_no_group() -> None:
    alone = Forming(1).member(0)
    vector = torch.ones(3)
    assert alone.all_reduce(vector) is vector
    alone.close()
    assert alone.is_open


@pytest.mark.parametrize("shard", [0, 1])
def test_collective_whose_member_never_comes_is_an_error_within_the_limit(shard: int) -> None:
    """The first waits to be called; the second finds nobody at home."""
    forming = Forming(2, generation=7, timeout_s=1.0)
    forming.listeners[1 - shard].socket.close()
    began = time.monotonic()
    with pytest.raises(ShardLostError, match=f"shard {shard}: the 2 shards of generation 7 did not come together"):
        forming.member(shard)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("strange", [{"key": b"?" * 16}, {"generation": 3}], ids=str)
def test_who_is_not_of_the_group_is_sent_away(strange: dict[str, Any]) -> None:
    forming = Forming(2, generation=4)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(forming.member, 0)
        with socket.create_connection(forming.listeners[0].address):
            pass
        stranger = Forming(2)
        stranger.listeners[0].socket.close()
        stranger.listeners[0] = forming.listeners[0]
        outside = stranger.member(1, **{"generation": 4, **strange})
        with pytest.raises(ShardLostError, match=r"shard 0 closed its connection|reset"):
            outside.all_reduce(torch.ones(2))
        assert not first.done()
        members = [forming.member(1), first.result(timeout=LIMIT_S)]
        members.reverse()
    assert on_all(lambda shard: members[shard].all_reduce(torch.ones(1)), 2) == [torch.tensor([2.0])] * 2
    for member in members:
        member.close()


def test_all_reduce_whose_member_never_comes_is_an_error_within_the_limit() -> None:
    members = Forming(2, timeout_s=2.0).all()
    began = time.monotonic()
    with pytest.raises(ShardLostError, match=r"generation 1 \(limit 2 s\): shard 1 sent nothing"):
        members[0].all_reduce(torch.ones(2))
    assert 1.0 < time.monotonic() - began < 10
    assert not members[0].is_open
    with pytest.raises(ShardLostError, match="the group was closed"):
        members[0].all_reduce(torch.ones(2))
    with pytest.raises(ShardLostError, match="shard 0 closed its connection"):
        members[1].all_reduce(torch.ones(2))


def test_close_frees_an_all_reduce_that_waits(group: list[Collective]) -> None:
    timer = threading.Timer(0.3, group[0].close)
    timer.start()
    began = time.monotonic()
    with pytest.raises(ShardLostError, match="the group was closed"):
        group[0].all_reduce(torch.ones(2))
    assert time.monotonic() - began < 10
    timer.join()


def test_a_next_generation_forms_after_the_last_one_failed(group: list[Collective]) -> None:
    for member in group:
        member.close()
    again = Forming(3, generation=2).all()
    assert on_all(lambda shard: again[shard].all_reduce(torch.ones(1)), 3) == [torch.tensor([3.0])] * 3
    for member in again:
        member.close()


@pytest.fixture
def members() -> Iterator[list[subprocess.Popen[str]]]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(index)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for index in range(5)
    ]
    ports = " ".join(map(read_line, processes))
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{ports}\n")
        process.stdin.flush()
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_all_members_learn_of_a_killed_one_at_once(members: list[subprocess.Popen[str]]) -> None:
    """Those that exchange nothing with it too."""
    assert [read_line(process) for process in members] == ["formed"] * 5
    os.kill(members[2].pid, signal.SIGKILL)
    began = time.monotonic()
    for process in itertools.chain(members[:2], members[3:]):
        assert read_line(process) == "lost"
    assert time.monotonic() - began < 20, "the limit of an all-reduce is 60 s"


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()
