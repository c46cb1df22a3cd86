"""Shared memory without a name: what it holds, who may open it, and that nothing is left of it."""

from __future__ import annotations

import dataclasses
import fcntl
import gc
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from stepwell.sharding import available, segments
from stepwell.sharding.errors import MessageError, SegmentError
from stepwell.sharding.segments import ALIGNMENT, Address, Span, allocate, open_segment
from tests.namespaces import HOLD, LIMIT_S, why_none

ROOT = Path(__file__).parents[2]
SIZES = [(1000, torch.float32), (0, torch.float64), (3, torch.bfloat16), (7, torch.float64), (5, torch.float16)]

OWNER = """
import sys
from stepwell.sharding.segments import allocate
import torch

segment, (part,) = allocate([(int(sys.argv[1]), torch.float32)])
part.copy_(torch.arange(len(part)))
print(segment.address.pid, segment.address.fd, segment.address.size_bytes, segment.address.token.hex(), flush=True)
sys.stdin.read()
print(part[1].item(), flush=True)
"""


@dataclasses.dataclass
class Owner:
    process: subprocess.Popen[str]
    address: Address


CONTAINER = """
import sys
from stepwell.sharding.errors import SegmentError
from stepwell.sharding.segments import Address, allocate, open_segment
import torch

segment, _ = allocate([(1000, torch.float32)])
own = segment.address
print(own.pid, own.fd, own.size_bytes, own.token.hex(), flush=True)
pid, fd, size, token = sys.stdin.readline().split()
address = Address(int(pid), int(fd), int(size), bytes.fromhex(token))
assert (address.pid, address.fd, address.size_bytes) == (own.pid, own.fd, own.size_bytes)
try:
    open_segment(address)
except SegmentError as error:
    print(error, flush=True)
"""

NUMEL = 2**20


@pytest.fixture
def owner() -> Iterator[Owner]:
    """Another process that owns a segment of ``NUMEL`` float32."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(NUMEL)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pid, fd, size, token = process.stdout.readline().split()
    yield Owner(process, Address(int(pid), int(fd), int(size), bytes.fromhex(token)))
    process.kill()
    process.communicate()


def links() -> list[str]:
    """What of ours this process has open."""
    folder = Path("/proc/self/fd")
    return [name for name in map(_link, folder.iterdir()) if name.startswith("/memfd:stepwell")]


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:  # the descriptor that the listing itself took
        return ""


def mapped_bytes() -> int:
    """Bytes of ours that this process has mapped, whoever of it still refers to them."""
    gc.collect()
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:stepwell" in line]
    edges = ([int(edge, 16) for edge in line[0].split("-")] for line in lines)
    return sum(last - first for first, last in edges)


def test_parts_have_dtypes_and_storages_of_their_own() -> None:
    _, parts = allocate(SIZES)
    assert [(part.numel(), part.dtype) for part in parts] == SIZES
    for index, part in enumerate(parts):
        assert not part.any()
        assert part.numel() == 0 or part.data_ptr() % ALIGNMENT == 0
        part.fill_(index + 1)
    for index, part in enumerate(parts):
        assert torch.equal(part, torch.full_like(part, index + 1))
        assert part.untyped_storage().nbytes() == part.numel() * part.itemsize


def test_saving_one_small_part_writes_that_part_alone() -> None:
    _, (_, small) = allocate([(2**20, torch.float32), (3, torch.float32)])
    file = io.BytesIO()
    torch.save(small, file)
    assert file.tell() < 4096


def test_span_of_finds_views_and_nothing_else() -> None:
    segment, (first, _, _, second, _) = allocate(SIZES)
    for view in (first, first[10:20], second[3:]):
        span = segment.span_of(view)
        assert span is not None
        found = segment.tensor(span)
        assert found.data_ptr() == view.data_ptr()
        assert torch.equal(found, view)
        assert found.dtype == view.dtype
    assert segment.span_of(torch.zeros(4)) is None
    assert segment.span_of(allocate(SIZES)[1][0]) is None


def test_other_process_reads_and_writes_the_same_memory(owner: Owner) -> None:
    part = open_segment(owner.address).tensor(Span(ALIGNMENT, NUMEL, torch.float32))
    assert torch.equal(part, torch.arange(NUMEL, dtype=torch.float32))
    part[1] = 7.5
    assert owner.process.communicate("")[0] == "7.5\n"


def test_memory_outlives_its_owner_in_who_has_mapped_it_and_no_longer(owner: Owner) -> None:
    before, known = mapped_bytes(), links()
    part = open_segment(owner.address).tensor(Span(ALIGNMENT, NUMEL, torch.float32))
    owner.process.kill()
    owner.process.wait()
    assert torch.equal(part, torch.arange(NUMEL, dtype=torch.float32))
    with pytest.raises(SegmentError, match=r"No such file or directory; the worker has ended"):
        open_segment(owner.address)
    assert mapped_bytes() - before == owner.address.size_bytes
    del part
    gc.collect()
    assert (mapped_bytes() - before, links()) == (0, known)


def test_memory_goes_with_its_last_tensor() -> None:
    before, known = mapped_bytes(), links()
    segment, parts = allocate(SIZES)
    address, kept = segment.address, parts[3].view(7, 1)
    del segment, parts
    gc.collect()
    assert mapped_bytes() - before == address.size_bytes
    assert open_segment(address).address == address, "as long as there is a tensor it can be opened"
    del kept
    gc.collect()
    assert (mapped_bytes() - before, links()) == (0, known)


def test_wrong_token_is_refused(owner: Owner) -> None:
    with pytest.raises(SegmentError, match="other memory than was named lies there"):
        open_segment(dataclasses.replace(owner.address, token=bytes(16)))


@pytest.mark.skipif(why_none() is not None, reason=f"containers: {why_none()}")
def test_containers_whose_processes_have_the_same_ids_do_not_take_each_others_memory() -> None:
    containers = [
        subprocess.Popen(
            [*HOLD, sys.executable, "-c", CONTAINER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    addresses = [container.stdout.readline() for container in containers if container.stdout is not None]
    for container, other in zip(containers, reversed(addresses), strict=True):
        said, _ = container.communicate(other, timeout=LIMIT_S)
        assert "other memory than was named lies there" in said


def test_wrong_size_is_refused(owner: Owner) -> None:
    with pytest.raises(SegmentError, match=f"expected 8192 bytes, got {owner.address.size_bytes}"):
        open_segment(dataclasses.replace(owner.address, size_bytes=8192))


def test_what_is_no_segment_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    fd = os.open(tmp_path / "fifo", os.O_RDWR)
    try:
        with pytest.raises(SegmentError, match=r"expected shared memory, got .*fifo; the worker has ended"):
            open_segment(Address(os.getpid(), fd, 8192, bytes(16)))
    finally:
        os.close(fd)


def test_memory_that_its_owner_could_cut_short_is_refused() -> None:
    fd = os.memfd_create("stepwell", os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, 8192)
        with pytest.raises(SegmentError, match="cannot cut short"):
            open_segment(Address(os.getpid(), fd, 8192, bytes(16)))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        open_segment(Address(os.getpid(), fd, 8192, bytes(16)))
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "span",
    [
        Span(ALIGNMENT, 3 * ALIGNMENT // 4, torch.float32),
        Span(0, 4, torch.float32),
        Span(ALIGNMENT + 2, 4, torch.float32),
        Span(ALIGNMENT, -1, torch.float32),
        Span(-ALIGNMENT, 4, torch.float32),
    ],
    ids=str,
)
def test_part_that_is_not_within_the_segment_is_refused(span: Span) -> None:
    segment, _ = allocate([(2 * ALIGNMENT // 4, torch.float32)])
    with pytest.raises(MessageError, match="expected a part within bytes"):
        segment.tensor(span)


def test_too_large_a_demand_is_told_before_it_is_taken() -> None:
    before = links()
    free = available.available_bytes()
    with pytest.raises(SegmentError, match=r"expected \d+ MiB, got \d+ MiB free .*; give it more memory") as caught:
        allocate([(free, torch.float32)])
    assert f"expected {-(-(4 * free + ALIGNMENT) // 2**20)} MiB" in str(caught.value)
    assert links() == before


def test_memory_that_is_gone_when_it_is_taken_is_told() -> None:
    before = links()
    with (
        mock.patch.object(os, "posix_fallocate", side_effect=OSError(28, "No space left on device")),
        pytest.raises(SegmentError, match=r"expected 1 MiB, got \d+ MiB free .* \(No space left on device\)"),
    ):
        allocate(SIZES)
    assert links() == before


def test_system_without_such_memory_is_told() -> None:
    with (
        mock.patch.object(segments, "os", mock.Mock(spec=[])),
        pytest.raises(SegmentError, match="expected Linux's memfd_create"),
    ):
        allocate(SIZES)


GROUPS: dict[str, tuple[str, dict[str, tuple[object, int, int]], tuple[str, str, str], int]] = {
    "v2, the limit on a parent": (
        "0::/job/task\n",
        {"job": ("max", 1, 0), "": (1000, 900, 300)},
        ("memory.max", "memory.current", "inactive_file"),
        400,
    ),
    "v2, a path of the host's": (
        "0::/kubepods/pod1\n",
        {"": (700, 100, 0)},
        ("memory.max", "memory.current", "inactive_file"),
        600,
    ),
    "v1": (
        "9:name=systemd:/\n4:memory:/job\n0::/\n",
        {"memory/job": (5000, 4990, 0), "memory": (2**62, 7, 0)},
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        10,
    ),
    "over the limit": ("0::/\n", {"": (10, 20, 0)}, ("memory.max", "memory.current", "inactive_file"), 0),
    "none": ("0::/\n", {}, ("", "", ""), 2048 * 1024),
}


@pytest.mark.parametrize("case", GROUPS)
def test_available_heeds_machine_and_control_groups(tmp_path: Path, case: str) -> None:
    own, groups, (limit, usage, inactive), expected = GROUPS[case]
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 99999 kB\nMemAvailable:    2048 kB\nHugePages_Total:   0\n")
    (proc / "self" / "cgroup").write_text(own)
    for name, (its_limit, its_usage, its_inactive) in groups.items():
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{its_limit}\n")
        (folder / usage).write_text(f"{its_usage}\n")
        (folder / "memory.stat").write_text(f"cache 5\n{inactive} {its_inactive}\n")
    assert available.available_bytes(proc=proc, cgroups=root) == expected
