"""Checkpoints: written by any number of shards, read by any other, and never half of one.

What lies in the files is read back with msgpack and safetensors alone, as docs/checkpoint.md says.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import msgpack
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from stepwell.optim import AdamWRule, LAMBRule, NAdamRule, ProdigyRule, Rule, StableAdamRule
from stepwell.sharding.buffers import MASTER
from stepwell.sharding.checkpoint import CheckpointReader, write_shard
from stepwell.sharding.errors import CheckpointError, JobMismatchError, NotRegisteredError
from stepwell.sharding.folder import read_complete, write_manifest
from stepwell.sharding.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    build_manifest,
    check_restorable,
    shard_file_name,
)
from tests.page_reader import read_checkpoint
from tests.zoo import Problem, Run, ZooTensor, assert_same_state, constant, small

PAGE = Path(__file__).parents[2] / "docs" / "checkpoint.md"
RULES: dict[str, Rule] = {
    "Prodigy": ProdigyRule(d0=1e-3, slice_p=11),
    "AdamW": AdamWRule(amsgrad=True),
    "LAMB": LAMBRule(),
    "NAdam": NAdamRule(),
    "StableAdam": StableAdamRule(lr=0.01),
    "Prodigy-bfloat16": ProdigyRule(d0=1e-3, stat_dtype="bfloat16", d_scope="group"),
}


def problem() -> Problem:
    """The small one, with a float64 tensor, empty ones and a float64 convolution."""
    extra = [
        ZooTensor((500,), dtype="float64"),
        ZooTensor((0, 3)),
        ZooTensor((70,), dtype="bfloat16"),
        ZooTensor((4, 0, 3, 3)),
        ZooTensor((9, 2, 5, 7), dtype="float64"),
    ]
    return dataclasses.replace(small(), tensors=(*small().tensors, *extra))


def trained(name: str = "Prodigy", num_shards: int = 3, num_steps: int = 10) -> Run:
    return Run(problem(), RULES[name], num_shards=num_shards).steps(num_steps, schedule=constant)


def write_tensors(run: Run, uri: str) -> Manifest:
    """All of a save but its manifest."""
    save_id, shards = uuid.uuid4().hex, run.group.shards
    names = [shard_file_name(save_id, index, len(shards)) for index in range(len(shards))]
    files = [write_shard(shard.snapshot(), uri, name) for shard, name in zip(shards, names, strict=True)]
    return build_manifest(run.group.spec, files, shards[0].status())


def save(run: Run, uri: str) -> Manifest:
    manifest = write_tensors(run, uri)
    write_manifest(uri, manifest)
    return manifest


def restore(uri: str, rule: Rule, num_shards: int) -> Run:
    with CheckpointReader(uri, read_complete(uri)) as reader:
        return Run(problem(), rule, num_shards=num_shards, source=reader.source())


@pytest.fixture
def memory() -> Iterator[str]:
    uri = f"memory://checkpoints/{uuid.uuid4().hex}"
    yield uri
    fsspec.filesystem("memory").rm("/checkpoints", recursive=True)


# The bytes


@pytest.mark.parametrize("num_shards", [1, 4])
@pytest.mark.parametrize("name", RULES)
def test_checkpoint_can_be_read_from_its_page_alone(tmp_path: Path, name: str, num_shards: int) -> None:
    run = trained(name, num_shards)
    save(run, str(tmp_path))
    state = run.state()
    checkpoint = read_checkpoint(tmp_path)
    found, manifest = dict(checkpoint.slots), checkpoint.manifest
    for slot, values in state.slots.items():
        for param, value in enumerate(values):
            read = torch.from_numpy(found.pop((param, slot), np.zeros(0)).copy())
            assert torch.equal(read.to(value.dtype), value)
    assert not found
    assert len(manifest["files"]) == num_shards
    assert manifest["scalars"] == state.scalars
    assert tuple(manifest["step_counts"]) == state.step_counts
    assert (manifest["sequence"], manifest["step"], manifest["skipped_steps"]) == state.counters
    assert manifest["job"]["params"][0] == ["p0", [40, 13], "float32", 0, True]
    assert {path.name for path in tmp_path.iterdir()} == {MANIFEST_NAME, *(name for name, _, _ in manifest["files"])}


@pytest.mark.parametrize("name", RULES)
def test_page_s_own_reader_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    run = trained(name, 4)
    save(run, str(tmp_path / "checkpoint"))
    *_, block = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    weight = run.state().params[0].view(run.group.spec.params[0].shape)
    namespace: dict[str, Any] = {"model": SimpleNamespace(weight=weight)}  # which the block compares with
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(PAGE), "exec"), namespace)
    assert torch.equal(namespace["tensor"], weight)
    for slot, values in run.state().slots.items():
        for param, value in enumerate(values):
            assert torch.equal(namespace["read_slot"](Path("checkpoint"), param, slot).to(value.dtype), value)


@pytest.mark.parametrize("num_shards", [1, 4])
def test_safetensors_reads_our_files(tmp_path: Path, num_shards: int) -> None:
    manifest = save(trained("Prodigy", num_shards), str(tmp_path))
    for piece in manifest.pieces:
        with safe_open(tmp_path / manifest.files[piece.file].name, framework="pt") as tensors:
            assert tensors.get_tensor(piece.key).shape == (piece.numel,)


def test_manifest_survives_its_bytes(tmp_path: Path) -> None:
    manifest = save(trained(), str(tmp_path))
    assert Manifest.unpack(manifest.pack(), "here") == manifest
    assert read_complete(str(tmp_path)) == manifest


# Resharding


@pytest.mark.parametrize("readers", [1, 2, 3, 5])
@pytest.mark.parametrize("writers", [1, 2, 3, 5])
@pytest.mark.parametrize("name", RULES)
def test_state_is_the_same_on_any_number_of_shards(tmp_path: Path, name: str, writers: int, readers: int) -> None:
    run = trained(name, writers)
    save(run, str(tmp_path))
    assert_same_state(restore(str(tmp_path), RULES[name], readers).state(), run.state())


@pytest.mark.parametrize("name", RULES)
def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path, name: str) -> None:
    run = trained(name, 3)
    save(run, str(tmp_path))
    expected = run.steps(30, schedule=constant).state()
    for num_shards in (1, 5):
        resumed = restore(str(tmp_path), RULES[name], num_shards).steps(30, schedule=constant)
        assert_same_state(resumed.state(), expected)


def test_skipped_steps_are_counted_on_after_a_restore(tmp_path: Path) -> None:
    run = trained("Prodigy", 2)
    gradients = run.gradients(10)
    gradients[0][0, 0] = torch.nan
    run.step(gradients=gradients)
    save(run, str(tmp_path))
    resumed = restore(str(tmp_path), RULES["Prodigy"], 3)
    assert resumed.state().counters == (11, 11, 1)
    assert resumed.state().step_counts[0] == 10


def test_checkpoint_lies_on_any_file_system(memory: str) -> None:
    run = trained()
    save(run, memory)
    restored = restore(memory, RULES["Prodigy"], 2)
    assert_same_state(restored.state(), run.state())
    save(restored, memory)
    assert len(fsspec.filesystem("memory").ls(memory, detail=False)) == 2 + 1
    assert_same_state(restore(memory, RULES["Prodigy"], 1).state(), run.state())


def test_reader_reads_across_pieces(tmp_path: Path) -> None:
    run = trained("AdamW", 5)
    manifest = save(run, str(tmp_path))
    whole = run.state().params[5]
    assert len([piece for piece in manifest.pieces if (piece.param, piece.slot) == (5, MASTER.name)]) > 1
    with CheckpointReader(str(tmp_path), manifest) as reader:
        for offset, numel in ((0, 990), (0, 1), (989, 1), (255, 2), (100, 800), (512, 0)):
            read = torch.empty(numel)
            reader.read(5, MASTER.name, offset, read)
            assert torch.equal(read, whole[offset : offset + numel])
        with pytest.raises(CheckpointError, match="elements 990 to 991"):
            reader.read(5, MASTER.name, 980, torch.empty(11))


# Saves that are cut short, and saves over an older checkpoint


def test_save_over_a_checkpoint_replaces_it_and_its_files(tmp_path: Path) -> None:
    run = trained(num_shards=5)
    save(run, str(tmp_path))
    kept = tmp_path / "model.safetensors"
    kept.write_bytes(b"somebody else's")
    second = restore(str(tmp_path), RULES["Prodigy"], 2).steps(15, schedule=constant)
    manifest = save(second, str(tmp_path))
    names = {file.name for file in manifest.files}
    assert {path.name for path in tmp_path.iterdir()} == {MANIFEST_NAME, kept.name, *names}
    assert len(names) == 2
    assert_same_state(restore(str(tmp_path), RULES["Prodigy"], 3).state(), second.state())


@pytest.mark.parametrize("num_written", [1, 2])
def test_save_that_is_cut_short_leaves_the_checkpoint_before_it(tmp_path: Path, num_written: int) -> None:
    run = trained(num_shards=2)
    save(run, str(tmp_path))
    expected = run.state()
    run.steps(20, schedule=constant)
    for index, shard in enumerate(run.group.shards[:num_written]):
        write_shard(shard.snapshot(), str(tmp_path), shard_file_name("cut-short", index, 2))
    assert_same_state(restore(str(tmp_path), RULES["Prodigy"], 3).state(), expected)


def test_save_whose_manifest_cannot_be_written_leaves_the_checkpoint_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(num_shards=2)
    save(run, str(tmp_path))
    expected = run.state()
    manifest = write_tensors(run.steps(20, schedule=constant), str(tmp_path))

    def full_disk(self: object, *paths: str, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(fsspec.get_filesystem_class("file"), "mv", full_disk)
        with pytest.raises(CheckpointError, match="No space left"):
            write_manifest(str(tmp_path), manifest)
        with pytest.raises(CheckpointError, match="No space left"):
            write_shard(run.group.shards[0].snapshot(), str(tmp_path), "another.safetensors")
    assert_same_state(restore(str(tmp_path), RULES["Prodigy"], 3).state(), expected)


def test_first_save_that_is_cut_short_is_no_checkpoint(tmp_path: Path) -> None:
    write_tensors(trained(), str(tmp_path))
    with pytest.raises(CheckpointError, match="no complete checkpoint here"):
        read_complete(str(tmp_path))


# Damage


def test_place_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    for uri in (str(tmp_path), str(tmp_path / "nowhere"), f"memory://{uuid.uuid4().hex}"):
        with pytest.raises(CheckpointError, match=r"manifest\.msgpack is missing"):
            read_complete(uri)
    with pytest.raises(CheckpointError, match="expected a path or an fsspec URI"):
        read_complete("nosuch://bucket/checkpoint")


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_shard_file_that_was_cut_short_is_an_error(tmp_path: Path, kept: float) -> None:
    manifest = save(trained(), str(tmp_path))
    victim = tmp_path / manifest.files[1].name
    data = victim.read_bytes()
    victim.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(CheckpointError, match=rf"{victim.name} was cut short: expected {len(data)} bytes"):
        read_complete(str(tmp_path))


def test_shard_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    manifest = save(trained(), str(tmp_path))
    (tmp_path / manifest.files[2].name).unlink()
    with pytest.raises(CheckpointError, match=rf"{manifest.files[2].name} is missing"):
        read_complete(str(tmp_path))


def test_shard_file_that_is_overwritten_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    """Of the same size, so that only its content shows it."""
    manifest = save(trained(), str(tmp_path))
    victim = tmp_path / manifest.files[0].name
    victim.write_bytes(b"\xff" * manifest.files[0].size_bytes)
    with pytest.raises(CheckpointError, match="is damaged"):
        restore(str(tmp_path), RULES["Prodigy"], 2)


def test_tensor_that_is_missing_from_its_file_is_an_error(tmp_path: Path) -> None:
    manifest = save(trained(), str(tmp_path))
    victim = tmp_path / manifest.files[0].name
    data = victim.read_bytes()
    length = manifest.header_bytes(0)
    header = data[:length].replace(b'"0/s/0"', b'"9/s/0"')
    victim.write_bytes(header + data[length:])
    other = FileEntry(victim.name, len(data), xxhash.xxh3_64_intdigest(header))
    write_manifest(str(tmp_path), dataclasses.replace(manifest, files=(other, *manifest.files[1:])))
    with pytest.raises(CheckpointError, match=r"0/s/0: expected .* got None"):
        restore(str(tmp_path), RULES["Prodigy"], 2)


@functools.cache
def packed_manifest() -> bytes:
    """Of a small job; nothing lies behind it."""
    packed = write_tensors(trained("Prodigy", 2, 2), "memory://packed").pack()
    fsspec.filesystem("memory").rm("/packed", recursive=True)
    return packed


def fields_of(packed: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = msgpack.unpackb(packed[:-8])
    return fields


def sealed(fields: object) -> bytes:
    """A manifest's bytes with a digest that fits, whatever the fields are."""
    packed: bytes = msgpack.packb(fields)
    return packed + xxhash.xxh3_64_intdigest(packed).to_bytes(8, "little")


@given(st.data())
def test_truncated_manifest_is_an_error(data: st.DataObject) -> None:
    packed = packed_manifest()
    length = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(CheckpointError, match="the manifest is damaged"):
        Manifest.unpack(packed[:length], "here")


def test_manifest_with_a_flipped_bit_is_an_error() -> None:
    """Any bit of it, at any place."""
    packed = packed_manifest()
    for position in range(len(packed)):
        flipped = bytearray(packed)
        flipped[position] ^= 1 << position % 8
        with pytest.raises(CheckpointError, match="the manifest is damaged"):
            Manifest.unpack(bytes(flipped), "here")


@settings(max_examples=300)
@given(st.data())
def test_manifest_with_changed_bytes_and_a_fitting_digest_is_an_error_or_a_manifest(data: st.DataObject) -> None:
    packed = bytearray(packed_manifest()[:-8])
    for _ in range(data.draw(st.integers(1, 3))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        Manifest.unpack(bytes(packed) + xxhash.xxh3_64_intdigest(packed).to_bytes(8, "little"), "here")
    except CheckpointError:
        return


@given(st.binary(max_size=200))
def test_bytes_that_are_no_manifest_are_an_error(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        Manifest.unpack(data, "here")


def test_manifest_without_a_field_is_an_error() -> None:
    fields = fields_of(packed_manifest())
    assert len(fields) == 12
    for key in fields:
        with pytest.raises(CheckpointError, match=key):
            Manifest.unpack(sealed({name: value for name, value in fields.items() if name != key}), "here")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("format", "tar", "format is 'tar'"),
        ("version", 3, "format version 2, .*, got version 3; read it with a newer"),
        ("version", 1, "format version 2, .*, got version 1; restore it with the Stepwell that wrote it"),
        ("version", "two", "got version two"),
        ("version", None, "got version None"),
        ("sequence", -1, "damaged"),
        ("sequence", 2**63 - 1, "damaged"),
        ("step", "5", "damaged"),
        ("scalars", {"d": "large"}, "damaged"),
        ("scalars", {"d": float("nan")}, "damaged"),
        ("scalars", {"momentum": 0.9}, "momentum"),
        ("step_counts", [1.5], "damaged"),
        ("files", [["../elsewhere", 5, 0]], "no name of a file beside it"),
        ("files", [["/etc/passwd", 5, 0]], "no name of a file beside it"),
        ("files", [["..", 5, 0]], "no name of a file beside it"),
        ("files", [["a\0b", 5, 0]], "no name of a file beside it"),
        ("files", [["a", 5, 0], ["a", 5, 0]], "names a file twice"),
        ("files", [["a", 5, -1]], "no digest"),
        ("files", [["a", True, 0]], "no count"),
        ("files", [], "is no piece"),
        ("saved_at", "today", "damaged"),
    ],
)
def test_manifest_with_a_field_that_cannot_be_is_an_error(key: str, value: object, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        Manifest.unpack(sealed({**fields_of(packed_manifest()), key: value}), "here")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_groups", 2**62),
        ("world_size", 2**62),
        ("params", [["a", [2**62], "float32", 0, True]]),
        ("params", [["a", [2**32, 2**32], "float32", 0, True]]),
        ("params", [["a", [2**32, 2**32, 0], "float32", 0, True]]),
        ("params", [["a", [2**62] * 200_000, "float32", 0, True]]),
        ("params", [["a", [1.5], "float32", 0, True]]),
        ("rule_fields", {"slice_p": 0}),
        ("rule_fields", {"slice_p": 2**62}),
        ("rule_fields", {"betas": []}),
        ("rule_fields", {"lr": [1, 2]}),
        ("rule_fields", {"d_scope": "group"}),
        ("batches", [0] * 70_000),
        ("batches", [2**62]),
        ("batches", [-1]),
    ],
)
def test_manifest_whose_job_is_monstrous_is_an_error_at_once(key: str, value: object) -> None:
    fields = fields_of(packed_manifest())
    fields["job"][key] = value
    with pytest.raises(CheckpointError, match="the manifest is damaged"):
        Manifest.unpack(sealed(fields), "here")


@pytest.mark.parametrize("size_bytes", [0, 4096, 2**61])
def test_pieces_that_do_not_fit_into_their_file_are_an_error(size_bytes: int) -> None:
    fields = fields_of(packed_manifest())
    fields["files"][1][1] = size_bytes
    with pytest.raises(CheckpointError, match=r"leave -?[0-9]+ bytes to its header"):
        Manifest.unpack(sealed(fields), "here")


def test_manifest_of_the_version_before_digests_is_named() -> None:
    fields = {**fields_of(packed_manifest()), "version": 1}
    with pytest.raises(CheckpointError, match=r"format version 2, the only one .* got version 1"):
        Manifest.unpack(msgpack.packb(fields), "here")


def test_key_that_a_later_writer_adds_is_ignored() -> None:
    fields = fields_of(packed_manifest())
    added = Manifest.unpack(sealed({**fields, "weather": "fine"}), "here")
    assert added == Manifest.unpack(packed_manifest(), "here")


def test_manifest_that_is_nested_without_end_is_an_error() -> None:
    deep = b"\x91" * 100_000
    with pytest.raises(CheckpointError, match="the manifest is damaged"):
        Manifest.unpack(deep + xxhash.xxh3_64_intdigest(deep).to_bytes(8, "little"), "here")


DAMAGES: dict[str, Callable[[Manifest], dict[str, Any]]] = {
    "a piece less": lambda manifest: {"pieces": manifest.pieces[1:]},
    "a piece twice": lambda manifest: {"pieces": (*manifest.pieces, manifest.pieces[0])},
    "a slot too many": lambda manifest: {
        "pieces": (*manifest.pieces, dataclasses.replace(manifest.pieces[0], slot="momentum"))
    },
    "a count less": lambda manifest: {"step_counts": manifest.step_counts[1:]},
}


@pytest.mark.parametrize("name", DAMAGES)
def test_manifest_that_does_not_cover_the_job_is_an_error(tmp_path: Path, name: str) -> None:
    manifest = save(trained(), str(tmp_path))
    write_manifest(str(tmp_path), dataclasses.replace(manifest, **DAMAGES[name](manifest)))
    with pytest.raises(CheckpointError, match="the manifest is damaged"):
        read_complete(str(tmp_path))


@pytest.mark.parametrize("excess", [0, 1])
def test_manifest_is_never_larger_than_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, excess: int
) -> None:
    manifest = write_tensors(trained(), str(tmp_path))
    monkeypatch.setattr("stepwell.sharding.folder.MAX_MANIFEST_BYTES", len(manifest.pack()) - excess)
    if excess:
        with pytest.raises(CheckpointError, match=r"the manifest of .* pieces would have .* fewer shards"):
            write_manifest(str(tmp_path), manifest)
        (tmp_path / MANIFEST_NAME).write_bytes(manifest.pack())
        with pytest.raises(CheckpointError, match=r"the manifest is damaged .*has more than"):
            read_complete(str(tmp_path))
    else:
        write_manifest(str(tmp_path), manifest)
        assert read_complete(str(tmp_path)) == manifest


# Other models


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    run = trained()
    manifest = save(run, str(tmp_path))
    uri = str(tmp_path)
    spec = run.group.spec
    others = {
        "rule: the service has AdamW": dataclasses.replace(spec, rule=AdamWRule()),
        "slice_p": dataclasses.replace(spec, rule=ProdigyRule()),
        "parameter 0": dataclasses.replace(spec, params=spec.params[::-1]),
        "number of parameters": dataclasses.replace(spec, params=spec.params[:-1]),
    }
    for match, other in others.items():
        with pytest.raises(JobMismatchError, match=f"checkpoint {uri} does not match.*{match}"):
            check_restorable(manifest, other, uri)


def test_checkpoint_of_another_number_of_workers_or_other_hyperparameters_is_taken(tmp_path: Path) -> None:
    run = trained()
    manifest = save(run, str(tmp_path))
    other = dataclasses.replace(run.group.spec, world_size=16, chunk_numel=4096, rule=ProdigyRule(lr=0.5, slice_p=11))
    check_restorable(manifest, other, str(tmp_path))


def test_restore_that_fails_leaves_a_lost_shard_that_another_restore_brings_back(tmp_path: Path) -> None:
    run = trained()
    good, bad = str(tmp_path / "good"), str(tmp_path / "bad")
    save(run, good)
    expected = run.state()
    manifest = save(run, bad)
    (tmp_path / "bad" / manifest.files[0].name).write_bytes(b"\xff" * manifest.files[0].size_bytes)
    with CheckpointReader(bad, manifest) as reader, pytest.raises(CheckpointError):
        run.group.load(reader.source(), timeline=2)
    with pytest.raises(NotRegisteredError, match="interrupted while it loaded"):
        run.group.shards[0].require_whole()
    with CheckpointReader(good, read_complete(good)) as reader:
        run.group.load(reader.source(), timeline=3)
    assert_same_state(run.state(), expected)
