"""Parameters that are views of a flat buffer: what a step brings is in the model as soon as it is in the buffer."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .flat import FlatBuffer, Place
from .holdings import is_distributed


class ParameterViews:
    """Moves a model's parameters into a buffer that holds them whole, each into a storage of its own there.

    Those that cannot be moved, or not without parting them from something that shares their memory, stay where they
    are: on another device, of another dtype than the buffer, not contiguous, tied to another tensor, in memory that
    processes share, DTensors. A parameter whose memory is replaced afterwards (``.to()``, ``.data = ...``) is let go.

    Memory that a parameter had in the buffer may be written by every further step, whoever else refers to it by then.

    Args:
        buffer: The buffer.
        params: The model's parameters, in index order.
    """

    def __init__(self, buffer: FlatBuffer, params: Sequence[Tensor]) -> None:
        self._in_place: dict[int, Tensor] = {}
        for place in buffer.places:
            param = params[place.param]
            if not _is_movable(param, place):
                continue
            # Of a view that went through DLPack the storage is what the view shows, and no more.
            view = from_dlpack(place.view.view(param.shape))
            with torch.no_grad():
                view.copy_(param)
            param.data = view
            self._in_place[place.param] = param
        self._addresses = self._addresses_now()

    @property
    def indices(self) -> Collection[int]:
        """Of the parameters that are in place."""
        return self._in_place.keys()

    def let_go(self) -> list[int]:
        """Forget those whose memory has been replaced; their indices."""
        addresses = self._addresses_now()
        if addresses == self._addresses:
            return []
        pairs = zip(self._in_place, addresses, self._addresses, strict=True)
        gone = [index for index, now, then in pairs if now != then]
        for index in gone:
            del self._in_place[index]
        self._addresses = self._addresses_now()
        return gone

    def mark_written(self) -> None:
        """Count the parameters in place as changed, so that no backward goes on with values that it did not save."""
        torch.autograd.graph.increment_version(self._in_place.values())

    def release(self) -> None:
        """Give each parameter memory of its own again."""
        self.let_go()
        for param in self._in_place.values():
            param.data = param.data.clone()
        self._in_place, self._addresses = {}, []

    def _addresses_now(self) -> list[int]:
        return [param.data_ptr() for param in self._in_place.values()]


def _is_movable(param: Tensor, place: Place) -> bool:
    return (
        not is_distributed(param)
        and param.device == place.view.device
        and param.dtype == place.view.dtype
        and param.numel() == place.view.numel()
        and param.is_contiguous()
        and _has_memory_of_its_own(param)
    )


def _has_memory_of_its_own(param: Tensor) -> bool:
    """Whether nothing else refers to a tensor's storage: no other process, tensor or array."""
    storage, lone = param.untyped_storage(), torch.empty(1, device="cpu")
    is_shared = param.device.type == "cpu" and param.is_shared()  # type: ignore[no-untyped-call]
    return (
        not is_shared
        and storage.nbytes() == param.numel() * param.element_size()
        and _num_uses(storage) == _num_uses(lone.untyped_storage())
    )


def _num_uses(storage: torch.UntypedStorage) -> int:
    uses: int = torch._C._storage_Use_Count(storage._cdata)
    return uses
