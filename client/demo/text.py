"""The corpus: the source text of Python's standard library, which every machine with Python has."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

from .settings import DemoError

TRAIN_BYTES = 4_000_000
HELD_OUT_BYTES = 200_000
# Tests, tables and what was installed later: not text that is worth learning from.
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)


@dataclasses.dataclass(frozen=True, slots=True)
class Corpus:
    """Training and held-out text, of different files.

    Attributes:
        train: (train_bytes,) uint8
        held_out: (held_out_bytes,) uint8
    """

    train: torch.Tensor
    held_out: torch.Tensor


def read_corpus(root: Path | None = None) -> Corpus:
    """Reads the same text on every rank and in every run on one machine.

    The files are taken in the order of a digest of their names, so that the first few megabytes are
    drawn from the whole library; the first files are held out.

    Args:
        root: a folder of `.py` files; the standard library's if None.

    Raises:
        DemoError: the folder holds too little source text.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    held_out, train = bytearray(), bytearray()
    for path in sorted(_source_files(root), key=lambda path: _name_digest(path, root)):
        part, limit = (held_out, HELD_OUT_BYTES) if len(held_out) < HELD_OUT_BYTES else (train, TRAIN_BYTES)
        part += path.read_bytes()[: limit - len(part)]
        if len(train) >= TRAIN_BYTES:
            break
    if len(train) < HELD_OUT_BYTES:
        raise DemoError(
            f"the demo needs {2 * HELD_OUT_BYTES:,} bytes of Python source in {root}, found "
            f"{len(held_out) + len(train):,}: run it with a Python that has its standard library as .py files"
        )
    return Corpus(
        train=torch.frombuffer(train, dtype=torch.uint8), held_out=torch.frombuffer(held_out, dtype=torch.uint8)
    )


def train_batch(
    corpus: Corpus, *, seed: int, step: int, batch_size: int, context_numel: int, rank: int, world_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One rank's slice of a step's global batch, which (seed, step) alone fix.

    Args:
        corpus: what is drawn from.
        seed: the run's seed.
        step: steps applied before this one.
        batch_size: sequences in the global batch, a multiple of `world_size`.
        context_numel: bytes in a sequence.
        rank: which slice.
        world_size: into how many slices the batch is cut.

    Returns:
        Inputs and targets, each (batch_size / world_size, context_numel) int64.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    offsets = torch.randint(corpus.train.numel() - context_numel, (batch_size,), generator=generator)
    local = batch_size // world_size
    return _sequences(corpus.train, offsets[rank * local : (rank + 1) * local], context_numel)


def held_out_batches(
    corpus: Corpus, *, batch_size: int, context_numel: int, num_batches: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets, (batch_size, context_numel) int64, evenly spaced over the held-out text."""
    numel = corpus.held_out.numel() - context_numel - 1
    offsets = torch.linspace(0, numel, batch_size * num_batches, dtype=torch.float64).long()
    for batch_offsets in offsets.view(num_batches, batch_size):
        yield _sequences(corpus.held_out, batch_offsets, context_numel)


def _sequences(text: torch.Tensor, offsets: torch.Tensor, context_numel: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = text[offsets[:, None] + torch.arange(context_numel + 1)].long()
    return rows[:, :-1], rows[:, 1:]


def _source_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _name_digest(path: Path, root: Path) -> str:
    return hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest()
