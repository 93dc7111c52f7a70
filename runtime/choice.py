"""Which kernels a device has: chosen once, when a model is loaded."""

from __future__ import annotations

import warnings

import torch

from .fused import CudaInt4, fused_or_plain
from .kernels import Kernels, PackedKernels, check_compiler


def kernels_for(device: torch.device, *, exact: bool = False) -> Kernels:
    """The quickest of a device; ``exact``: those whose results are bit for bit the ordinary model's, with the same
    decoded weights."""
    if exact or device.type not in ("cpu", "cuda"):
        return Kernels(device)
    if device.type == "cuda":
        return fused_or_plain(device, CudaInt4())
    try:
        check_compiler()
    except (RuntimeError, OSError) as error:
        warnings.warn(
            f"No kernels can be compiled here ({error}): experts are decoded for each product, which is slow.",
            RuntimeWarning,
            stacklevel=2,
        )
        return Kernels(device)
    return PackedKernels()
