"""A reader written from docs/checkpoint.md alone, which imports nothing of Stepwell: what the page says suffices."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import xxhash
from numpy.typing import NDArray

KEYS = {
    "format", "version", "job", "sequence", "step", "skipped_steps", "scalars", "step_counts", "kernel_identity",
    "saved_at", "files", "pieces",
}  # fmt: skip
JOB_KEYS = {
    "rule", "rule_fields", "params", "num_groups", "world_size", "chunk_numel", "gradients", "batches", "kernel",
}  # fmt: skip
WIDTHS = {"F64": 8, "F32": 4, "BF16": 2}


@dataclasses.dataclass(frozen=True)
class PageCheckpoint:
    """A checkpoint as the page describes it.

    Attributes:
        manifest: The manifest's map.
        slots: (parameter index, slot) to the flattened slot; bfloat16 widened to float32.
    """

    manifest: dict[str, Any]
    slots: dict[tuple[int, str], NDArray[Any]]


def read_checkpoint(folder: Path) -> PageCheckpoint:
    """Read all of a checkpoint, and see that every MUST of the page holds."""
    manifest = read_manifest(folder / "manifest.msgpack")
    in_file: list[dict[str, Any]] = [{} for _ in manifest["files"]]
    for param, slot, offset, numel, file, digest in manifest["pieces"]:
        assert numel > 0
        in_file[file][f"{param}/{slot}/{offset}"] = (dtype_of(manifest["job"], param, slot), numel, digest)
    tensors: dict[str, NDArray[Any]] = {}
    for (name, size_bytes, header_digest), expected in zip(manifest["files"], in_file, strict=True):
        assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}", name)
        data = (folder / name).read_bytes()
        assert len(data) == size_bytes
        tensors |= read_tensors(data, expected, header_digest)
    slots: dict[tuple[int, str], list[tuple[int, NDArray[Any]]]] = {}
    for param, slot, offset, *_ in manifest["pieces"]:
        slots.setdefault((param, slot), []).append((offset, tensors[f"{param}/{slot}/{offset}"]))
    whole = {key: joined(pieces) for key, pieces in slots.items()}
    for param, (_, shape, *_rest) in enumerate(manifest["job"]["params"]):
        assert whole.get((param, "master_param"), np.zeros(0)).size == math.prod(shape)
    return PageCheckpoint(manifest, whole)


def read_manifest(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    (digest,) = struct.unpack("<Q", data[-8:])
    assert xxhash.xxh3_64_intdigest(data[:-8]) == digest
    manifest: dict[str, Any] = msgpack.unpackb(data[:-8])
    assert (manifest["format"], manifest["version"]) == ("stepwell-checkpoint", 2)
    assert manifest.keys() == KEYS
    assert manifest["job"].keys() == JOB_KEYS
    return manifest


def dtype_of(job: dict[str, Any], param: int, slot: str) -> str:
    if slot in ("mu_product", "initial_norm"):
        return "F64"
    if slot in ("s", "p0") and job["rule_fields"].get("stat_dtype") == "bfloat16":
        return "BF16"
    return "F64" if job["params"][param][2] == "float64" else "F32"


def read_tensors(data: bytes, expected: dict[str, Any], header_digest: int) -> dict[str, NDArray[Any]]:
    """A file's tensors, of which ``expected`` says dtype, numel and digest."""
    (length,) = struct.unpack("<Q", data[:8])
    begin = 8 + length
    assert begin == len(data) - sum(WIDTHS[dtype] * numel for dtype, numel, _ in expected.values())
    assert begin <= 8192 + 1024 * len(expected)
    assert xxhash.xxh3_64_intdigest(data[:begin]) == header_digest
    header, reached, tensors = json.loads(data[8:begin]), begin, {}
    assert header.keys() == expected.keys()
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, numel, digest = expected[name]
        assert (entry["dtype"], entry["shape"]) == (dtype, [numel])
        first, last = entry["data_offsets"]
        assert (begin + first, last - first) == (reached, numel * WIDTHS[dtype])
        reached = begin + last
        held = data[begin + first : reached]
        assert xxhash.xxh3_64_intdigest(held) == digest
        tensors[name] = elements(held, dtype)
    assert reached == len(data)
    return tensors


def elements(held: bytes, dtype: str) -> NDArray[Any]:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(held, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(held, {"F64": "<f8", "F32": "<f4"}[dtype])


def joined(pieces: list[tuple[int, NDArray[Any]]]) -> NDArray[Any]:
    """A slot of its pieces, which cover it without gap or overlap."""
    reached = 0
    for offset, values in sorted(pieces, key=lambda piece: piece[0]):
        assert offset == reached
        reached += values.size
    return np.concatenate([values for _, values in sorted(pieces, key=lambda piece: piece[0])])
