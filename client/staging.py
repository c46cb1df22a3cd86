"""Between a GPU and the host memory in which a worker's buffers lie: asynchronous copies, and when they are done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Look = Callable[[Tensor], list[Tensor]]


class Staging:
    """Copies to host memory on a CUDA stream of its own, beside the backward pass that makes what is copied.

    Host memory is to be pinned, see ``sharding/pinning.py``: a copy to other memory is right too, but waited for.

    Args:
        device: Where the model lives.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, target: Tensor, source: Tensor, look: Look) -> list[Tensor]:
        """Begin to copy one gradient, rounded to the target's dtype; what a look at it leaves, on the device.

        Rounded on the device: torch would do that on the host, without waiting for the copy.
        """
        with self._beside([source]):
            rounded = source.to(target.dtype).contiguous()
            target.copy_(rounded, non_blocking=True)
            return look(rounded.view(-1))

    def copy_packed(
        self, memory: Tensor, targets: Sequence[Tensor], sources: Sequence[Tensor], look: Look
    ) -> list[Tensor]:
        """As :meth:`copy`, of many gradients at once: ``targets`` lie in ``memory``, with zeros in between."""
        starts = [target.storage_offset() - memory.storage_offset() for target in targets]
        with self._beside(sources):
            packed = torch.zeros(len(memory), dtype=memory.dtype, device=self._device)
            parts = zip(starts, sources, strict=True)
            torch._foreach_copy_(
                [packed[start : start + source.numel()].view(source.shape) for start, source in parts], list(sources)
            )
            memory.copy_(packed, non_blocking=True)
            return look(packed)

    def copy_back(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Copy parameters to the model; returns when that is done, as the shards write ``sources`` next."""
        if targets:
            torch._foreach_copy_(list(targets), list(sources), non_blocking=True)
            torch.cuda.current_stream(self._device).record_event().synchronize()

    def mark(self) -> Callable[[], None]:
        """What waits until all copies are done that have begun by now; for any thread."""
        wait: Callable[[], None] = self._stream.record_event().synchronize
        return wait

    @contextlib.contextmanager
    def _beside(self, sources: Sequence[Tensor]) -> Iterator[None]:
        """Within this block work goes to the stream, behind what made ``sources``."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        for source in sources:
            source.record_stream(self._stream)  # its memory may be given away before the copy is done


def staging_of(device: torch.device, parts: Sequence[Tensor]) -> Staging | None:
    """What copies between a model and its buffers; None if both are on one device."""
    return Staging(device) if device.type == "cuda" and any(part.device.type == "cpu" for part in parts) else None
