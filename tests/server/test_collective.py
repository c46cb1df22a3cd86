from __future__ import annotations

import functools
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepwell.server.collective import Collective, Generation
from stepwell.server.meeting import Meeting
from stepwell.sharding.errors import ShardLostError

HOST = "127.0.0.1"
LIMIT_S = 30.0

MEMBER = """
import sys, torch
from stepwell.server.collective import Collective, Generation
from stepwell.sharding.errors import ShardLostError

index, size, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
meeting = torch.distributed.FileStore(path, size)
member = Collective(
    Generation(1, 1), index, size, host="127.0.0.1", meeting=meeting, forming_timeout_s=60, timeout_s=60
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


def meetings(num_shards: int, timeout_s: float = LIMIT_S) -> list[Meeting]:
    """Of all members, each of which tells the others at once."""
    members = [Meeting() for _ in range(num_shards)]
    for member in members:
        others = [other for other in members if other is not member]
        member.attend(functools.partial(tell_all, others), timeout_s)
    return members


def tell_all(others: Sequence[Meeting], key: str, value: bytes) -> None:
    for other in others:
        other.note(key, value)


def form(meeting: Meeting, shard: int, num_shards: int, *, number: int = 1, timeout_s: float = LIMIT_S) -> Collective:
    return Collective(
        Generation(1, number),
        shard,
        num_shards,
        host=HOST,
        meeting=meeting,
        forming_timeout_s=timeout_s,
        timeout_s=timeout_s,
    )


def on_all(work: Callable[[int], Tensor], num_shards: int) -> list[Tensor]:
    with ThreadPoolExecutor(num_shards) as pool:
        return list(pool.map(work, range(num_shards), timeout=LIMIT_S))


def form_all(num_shards: int, *, number: int = 1, timeout_s: float = LIMIT_S) -> list[Collective]:
    members = meetings(num_shards, timeout_s)
    with ThreadPoolExecutor(num_shards) as pool:
        forming = [
            pool.submit(form, member, shard, num_shards, number=number, timeout_s=timeout_s)
            for shard, member in enumerate(members)
        ]
        return [each.result(timeout=LIMIT_S) for each in forming]


@pytest.fixture
def group() -> list[Collective]:
    return form_all(3)


def test_all_reduce_of_int64_is_exact(group: list[Collective]) -> None:
    values = [torch.tensor([2**62, -(2**62), shard, 0]) for shard in range(3)]
    expected = torch.stack(values).sum(dim=0)
    for total in on_all(lambda shard: group[shard].all_reduce(values[shard].clone()), 3):
        assert torch.equal(total, expected)


@pytest.mark.parametrize("numel", [3, 300, 100_000])
def test_all_reduce_of_float64_with_zeros_elsewhere_keeps_the_bits(group: list[Collective], numel: int) -> None:
    whole = torch.randn(numel, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-200
    parts = torch.zeros(3, numel, dtype=torch.float64)
    for part, chunk in zip(parts, torch.arange(numel).chunk(3), strict=True):
        part[chunk] = whole[chunk]
    for total in on_all(lambda shard: group[shard].all_reduce(parts[shard].clone()), 3):
        assert torch.equal(total, whole)


def test_all_reduce_keeps_its_shape_and_adds_in_place(group: list[Collective]) -> None:
    def work(shard: int) -> Tensor:
        vector = torch.full((2, 3), float(shard), dtype=torch.float64)
        assert group[shard].all_reduce(vector) is vector
        return vector

    for total in on_all(work, 3):
        assert torch.equal(total, torch.full((2, 3), 3.0, dtype=torch.float64))


def test_all_reduce_alone_needs_no_group() -> None:
    alone = Collective(Generation(1, 1), 0, 1, host=HOST, meeting=Meeting(), forming_timeout_s=1, timeout_s=1)
    vector = torch.ones(3)
    assert alone.all_reduce(vector) is vector
    alone.close()
    assert alone.is_open


def test_collective_whose_member_never_comes_is_an_error_within_the_limit() -> None:
    began = time.monotonic()
    with pytest.raises(
        ShardLostError,
        match=r"shard 0: the 2 shards of generation 1\.7 did not come together within 1 s: waited 1 s; .*0/1",
    ):
        form(meetings(2, 1.0)[0], 0, 2, number=7, timeout_s=1.0)
    assert time.monotonic() - began < 10


def test_all_reduce_whose_member_never_comes_is_an_error_within_the_limit() -> None:
    members = form_all(2, timeout_s=2.0)
    began = time.monotonic()
    with pytest.raises(ShardLostError, match=r"generation 1\.1 \(limit 2 s\)"):
        members[0].all_reduce(torch.ones(2))
    assert 1.0 < time.monotonic() - began < 10
    assert not members[0].is_open
    with pytest.raises(ShardLostError, match="the group was closed"):
        members[0].all_reduce(torch.ones(2))


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
    again = form_all(3, number=2)
    totals = on_all(lambda shard: again[shard].all_reduce(torch.ones(1)), 3)
    assert totals == [torch.tensor([3.0])] * 3


@pytest.fixture
def members(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(index), "5", str(tmp_path / "meeting")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(5)
    ]
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


def test_what_members_told_before_one_attends_counts() -> None:
    member, told = Meeting(), list[tuple[str, bytes]]()
    member.note("a", b"1")
    member.attend(lambda key, value: told.append((key, value)), LIMIT_S)
    member.set("b", "2")
    assert (member.get("a"), member.get("b")) == (b"1", b"2")
    assert told == [("b", b"2")]


def test_nobody_waits_in_a_meeting_that_is_over() -> None:
    (member,) = meetings(1)
    timer = threading.Timer(0.1, member.end)
    timer.start()
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="a later generation is being formed"):
        member.get("a")
    assert time.monotonic() - began < 10, "the limit is 30 s"
    timer.join()
