"""A GPU worker's copies, on a stand-in for CUDA: what is asked of it is done when it is waited for, and not before."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import stepwell
from stepwell.client import model_buffers, node_memory, overlap, staging
from stepwell.client.inprocess import InProcessService, InProcessTransport
from stepwell.client.node_memory import NodeMemory
from stepwell.client.staging import Staging
from stepwell.sharding.errors import SegmentError
from stepwell.sharding.pinning import pin
from stepwell.sharding.segments import allocate
from tests.client.lines import reached_by
from tests.client.test_streaming import FarTransport
from tests.client.training import assert_equal, loss_of, make_net

NUM_STEPS = 4
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._foreach_copy_.default)


class Stream:
    """A CUDA stream on which copies that are not to block wait until somebody waits for them."""

    def __init__(self, device: object = None) -> None:
        self.pending: list[Callable[[], object]] = []
        self.behind: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.behind.append(other)

    def record_event(self) -> Any:
        return SimpleNamespace(synchronize=self.run)

    def run(self) -> None:
        pending, self.pending = self.pending, []
        for copy in pending:
            copy()


class Deferring(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Work on a stream: copies that are not to block are done later."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_deferred = func in COPIES and ((len(args) > 2 and args[2]) or (kwargs or {}).get("non_blocking"))
        if not is_deferred:
            return func(*args, **(kwargs or {}))
        self._stream.pending.append(lambda: func(*args[:2]))
        return args[0]


class Cuda:
    """Stands for ``torch.cuda``.

    Attributes:
        current: The stream of the model's own work.
        recorded: Tensors whose memory a stream keeps from being given away.
    """

    def __init__(self) -> None:
        self.current = Stream()
        self.recorded: list[Tensor] = []
        self.Stream = Stream

    def current_stream(self, device: object) -> Stream:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        with Deferring(stream):
            yield


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: cuda.recorded.append(tensor))
    monkeypatch.setattr(model_buffers, "staging_of", lambda device, parts: Staging(device))
    monkeypatch.setattr(overlap, "MIN_NUMEL", 1)
    return cuda


def train(transport: InProcessTransport | None, change: Callable[[nn.Module, int], None], **options: Any) -> nn.Module:
    net = make_net()
    line = transport or InProcessTransport(InProcessService())
    with reached_by(lambda rank: line):
        optimizer = stepwell.Prodigy(net.parameters(), **options)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss_of(net, step).backward()  # type: ignore[no-untyped-call]
        change(net, step)
        optimizer.step()
    return net


def nothing(net: nn.Module, step: int) -> None:
    pass


def first_removed(net: nn.Module, step: int) -> None:
    next(net.parameters()).grad = None


def clipped(net: nn.Module, step: int) -> None:
    nn.utils.clip_grad_norm_(net.parameters(), 0.01)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("change", [nothing, first_removed, clipped])
@pytest.mark.parametrize("overlap_", [False, True])
def test_bits_are_those_without_a_stream(
    change: Callable[[nn.Module, int], None], overlap_: bool, dtype: torch.dtype | None, request: pytest.FixtureRequest
) -> None:
    expected = train(None, change, gradient_dtype=dtype)
    cuda = request.getfixturevalue("cuda")
    net = train(None, change, gradient_dtype=dtype, overlap=overlap_)
    assert_equal(net.parameters(), expected.parameters())
    assert cuda.recorded, "gradients went over the stream"


def test_pieces_are_sent_when_they_have_been_copied(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    transport = FarTransport()
    net = train(transport, nothing, overlap=True)
    assert transport.named == [0, 2, 2, 2]
    monkeypatch.undo()
    assert_equal(net.parameters(), train(None, nothing).parameters())


def test_stream_goes_on_behind_what_makes_gradients(cuda: Cuda) -> None:
    copies = Staging(torch.device("cpu"))
    target, source = torch.zeros(4), torch.arange(4.0)
    (seen,) = copies.copy(target, source, lambda values: [values.sum()])
    assert copies._stream.behind == [cuda.current]  # type: ignore[attr-defined]
    assert seen == 6.0
    assert not target.any()
    copies.mark()()
    assert torch.equal(target, source)
    assert cuda.recorded[0] is source


# Memory


class Runtime:
    """Stands for ``torch.cuda.cudart()``."""

    def __init__(self, error: int = 0) -> None:
        self.error, self.pinned = error, dict[int, int]()

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
        assert flags == 1
        if not self.error:
            self.pinned[address] = size_bytes
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def test_segment_is_pinned_as_long_as_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    segment, (part,) = allocate([(1000, torch.float32)])
    pin(segment)
    assert list(runtime.pinned.values()) == [len(segment)]
    del segment
    gc.collect()
    assert runtime.pinned
    del part
    gc.collect()
    assert not runtime.pinned


def test_memory_that_cannot_be_pinned_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(error=2))
    with pytest.raises(SegmentError, match=r"cudaHostRegister .* error 2"):
        pin(allocate([(1000, torch.float32)])[0])


@pytest.mark.parametrize("is_near", [True, False])
def test_buffers_of_a_gpu_worker_are_pinned_whether_or_not_a_shard_is_near(
    is_near: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[object] = []
    monkeypatch.setattr(node_memory, "pin", pinned.append)
    memory = NodeMemory()
    memory.note([None if is_near else "a test"])
    parts = memory.allocate([(1000, torch.float32)], torch.device("cuda"))
    assert parts is not None
    assert parts[0].device.type == "cpu"
    assert len(pinned) == 1
    assert (memory.allocate([(1000, torch.float32)], torch.device("cpu")) is not None) == is_near
    assert len(pinned) == 1


def test_staging_is_between_devices_alone() -> None:
    cpu, here = torch.device("cpu"), [torch.zeros(3)]
    assert staging.staging_of(cpu, here) is None
    assert staging.staging_of(torch.device("cuda"), [torch.zeros(3, device="meta")]) is None
