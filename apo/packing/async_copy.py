"""Copies between host and accelerator that do not block.

A plain `.to(device)` waits until the device has finished all earlier work. A copy from pinned memory does not.
"""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; a copy from the host to a CUDA device does not block."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A copy of a tensor to the host, under way: `value` waits for it, and for no later work of the CUDA device."""

    def __init__(self, tensor: torch.Tensor) -> None:
        cuda = tensor.device.type == "cuda"
        self._copy = tensor.to("cpu", non_blocking=cuda)
        self._event = torch.cuda.current_stream(tensor.device).record_event() if cuda else None

    def value(self) -> torch.Tensor:
        """The tensor on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy
