"""Ten thousand mutated messages and files: each is refused with an error of ours or read, in bounded memory.

Real ones are taken and damaged a little, as those get past the first checks. Hypothesis looks at each decoder's fields
apart, see ``test_messages.py`` and ``tests/sharding/test_tensor_file.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import fsspec
import msgpack
import torch

from stepwell.optim import ProdigyRule
from stepwell.server.messages import (
    pack_exchange,
    pack_holdings,
    pack_push,
    unpack_exchange,
    unpack_holdings,
    unpack_push,
)
from stepwell.sharding.coverage import Holdings, Range
from stepwell.sharding.errors import CheckpointError, StepwellError
from stepwell.sharding.folder import manifest_bytes
from stepwell.sharding.manifest import Manifest
from stepwell.sharding.push import Push
from tests.server.test_messages import EXCHANGE, JOB, UNPACKERS
from tests.sharding.test_damage import Trained, field_changed
from tests.sharding.test_tensor_file import opened, packed
from tests.zoo import Run, small

NUM_FUZZED = 10_000
PEAK_BYTES = 64 * 2**20
HUGE = (0, 1, -1, 2**31, 2**63 - 1, 2**64 - 1)


def one_mutation(data: bytes, chance: random.Random) -> bytes:
    """Bits, lengths, runs of bytes, the end, or a field by its meaning."""
    damaged, at = bytearray(data), chance.randrange(len(data))
    match chance.randrange(7):
        case 0:
            damaged[at] ^= 1 << chance.randrange(8)
        case 1:
            damaged[at] = chance.choice([0x00, 0x7F, 0x80, 0xC0, 0xC1, 0xC6, 0xDB, 0xDD, 0xDF, 0xFF])
        case 2:
            damaged[at : at + 8] = chance.choice(HUGE).to_bytes(9, "big", signed=True)[1:]
        case 3:
            del damaged[at : at + chance.randrange(1, 9)]
        case 4:
            damaged[at:at] = damaged[chance.randrange(len(data)) :][: chance.randrange(1, 40)]
        case 5:
            del damaged[at:]
        case _:
            return with_a_field_changed(data, chance)
    return bytes(damaged)


def with_a_field_changed(data: bytes, chance: random.Random) -> bytes:
    try:
        fields = msgpack.unpackb(data, strict_map_key=False)
        packed_again: bytes = msgpack.packb(field_changed(fields, chance))
    except (ValueError, TypeError, OverflowError, msgpack.exceptions.UnpackException):
        return data[::-1]
    return packed_again


def mutated(data: bytes, chance: random.Random) -> bytes:
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        data = one_mutation(data, chance) if data else b"\xc1"
    return data


class Receiver:
    """A shard that is sent pushes."""

    def __init__(self) -> None:
        self.run = Run(small(), ProdigyRule(d0=1e-2))
        self.run.step()
        (self.push,) = self.run.pushes()
        self.message = pack_exchange(dataclasses.replace(EXCHANGE, push=pack_push(self.push.header)))

    def receive(self, data: bytes) -> None:
        header = unpack_push(unpack_exchange(data).push)
        self.run.group.shards[0].receive(Push(header, self.push.gradient))

    def state(self) -> bytes:
        shard = self.run.group.shards[0]
        slots = [values for extent in shard.buffers.extents for values in extent.slots.values()]
        return b"".join([*(values.numpy().tobytes() for values in slots), repr(shard.status()).encode()])


def read_tensors(data: bytes) -> None:
    """As a checkpoint's reader does."""
    try:
        opened(data).read_into("a", 3, 0, torch.empty(3))
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def decoders(receiver: Receiver) -> dict[str, tuple[bytes, Callable[[bytes], Any]]]:
    whole = tuple(Range(0, param.numel) for param in JOB.params)
    Trained(1).service.save("memory://fuzz")
    manifest = manifest_bytes("memory://fuzz")
    fsspec.filesystem("memory").rm("/fuzz", recursive=True)
    tensors = packed({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.bfloat16)})
    return {
        **UNPACKERS,
        "received": (receiver.message, receiver.receive),
        "holdings": (pack_holdings(Holdings(whole, whole)), functools.partial(unpack_holdings, params=JOB.params)),
        "manifest": (manifest, lambda data: Manifest.unpack(data, "memory://fuzz")),
        "tensors": (tensors, read_tensors),
    }


def refusal_of(read: Callable[[bytes], Any], data: bytes) -> str | None:
    """What a decoder says if it refuses bytes; any other error than ours goes on."""
    try:
        read(data)
    except StepwellError as error:
        return str(error)
    return None


def test_ten_thousand_fuzzed_messages_are_refused_or_read_and_change_nothing() -> None:
    chance, receiver = random.Random(7), Receiver()
    kinds, before = decoders(receiver), receiver.state()
    num_refused = dict.fromkeys(kinds, 0)
    for _, (data, read) in kinds.items():
        read(data)
    tracemalloc.start()
    for index in range(NUM_FUZZED):
        kind = list(kinds)[index % len(kinds)]
        data, read = kinds[kind]
        refusal = refusal_of(read, mutated(data, chance))
        num_refused[kind] += refusal is not None
        assert refusal is None or len(refusal) < 2000, (kind, index)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < PEAK_BYTES
    assert min(num_refused.values()) > 100, num_refused
    assert receiver.state() == before
    receiver.run.group.push(receiver.run.pushes(attempt=2**62))  # in place of one that was as good as real
    undisturbed = Run(small(), ProdigyRule(d0=1e-2))
    undisturbed.step()
    undisturbed.step()
    assert all(map(torch.equal, receiver.run.params(), undisturbed.params()))
