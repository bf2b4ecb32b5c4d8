"""Numbers on their way to an accelerator and back, without anybody waiting for it.

A plain `.to(device)` waits until the device has done all it was told before. From pinned memory it does not.
"""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; from the host to a CUDA device without waiting."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A tensor on its way to the host: `value` waits for it, and for nothing that a CUDA device was told afterwards."""

    def __init__(self, tensor: torch.Tensor) -> None:
        cuda = tensor.device.type == "cuda"
        self._here = tensor.to("cpu", non_blocking=cuda)
        self._done = torch.cuda.current_stream(tensor.device).record_event() if cuda else None

    def value(self) -> torch.Tensor:
        """The tensor on the host."""
        if self._done is not None:
            self._done.synchronize()
        return self._here
