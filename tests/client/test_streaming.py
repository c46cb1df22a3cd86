"""Gradients that are sent ahead within backward: whatever becomes of them before the step, the bits are the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stepwell
from stepwell.client import overlap, streaming
from stepwell.client.flat import FlatBuffer
from stepwell.client.inprocess import InProcessService, InProcessTransport
from stepwell.client.streaming import PieceStream
from stepwell.server.ahead import Ahead
from stepwell.server.messages import PieceHeader, Registration
from stepwell.server.wire import from_wire, to_wire
from stepwell.sharding import push as push_module
from stepwell.sharding.delivery import Sink
from stepwell.sharding.errors import (
    IncarnationError,
    MessageError,
    ServiceTimeoutError,
    ShapeMismatchError,
    ShardLostError,
)
from stepwell.sharding.push import Push, PushHeader
from stepwell.sharding.reports import StepResult
from tests.client import test_overlap as changes
from tests.client.lines import reached_by
from tests.client.training import assert_equal, assert_same_state, loss_of, make_net

LIMIT_S = 20.0
NUM_STEPS = 5
NUM_SHARDS = 2
NUM_PIECES = 3
"""Of the network's five tiles: one for the first shard, two for the second."""
WAIT_S = 20.0


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (streaming, push_module):
        monkeypatch.setattr(module, "PIECE_NUMEL", 512)
    monkeypatch.setattr(overlap, "MAX_USELESS_STEPS", 99)


class FarTransport(InProcessTransport):
    """In-process shards that are sent pieces, as actors on other nodes are.

    Attributes:
        named: Per step, how many pieces counted that were sent ahead.
        lose: Called before the pieces of the next step are looked for.
    """

    def __init__(self, near: Set[int] = frozenset()) -> None:
        super().__init__(InProcessService(num_shards=NUM_SHARDS))
        self._near, self.named = near, list[int]()
        self._pieces: PieceStream | None = None
        self.held = [Ahead() for _ in range(NUM_SHARDS)]
        self.lose: Callable[[], None] = lambda: None

    def register(self, spec: Any, rank: int, incarnation: str, holdings: Any) -> Registration:
        self._incarnation = incarnation
        return super().register(spec, rank, incarnation, holdings)

    def stream(self, gradient: FlatBuffer) -> PieceStream | None:
        near = self._near
        self._pieces = PieceStream(
            self._layout, NUM_SHARDS, gradient, is_near=lambda shard: shard in near, send=self._send
        )
        return self._pieces

    def _send(self, shard: int, piece: int, serial: int, values: Tensor) -> None:
        header = PieceHeader(0, self._incarnation, piece, serial)
        self.held[shard].hold(header, to_wire(values.clone()), self.service.group.shards[shard].members)

    def step(
        self, header: PushHeader, gradient: FlatBuffer, reloaded: Mapping[int, Tensor], params: FlatBuffer
    ) -> StepResult:
        assert self._pieces is not None
        self._pieces.finish(WAIT_S, what="a test")
        lose, self.lose = self.lose, lambda: None
        lose()
        self.named.append(0)
        pushes = []
        for index, held in enumerate(self.held):
            ahead, left = self._pieces.ahead_of(index)
            self.named[-1] += sum(serial > 0 for serial in ahead)
            wires = held.merge(header.rank, ahead, [to_wire(part) for part in left])
            sink = Sink(params.part, tuple(params.shard_parts(self._layout, index, NUM_SHARDS)))
            pushes.append(Push(header, tuple(map(from_wire, wires)), reloaded, sink))
        result = self.service.group.push(pushes)
        assert result is not None
        return result


def run(
    change: Callable[[changes.Params, int], None],
    transport: FarTransport | None,
    *,
    accumulate: Callable[[int], int] = lambda step: 1,
) -> tuple[nn.Module, Any]:
    """Train, with ``change`` between the backward and the step; without a transport in the ordinary way."""
    net = make_net()
    options: dict[str, Any] = {"weight_decay": 0.1, "max_grad_norm": 1.0}
    if transport is None:
        optimizer = stepwell.Prodigy(net.parameters(), **options)
    else:
        with reached_by(lambda rank: transport):
            optimizer = stepwell.Prodigy(net.parameters(), overlap=True, **options)
    for step in range(NUM_STEPS):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        for part in range(accumulate(step)):
            loss_of(net, 10 * step + part).backward()  # type: ignore[no-untyped-call]
        change(list(net.parameters()), step)
        try:
            optimizer.step()
        except (ServiceTimeoutError, ShardLostError):
            optimizer.step()
    return net, optimizer


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("change", "num_named"),
    [
        (changes.nothing, 3),
        (changes.clip_norm, 0),
        (changes.in_one_kernel, 0),
        (changes.first_in_place, 2),
        (changes.first_replaced, 2),
        (changes.first_removed, 3),
        (changes.first_by_hand, 2),
        (changes.first_through_another_graph, 3),
    ],
)
def test_bits_are_those_of_whole_gradients(
    change: Callable[[changes.Params, int], None], num_named: int, accumulate: int
) -> None:
    transport = FarTransport()
    net, optimizer = run(change, transport, accumulate=lambda step: accumulate)
    assert transport.named == [0] + [num_named] * (NUM_STEPS - 1)
    expected_net, expected = run(change, None, accumulate=lambda step: accumulate)
    assert_equal(net.parameters(), expected_net.parameters())
    assert_same_state(optimizer.state_dict(), expected.state_dict())


def test_gradients_that_do_not_come_as_in_the_step_before_are_sent_again() -> None:
    """More backward passes than before: what was sent does not count. Fewer: nothing is sent."""
    transport = FarTransport()
    counts = [1, 2, 2, 1, 1]
    net, _ = run(changes.nothing, transport, accumulate=counts.__getitem__)
    assert transport.named == [0, 0, NUM_PIECES, 0, NUM_PIECES]
    assert_equal(net.parameters(), run(changes.nothing, None, accumulate=counts.__getitem__)[0].parameters())


def test_near_shard_is_sent_nothing() -> None:
    transport = FarTransport(near={1})
    net, _ = run(changes.nothing, transport)
    assert transport.named == [0] + [1] * (NUM_STEPS - 1)
    assert_equal(net.parameters(), run(changes.nothing, None)[0].parameters())


def test_pieces_that_a_restarted_shard_has_lost_are_sent_again() -> None:
    """The step fails, and the next try sends the whole gradient."""
    transport = FarTransport()

    def lose_pieces(params: changes.Params, step: int) -> None:
        if step == 2:
            transport.lose = lambda: transport.held[1].forget(0)

    net, _ = run(lose_pieces, transport)
    assert transport.named == [0, 3, 3, 0, 3, 3]
    assert_equal(net.parameters(), run(changes.nothing, None)[0].parameters())


def test_pieces_that_went_to_shards_before_others_are_sent_again() -> None:
    transport = FarTransport()

    def put_others_in_their_place(params: changes.Params, step: int) -> None:
        if step == 2:
            assert transport._pieces is not None
            transport._pieces.turn_to(NUM_SHARDS, LIMIT_S)
            transport.held = [Ahead() for _ in range(NUM_SHARDS)]

    net, _ = run(put_others_in_their_place, transport)
    assert transport.named == [0, 3, 0, 3, 3]
    assert_equal(net.parameters(), run(changes.nothing, None)[0].parameters())


def test_sending_that_takes_too_long_is_told() -> None:
    def fail(params: changes.Params, step: int) -> None:
        if step == 2:
            transport.lose = timed_out

    def timed_out() -> None:
        raise ServiceTimeoutError("a test")

    transport = FarTransport()
    net, _ = run(fail, transport)
    assert transport.named == [0, 3, 0, 3, 3]
    assert_equal(net.parameters(), run(changes.nothing, None)[0].parameters())


# What a shard holds


@pytest.fixture
def transport() -> FarTransport:
    transport = FarTransport()
    run(changes.nothing, transport)
    return transport


def hold(transport: FarTransport, piece: int, serial: int, value: float, *, numel: int = 512, who: str = "") -> None:
    header = PieceHeader(0, who or transport._incarnation, piece, serial)
    members = transport.service.group.shards[1].members
    transport.held[1].hold(header, to_wire(torch.full((numel,), value)), members)


def test_newer_piece_takes_the_place_of_an_older_one_however_they_come(transport: FarTransport) -> None:
    hold(transport, 0, 7, 7.0)
    hold(transport, 0, 9, 9.0)
    hold(transport, 0, 8, 8.0)
    hold(transport, 1, 5, 5.0, numel=256)
    wires = transport.held[1].merge(0, (9, 5), [])
    assert [from_wire(wire)[0] for wire in wires] == [9.0, 5.0]
    with pytest.raises(ShardLostError, match="2 pieces"):
        transport.held[1].merge(0, (9, 5), [])


def test_piece_that_no_push_names_goes_with_the_next_push(transport: FarTransport) -> None:
    hold(transport, 0, 7, 7.0)
    whole = [to_wire(torch.zeros(768))]
    assert transport.held[1].merge(0, (), whole) == whole
    assert transport.held[1]._held == {}


def test_pieces_that_do_not_fit_are_refused(transport: FarTransport) -> None:
    for piece, numel in ((0, 256), (1, 512), (2, 256), (0, 1)):
        with pytest.raises(ShapeMismatchError, match="pieces of"):
            hold(transport, piece, 1, 0.0, numel=numel)
    with pytest.raises(IncarnationError):
        hold(transport, 0, 1, 0.0, who="another")
    assert transport.held[1]._held == {}
    with pytest.raises(MessageError, match="expected 1 pieces with its push, got 0"):
        transport.held[1].merge(0, (3, 0), [])
