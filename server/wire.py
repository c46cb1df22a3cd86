"""Tensors between workers and shards: flat numpy arrays, which Ray moves without a copy on one node."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..sharding.errors import DTypeMismatchError, MessageError, UnsupportedParameterError
from ..sharding.layout import dtype_from_name, dtype_name
from ..sharding.pieces import PieceValues

WireTensor = tuple[str, NDArray[Any]]
"""A dtype's name and the flat array; bfloat16, which numpy lacks, travels as int16."""

WireValues = Mapping[tuple[int, str, int], WireTensor]
"""Pieces of state as they travel, see :data:`stepwell.sharding.pieces.PieceValues`."""


def to_wire(tensor: Tensor) -> WireTensor:
    """A tensor as a flat array; on the CPU it shares memory."""
    flat = tensor.detach().reshape(-1).cpu()
    name = dtype_name(flat.dtype)
    return name, (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy()


def from_wire(wire: WireTensor) -> Tensor:
    """The tensor of a flat array; it shares the array's memory and must not be written.

    Raises:
        MessageError: If it is not a dtype's name and an array.
        DTypeMismatchError: If the array is not of the dtype that it is said to be.
    """
    if not isinstance(wire, tuple) or len(wire) != 2 or not isinstance(wire[0], str):
        raise MessageError(f"expected a dtype's name and a flat array, got {describe(wire)}")
    name, array = wire
    try:
        dtype = dtype_from_name(name)
    except UnsupportedParameterError as error:
        raise DTypeMismatchError(str(error)) from error
    carried = np.dtype(np.int16) if dtype == torch.bfloat16 else np.dtype(name)
    if not isinstance(array, np.ndarray) or array.dtype != carried or array.ndim != 1 or not array.flags.c_contiguous:
        raise DTypeMismatchError(f"expected a flat {carried} array for {name}, got {describe(array)}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(dtype) if dtype == torch.bfloat16 else tensor


def values_to_wire(values: PieceValues) -> WireValues:
    """Pieces of state, to be put into the object store."""
    return {key: to_wire(tensor) for key, tensor in values.items()}


def values_from_wire(values: WireValues) -> PieceValues:
    """The reverse of :func:`values_to_wire`; raises as :func:`from_wire`."""
    return {key: from_wire(wire) for key, wire in values.items()}


def describe(value: object) -> str:
    """Type and a short form of a value, which may be huge."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return f"{type(value).__name__} {reprlib.repr(value)}"
