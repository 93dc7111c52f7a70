"""The host's processor, which computes with the records in the host tier's slots."""

from __future__ import annotations

import torch

from moetier.runtime.device_names import HOST
from moetier.runtime.kernels.jit.processor import refusal
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.kernels.products.packed import PackedKernels

from .device import ComputeDevice, warn_once


class Cpu(ComputeDevice):
    """The processor. ``moetier doctor`` checks it in any case, so there is no diagnosis here."""

    title = "processor"

    def __init__(self, device: torch.device | str = HOST) -> None:
        super().__init__(device)

    @classmethod
    def is_available(cls) -> bool:
        """Return True."""
        return True

    def fast_kernels(self) -> Kernels:
        """Return kernels compiled for this processor, or kernels of torch if none can be compiled."""
        if why := refusal():
            warn_once(f"No kernels can be compiled here ({why}): experts are decoded for each product, which is slow.")
            return Kernels(self.torch_device)
        return PackedKernels()
