from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.optim import AdamWRule, LAMBRule, ProdigyRule, Rule
from stepwell.server.messages import (
    MAX_MESSAGE_BYTES,
    Exchange,
    PieceHeader,
    Target,
    pack_exchange,
    pack_job,
    pack_piece,
    pack_push,
    pack_target,
    unpack_exchange,
    unpack_job,
    unpack_piece,
    unpack_push,
    unpack_target,
)
from stepwell.server.wire import from_wire, to_wire
from stepwell.sharding.errors import (
    DTypeMismatchError,
    MessageError,
    StepwellError,
    TruncatedMessageError,
    UnknownVersionError,
)
from stepwell.sharding.job import JobSpec
from stepwell.sharding.layout import ParamSpec
from stepwell.sharding.push import PushHeader
from stepwell.sharding.segments import Address, Placement, Span

PUSH = PushHeader(
    timeline=3,
    sequence=41,
    rank=0,
    incarnation="77-abc",
    attempt=2,
    present=b"\xc0",
    hyper={"lr": [1.0, 0.5], "growth_rate": [float("inf"), 1.02]},
    scalars={"d": 1e-6},
    max_grad_norm=float("inf"),
    max_grad_value=0.5,
    grad_scale=1024.0,
    found_inf=True,
    max_abs=0.25,
    loss=2.5,
)
JOB = JobSpec(
    ProdigyRule(slice_p=11, betas=(0.8, 0.99)),
    (
        ParamSpec("weight", (3, 5), "float32", 0),
        ParamSpec("", (), "bfloat16", 1),
        ParamSpec("empty", (0, 4), "float64", 1),
    ),
    num_groups=2,
    world_size=4,
    chunk_numel=1024,
)
PLACEMENT = Placement(Address(4711, 12, 8192, b"t" * 16), (Span(4096, 3, torch.bfloat16), Span(0, 0, torch.float64)))
TARGET = Target("held", ("bfloat16", "float64"), PLACEMENT)
EXCHANGE = Exchange(pack_push(PUSH), PLACEMENT, TARGET, 60.0, (0, 7, 8))
PIECE = PieceHeader(3, "77-abc", 0, 12)
UNPACKERS: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
    "push": (pack_push(PUSH), unpack_push),
    "job": (pack_job(JOB), unpack_job),
    "target": (pack_target(TARGET), unpack_target),
    "exchange": (pack_exchange(EXCHANGE), unpack_exchange),
    "piece": (pack_piece(PIECE), unpack_piece),
}
each_kind = pytest.mark.parametrize("kind", UNPACKERS)


def altered(kind: str, /, **changes: object) -> bytes:
    packed: bytes = msgpack.packb({**msgpack.unpackb(UNPACKERS[kind][0]), **changes})
    return packed


def without(kind: str, name: str) -> bytes:
    fields = msgpack.unpackb(UNPACKERS[kind][0])
    del fields[name]
    packed: bytes = msgpack.packb(fields)
    return packed


@pytest.mark.parametrize("header", [PUSH, PushHeader(3, 41, 1, "77-abc", 0, b"\xc0")])
def test_push_round_trip_is_the_same(header: PushHeader) -> None:
    assert unpack_push(pack_push(header)) == header


@pytest.mark.parametrize("placement", [PLACEMENT, None])
def test_exchange_round_trip_is_the_same(placement: Placement | None) -> None:
    target = Target("pushed", ("float32",), placement)
    exchange = dataclasses.replace(EXCHANGE, gradient=placement, target=target)
    assert unpack_exchange(pack_exchange(exchange)) == exchange
    assert unpack_target(pack_target(target)) == target


def test_piece_round_trip_is_the_same() -> None:
    assert unpack_piece(pack_piece(PIECE)) == PIECE


@pytest.mark.parametrize("rule", [ProdigyRule(slice_p=11, beta3=0.9), AdamWRule(amsgrad=True), LAMBRule(lr=0.1)])
def test_job_round_trip_is_the_same(rule: Rule) -> None:
    job = dataclasses.replace(JOB, rule=rule)
    assert unpack_job(pack_job(job)) == job


@each_kind
@pytest.mark.parametrize("version", [0, 2, -1, "1", None, [1] * 1000])
def test_unpack_refuses_other_versions(kind: str, version: object) -> None:
    with pytest.raises(UnknownVersionError, match=r"expected protocol version 1, got .{,80}; run the same Stepwell"):
        UNPACKERS[kind][1](altered(kind, version=version))


@each_kind
def test_unpack_refuses_a_message_cut_at_any_length(kind: str) -> None:
    data, unpack = UNPACKERS[kind]
    for length in range(len(data)):
        with pytest.raises(TruncatedMessageError, match=f"got {length} bytes that end early"):
            unpack(data[:length])


@each_kind
@pytest.mark.parametrize("trailing", [b"\x00", b"\xc1", UNPACKERS["push"][0]])
def test_unpack_refuses_trailing_bytes(kind: str, trailing: bytes) -> None:
    data, unpack = UNPACKERS[kind]
    with pytest.raises(MessageError, match=f"expected one {kind} message"):
        unpack(data + trailing)


def test_unpack_refuses_another_kind() -> None:
    with pytest.raises(MessageError, match="expected a job message, got kind str 'push'"):
        unpack_job(pack_push(PUSH))
    with pytest.raises(MessageError, match="expected a push message, got kind str 'job'"):
        unpack_push(pack_job(JOB))


@each_kind
def test_unpack_names_a_missing_field(kind: str) -> None:
    data, unpack = UNPACKERS[kind]
    for name in set(msgpack.unpackb(data)) - {"version", "kind"}:
        with pytest.raises(MessageError, match=f"the message has no field '{name}'"):
            unpack(without(kind, name))


COUNT_WRONG: tuple[object, ...] = (-1, 2**63, True, 1.0, "1", None, [1], {})
TEXT_WRONG: tuple[object, ...] = (1, b"x", None, ["x"])
SPAN = [4096, 3, "float32"]
PLACEMENT_WRONG: tuple[object, ...] = (
    1,
    {},
    [],
    [1, 2, 8192, b"t" * 16],
    *([-1, 2, 8192, b"t" * 16, []], [1, 2.0, 8192, b"t" * 16, []], [1, 2, True, b"t" * 16, []]),
    *([1, 2, 8192, b"t" * 15, []], [1, 2, 8192, "t" * 16, []], [1, 2, 8192, b"t" * 16, {}]),
    *([1, 2, 8192, b"t" * 16, [span]] for span in (SPAN[:2], [-1, 3, "float32"], [0, None, "float32"], [0, 3, "int8"])),
)
WRONG: list[tuple[str, str, tuple[object, ...]]] = [
    *(("push", name, COUNT_WRONG) for name in ("timeline", "sequence", "rank", "attempt")),
    ("push", "incarnation", TEXT_WRONG),
    ("push", "present", (1, "x", None, [1])),
    ("push", "hyper", (1, [], {"lr": 1.0}, {"lr": "1.0"}, {"lr": [None]}, {"lr": [True]}, {"lr": ["1"]})),
    ("push", "hyper", ({b"lr": [1.0]}, {"lr": {"0": 1.0}}, {"lr": b"\x01"})),
    ("push", "scalars", (1, [], {"d": [1.0]}, {"d": "1"}, {"d": float("nan")}, {"d": float("inf")}, {"d": True})),
    *(("push", name, (0.0, -1.0, float("nan"), "1", True, [1.0])) for name in ("max_grad_norm", "max_grad_value")),
    ("push", "grad_scale", (0.0, -1.0, float("nan"), float("inf"), "1", True, None, [1.0])),
    ("push", "found_inf", (0, 1, None, "yes")),
    ("push", "max_abs", (-1.0, float("nan"), float("inf"), "1", True, [1.0])),
    ("target", "part", (*TEXT_WRONG, "all")),
    ("target", "dtypes", ("float32", None, ["int8"], [None], [["float32"]], {"float32": 1})),
    *((kind, name, PLACEMENT_WRONG) for kind, name in (("target", "placement"), ("exchange", "gradient"))),
    ("exchange", "push", (1, "x", None, [1])),
    ("exchange", "target", (1, None, [], {}, {"part": "held", "dtypes": []})),
    ("exchange", "timeout_s", (0.0, -1.0, float("nan"), float("inf"), "1", True, None)),
    ("exchange", "ahead", (None, 1, "x", [-1], [None], ["1"], {"1": 1})),
    *(("piece", name, COUNT_WRONG) for name in ("rank", "piece", "serial")),
    ("piece", "serial", (0,)),
    ("piece", "incarnation", TEXT_WRONG),
    *(("job", name, COUNT_WRONG) for name in ("num_groups", "world_size")),
    ("job", "chunk_numel", tuple(value for value in COUNT_WRONG if value is not None)),
    ("job", "rule", (*TEXT_WRONG, "Sophia")),
    ("job", "rule_fields", (1, [], {"mu": 1.0}, {"lr": "x"}, {"lr": -1.0}, {"betas": 0.9}, {"slice_p": 0})),
    ("job", "params", (1, {}, [1], [["w", [3], "float32"]], [["w", 3, "float32", 0, True]])),
    ("job", "params", ([[1, [3], "float32", 0, True]], [["w", [3], ["float32"], 0, True]])),
    ("job", "params", ([["w", [-3], "float32", 0, True]], [["w", [3.0], "float32", 0, True]])),
    ("job", "params", ([["w", [3], "complex64", 0, True]], [["w", [3], "float32", -1, True]])),
    ("job", "params", ([["w", [3], "float32", 0.5, True]], [["w", [3], "float32", None, True]])),
    ("job", "params", ([["w", [3], "float32", float("inf"), True]],)),
    ("job", "params", ([["w", [3], "float32", 0]], [["w", [3], "float32", 0, 1]], [["w", [3], "float32", 0, None]])),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "values"), WRONG)
def test_unpack_refuses_a_field_of_a_wrong_type(kind: str, name: str, values: tuple[object, ...]) -> None:
    for value in values:
        with pytest.raises(MessageError) as caught:
            UNPACKERS[kind][1](altered(kind, **{name: value}))
        assert len(str(caught.value)) < 300


@each_kind
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc0",
        b"\x90",
        b"\x80",
        b"\x81\x90\x01",
        b"\xc1",
        b"\xd6\xff\x00\x00\x00\x00",
        b"\xc7\x03\xff\x00\x00\x00",
        b"\xa2\xff\xfe",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff" + b"a" * 100,
        b"\x91" * 100_000 + b"\x01",
        b"\x81\xa1a" * 100_000 + b"\x01",
    ],
)
def test_unpack_refuses_huge_lengths_and_deep_nesting(kind: str, data: bytes) -> None:
    began = time.perf_counter()
    with pytest.raises(MessageError):
        UNPACKERS[kind][1](data)
    assert time.perf_counter() - began < 1.0


@each_kind
def test_unpack_refuses_a_huge_field_with_a_short_message(kind: str) -> None:
    data = altered(kind, kind="x" * 10_000_000)
    began = time.perf_counter()
    with pytest.raises(MessageError) as caught:
        UNPACKERS[kind][1](data)
    assert len(str(caught.value)) < 300
    assert time.perf_counter() - began < 1.0


@each_kind
@pytest.mark.parametrize("data", ["text", None, bytearray(b"\x80"), 3])
def test_unpack_refuses_what_is_no_bytes(kind: str, data: Any) -> None:
    with pytest.raises(MessageError, match=f"expected at most {MAX_MESSAGE_BYTES} bytes, got {type(data).__name__}"):
        UNPACKERS[kind][1](data)


@each_kind
@given(data=st.binary(max_size=300))
def test_unpack_of_random_bytes_raises_our_errors_alone(kind: str, data: bytes) -> None:
    with pytest.raises(StepwellError):
        UNPACKERS[kind][1](data)


@each_kind
@given(draw=st.data())
@settings(max_examples=200)
def test_unpack_of_mutated_messages_raises_our_errors_alone(kind: str, draw: st.DataObject) -> None:
    data, unpack = UNPACKERS[kind]
    mutated = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, len(mutated) - 1))
        mutated[at : at + draw.draw(st.integers(0, 3))] = draw.draw(st.binary(max_size=3))
        if not mutated:
            return
    unpack_or_refuse(unpack, bytes(mutated))


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@each_kind
@given(draw=st.data(), value=plain)
@settings(max_examples=200)
def test_unpack_with_any_value_in_a_field_raises_our_errors_alone(
    kind: str, draw: st.DataObject, value: object
) -> None:
    data, unpack = UNPACKERS[kind]
    fields = msgpack.unpackb(data)
    target = fields["rule_fields"] if kind == "job" and draw.draw(st.booleans()) else fields
    target[draw.draw(st.sampled_from(sorted(target)))] = value
    unpack_or_refuse(unpack, msgpack.packb(fields))


def unpack_or_refuse(unpack: Callable[[bytes], object], data: bytes) -> None:
    with contextlib.suppress(StepwellError):
        unpack(data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (257,), (3, 5), (0, 7)])
def test_wire_round_trip_keeps_dtype_and_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    name, array = to_wire(tensor)
    received = from_wire((name, array))
    assert array.ndim == 1
    assert received.dtype == dtype
    assert torch.equal(received, tensor.flatten())


def test_wire_keeps_what_is_not_finite() -> None:
    tensor = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    received = from_wire(to_wire(tensor))
    assert torch.equal(received.view(torch.int32), tensor.view(torch.int32))


def test_wire_shares_memory_and_takes_read_only_arrays() -> None:
    tensor = torch.arange(8.0)
    name, array = to_wire(tensor)
    assert array.ctypes.data == tensor.data_ptr()
    array.flags.writeable = False
    assert torch.equal(from_wire((name, array)), tensor)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("float32", np.zeros(3, np.float64)),
        ("bfloat16", np.zeros(3, np.float16)),
        ("float32", np.zeros(3, ">f4")),
        ("float32", np.zeros((3, 1), np.float32)),
        ("float32", np.array(1.0, np.float32)),
        ("float32", np.zeros(3, object)),
        ("float32", [1.0, 2.0]),
        ("int64", np.zeros(3, np.int64)),
        ("object", np.zeros(3, object)),
        ("", np.zeros(3, np.float32)),
    ],
)
def test_from_wire_refuses_another_dtype(name: str, array: Any) -> None:
    with pytest.raises(DTypeMismatchError, match="expected"):
        from_wire((name, array))


@pytest.mark.parametrize("wire", [None, (), ("float32",), [1, 2], ("float32", np.zeros(1), 3), (7, np.zeros(1))])
def test_from_wire_refuses_what_is_no_tensor(wire: Any) -> None:
    with pytest.raises(MessageError, match="expected a dtype's name and a flat array"):
        from_wire(wire)


def test_from_wire_refuses_strided_arrays() -> None:
    with pytest.raises(DTypeMismatchError, match="flat float32 array"):
        from_wire(("float32", np.arange(6, dtype=np.float32)[::-1]))
