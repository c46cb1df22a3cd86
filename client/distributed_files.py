"""Folders of torch.distributed.checkpoint, written by torch and read without running what a pickle says.

Such a folder has its metadata in a pickle, which torch loads as it is. Here a pickle may name the few classes that
metadata are made of and nothing else, and tensors and values come through ``weights_only`` loads.
"""

from __future__ import annotations

import io
import pathlib
import pickle
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from ..sharding.errors import CheckpointError
from ..sharding.manifest import shorten

dcp: Any = torch.distributed.checkpoint  # which exports its names for no type checker

_CLASSES = {
    **{("torch.distributed.checkpoint.metadata", name): getattr(metadata, name) for name in metadata.__all__},
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): metadata._MEM_FORMAT_ENCODING,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch", "Size"): torch.Size,
    **{("pathlib", name): pathlib.PurePosixPath for name in ("Path", "PosixPath", "PurePosixPath")},
}


_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
)
"""What reading a folder that is not as it should be may raise."""


def write_folder(path: str, state_dict: Mapping[str, Any]) -> None:
    """Write a state dict, in this process alone.

    Raises:
        CheckpointError: If it cannot be written.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")  # one process is what we want
            dcp.save(dict(state_dict), checkpoint_id=path, no_dist=True)
    except (OSError, CheckpointException) as error:
        raise CheckpointError(f"{path}: cannot be written ({shorten(str(error))})") from error


def read_folder(path: str) -> dict[str, Any]:
    """Read a whole state dict, nested as it was; keys that were numbers have become texts.

    Raises:
        CheckpointError: If it is no such folder, damaged, or names anything in a pickle but what it should.
    """
    reader = _Reader(path)
    try:
        held = reader.read_metadata()
        flat: dict[str, Any] = {name: _room_for(item) for name, item in held.state_dict_metadata.items()}
        planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
        dcp.load(flat, storage_reader=reader, planner=planner, no_dist=True)
        nested: dict[str, Any] = {}
        for name, value in flat.items():
            set_element(nested, (held.planner_data or {}).get(name, (name,)), value)
    except CheckpointException as error:
        raise _damaged(path, next(iter(error.failures.values()))[0]) from None
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    return nested


def _room_for(item: object) -> object:
    """What a value is read into; a tensor's memory is made, other values are put in."""
    return torch.empty(item.size, dtype=item.properties.dtype) if isinstance(item, TensorStorageMetadata) else item


def what_is_wrong(error: BaseException) -> str:
    """Why a file of torch's was not read, in short; torch's own advice is to trust it."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds other objects"
    return shorten(f"{type(error).__name__}: {error}".splitlines()[0])


def _damaged(path: str, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{path}: expected a folder of torch.distributed.checkpoint with tensors and numbers alone "
        f"({what_is_wrong(error)})"
    )


class _Unpickler(pickle.Unpickler):
    """Finds the classes of metadata, and torch's dtypes, and nothing else."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """See :class:`pickle.Unpickler`."""
        found = _CLASSES.get((module_name, global_name))
        if found is None and module_name == "torch":
            dtype = getattr(torch, global_name, None)
            found = dtype if isinstance(dtype, torch.dtype) else None
        if found is None:
            raise ValueError(f"its metadata name {module_name}.{global_name}")
        return found


class _Reader(filesystem.FileSystemReader):
    """Reads metadata without torch's trust in them."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """See torch's."""
        with open(pathlib.Path(self.path) / ".metadata", "rb") as stream:
            found = _Unpickler(stream).load()
        if not isinstance(found, Metadata):
            raise ValueError(f"its metadata are a {type(found).__name__}")
        for place in found.storage_data.values():
            if re.fullmatch(r"[A-Za-z0-9_.-]+", place.relative_path) is None:
                raise ValueError(f"its metadata name the file {place.relative_path!r}")
        return found


class _Planner(DefaultLoadPlanner):
    """Loads values that are no tensors as numbers, texts and containers of these."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """See torch's."""
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)
