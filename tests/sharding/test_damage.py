"""Damaged and hostile checkpoints: whatever lies there, a restore takes it whole or refuses it and changes nothing."""

from __future__ import annotations

import copy
import functools
import json
import random
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import msgpack
import pytest
import torch
import xxhash

import stepwell
from stepwell.sharding.checkpoint import CheckpointReader, find_damages
from stepwell.sharding.errors import CheckpointError, JobMismatchError
from stepwell.sharding.folder import read_complete
from stepwell.sharding.manifest import MANIFEST_NAME

Files = dict[str, bytes]
"""A checkpoint's files by name."""

NUM_DAMAGED = 1000


class Trained:
    """A small model whose optimizer has taken some steps."""

    def __init__(self, num_steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = [(40, 7), (3,), (), (0, 2), (300,)]
        self.params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        service = stepwell.InProcessService(num_shards=2, kernel="eager")
        self.optimizer = stepwell.Prodigy(self.params, service=service, slice_p=3)
        self.steps(num_steps)

    def steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            for param in self.params:
                param.grad = param.detach() * 0.1 + 1
            self.optimizer.step()

    @property
    def service(self) -> stepwell.InProcessService:
        service = self.optimizer.service
        assert isinstance(service, stepwell.InProcessService)
        return service

    def state(self) -> bytes:
        """Every bit that a restore could touch."""
        shards = self.service.group.shards
        slots = [values for shard in shards for extent in shard.buffers.extents for values in extent.slots.values()]
        numbers = [values.numpy().tobytes() for values in slots]
        return b"".join([*numbers, repr([shard.status() for shard in shards]).encode()])


@functools.cache
def saved() -> Files:
    """The checkpoint that is damaged."""
    Trained(4).service.save("memory://damage/whole")
    files = fsspec.filesystem("memory")
    return {path.rsplit("/", 1)[1]: files.cat_file(path) for path in files.ls("/damage/whole", detail=False)}


@pytest.fixture(scope="module", autouse=True)
def _empty_memory() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").rm("/damage", recursive=True)


def put(files: Files) -> str:
    """Lay a checkpoint's files out."""
    uri = f"memory://damage/{uuid.uuid4().hex}"
    for name, data in files.items():
        fsspec.filesystem("memory").pipe_file(f"{uri}/{name}", data)
    return uri


def shard_files(files: Files) -> list[str]:
    return sorted(name for name in files if name != MANIFEST_NAME)


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


# Every bit


@pytest.mark.parametrize("index", [0, 1, 2])
def test_flipped_bit_is_found_wherever_it_is(index: int) -> None:
    """Of every 61st byte one bit, of all files together: headers, the spaces behind them, tensors, manifest."""
    name = sorted(saved())[index]
    for position in range(0, len(saved()[name]), 61):
        uri = put({**saved(), name: flipped(saved()[name], position * 8 + position % 8)})
        damages = find_damages(uri)
        assert [damage.file for damage in damages] == [name], position


def tiny() -> Files:
    """A checkpoint of two numbers, which has all that one has."""
    optimizer = stepwell.SGD(
        [torch.nn.Parameter(torch.ones(2))], lr=0.1, service=stepwell.InProcessService(num_shards=1, kernel="eager")
    )
    optimizer.service.save("memory://damage/tiny")
    files = fsspec.filesystem("memory")
    return {path.rsplit("/", 1)[1]: files.cat_file(path) for path in files.ls("/damage/tiny", detail=False)}


@pytest.mark.timeout(400)
def test_every_flipped_bit_of_a_tiny_checkpoint_is_found() -> None:
    files, memory = tiny(), fsspec.filesystem("memory")
    uri = put(files)
    for name, data in files.items():
        for bit in range(8 * len(data)):
            memory.pipe_file(f"{uri}/{name}", flipped(data, bit))
            assert [damage.file for damage in find_damages(uri)] == [name], (name, bit)
        memory.pipe_file(f"{uri}/{name}", data)
    assert find_damages(uri) == []


def test_damage_is_told_by_file_and_tensor_and_all_of_it() -> None:
    first, second = shard_files(saved())
    uri = put({**saved(), first: flipped(saved()[first], 8 * len(saved()[first]) - 1), second: saved()[second][:-1]})
    one, other = map(str, find_damages(uri))
    assert one.startswith(f"{first}: ")
    assert "exp_avg" in one or "of parameter" in one
    assert one.endswith("is damaged: it has not the digest it should")
    size = len(saved()[second])
    assert other == f"{second}: was cut short: expected {size} bytes, got {size - 1}"
    uri = put({MANIFEST_NAME: saved()[MANIFEST_NAME], second: saved()[second]})
    assert [str(damage) for damage in find_damages(uri)] == [f"{first}: is missing"]


def test_what_is_whole_has_no_damage() -> None:
    assert find_damages(put(saved())) == []


def test_restore_of_a_damaged_checkpoint_leaves_the_run_as_it_was() -> None:
    run, undisturbed = Trained(3), Trained(6)
    for name in shard_files(saved()):
        uri = put({**saved(), name: flipped(saved()[name], 8 * len(saved()[name]) - 1)})
        before = run.state()
        with pytest.raises(CheckpointError, match=rf"{uri}: {name}: .* of parameter \d.*is damaged.*use another"):
            run.service.restore(uri)
        assert run.state() == before
    run.steps(3)
    assert all(map(torch.equal, run.params, undisturbed.params))


def test_shards_verify_a_share_each_and_all_of_it_together() -> None:
    second = shard_files(saved())[1]
    uri = put({**saved(), second: flipped(saved()[second], 8 * len(saved()[second]) - 1)})
    with CheckpointReader(uri, read_complete(uri)) as reader:
        reader.require_intact(0, 2)
        reader.require_intact(2, 3)
        with pytest.raises(CheckpointError, match=second):
            reader.require_intact(1, 2)


# A thousand checkpoints


def bytes_changed(files: Files, chance: random.Random) -> Files:
    """Damage that disks, networks and people do; digests stay as they were."""
    name = chance.choice(sorted(files))
    data = files[name]
    at, length = chance.randrange(len(data)), chance.choice((1, 2, 8, 100, 5000))
    kinds: list[Callable[[], bytes]] = [
        lambda: flipped(data, at * 8 + chance.randrange(8)),
        lambda: data[:at],
        lambda: data + chance.randbytes(length),
        lambda: data[:at] + chance.randbytes(length) + data[at + length :],
        lambda: data[:at] + bytes(length) + data[at + length :],
        lambda: data[:at] + data[at + length :],
        lambda: data[:at] + data[at : at + length] + data[at:],
        lambda: b"",
        lambda: files[chance.choice(sorted(files))],
    ]
    changed = {**files, name: chance.choice(kinds)()}
    if chance.random() < 0.05:
        del changed[name]
    return changed


NESTED: Any = json.loads("[" * 400 + "]" * 400)
HOSTILE: list[Any] = [
    *(0, 1, -1, 2**31, 2**53, 2**63 - 1, 2**64 - 1, -(2**63)),
    *(0.0, -0.5, 1e308, float("inf"), float("nan"), True, None, "", "master_param", "x" * 5000, "../../etc/passwd"),
    *(
        [],
        {},
        [[]] * 50,
        [0] * 5000,
        b"\x80\x04.",
        {"d": 1},
        NESTED,
    ),
]


def field_changed(value: Any, chance: random.Random) -> Any:
    """A copy of some nested fields, with one of them, anywhere, put to something it should not be."""
    if isinstance(value, (dict, list)) and value and chance.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key, changed = chance.choice(keys), copy.copy(value)
        what = chance.random()
        if what < 0.05:
            del changed[key]
        elif what < 0.1 and isinstance(changed, list):
            changed.insert(key, chance.choice(changed))
        elif what < 0.15:
            changed[key] = value[chance.choice(keys)]
        else:
            changed[key] = field_changed(value[key], chance)
        return changed
    if isinstance(value, int) and chance.random() < 0.3:
        return value + chance.choice((-1, 1, 4, 256))
    return chance.choice(HOSTILE)


def fields_changed(files: Files, chance: random.Random) -> Files:
    """A manifest that says what it should not, with a digest that fits."""
    fields = msgpack.unpackb(files[MANIFEST_NAME][:-8])
    for _ in range(chance.randint(1, 2)):
        part = chance.choice([*fields, None])
        if part is None:
            fields = field_changed(fields, chance)
        else:
            fields[part] = field_changed(fields[part], chance)
        if not isinstance(fields, dict) or not fields:
            break
    return {**files, MANIFEST_NAME: sealed(fields)}


def header_changed(files: Files, chance: random.Random) -> Files:
    """A header that says what it should not, or none, with digests, lengths and sizes that fit."""
    fields, index = msgpack.unpackb(files[MANIFEST_NAME][:-8]), chance.randrange(2)
    name = fields["files"][index][0]
    data = files[name]
    begin = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(field_changed(json.loads(data[8:begin]), chance), default=repr).encode()
    text = chance.choice([text, text[: len(text) // 2], b"[" * 3000, b'{"a":' * 1500, b"9" * 5000, b"\xff\xfe"])
    padded = text + b" " * max(0, begin - 8 - len(text))
    length = chance.choice([len(padded)] * 9 + [chance.getrandbits(64)])
    changed = length.to_bytes(8, "little") + padded + data[begin:]
    fields["files"][index][1:] = len(changed), xxhash.xxh3_64_intdigest(changed[: len(padded) + 8])
    return {**files, name: changed, MANIFEST_NAME: sealed(fields)}


def sealed(fields: object) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return packed + xxhash.xxh3_64_intdigest(packed).to_bytes(8, "little")


def restored_or_refused(run: Trained, uri: str) -> str | None:
    """Restore; what was said if it was refused."""
    try:
        run.service.restore(uri)
    except (CheckpointError, JobMismatchError) as error:
        return str(error)
    return None


def test_thousand_damaged_checkpoints_are_refused_or_taken_whole() -> None:
    """Never another error than ours, and never half a state: a refusal leaves every bit as it was."""
    chance, run, num_taken = random.Random(5), Trained(2), 0
    for index in range(NUM_DAMAGED):
        damage = (bytes_changed, fields_changed, header_changed)[index % 3]
        files = damage(saved(), chance)
        uri, before = put(files), run.state()
        refusal = restored_or_refused(run, uri)
        if refusal is None:
            assert damage is not bytes_changed or files == saved(), index
            num_taken += 1
        else:
            assert run.state() == before, (index, refusal)
            assert uri in refusal
            assert len(refusal) < 2000
    assert num_taken < NUM_DAMAGED / 3
    run.service.restore(put(saved()))
    run.optimizer.refresh()
    run.steps(2)
    assert all(map(torch.equal, run.params, Trained(6).params))
