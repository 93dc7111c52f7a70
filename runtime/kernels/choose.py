"""Choice of the kernels for a device, when a model is loaded."""

from __future__ import annotations

import functools
import warnings

import torch

from moetier.runtime.kernels.jit.executable import can_become_executable
from moetier.runtime.kernels.jit.processor import refusal
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.kernels.products.packed import PackedKernels

from .cuda_int4 import CudaInt4, fused_or_plain

PROTECTED = "memory that was written can't be made executable here"
WITHOUT_ONEDNN = "torch computes without oneDNN, which is slow for prompts where the trunk has 16 bits"


def kernels_for(device: torch.device, *, exact: bool = False) -> Kernels:
    """Return the fastest kernels of a device. With ``exact``, return kernels with the same bits as the eager model.

    Warns once in a process if faster kernels can't be used.
    """
    protected = without_onednn()
    if not exact and device.type == "cpu" and (why := refusal()):
        also = f"; {WITHOUT_ONEDNN}" if protected else ""
        _warn(f"No kernels can be compiled here ({why}): experts are decoded for each product, which is slow{also}.")
        return Kernels(device)
    if protected:
        _warn(f"As {PROTECTED}, {WITHOUT_ONEDNN}.")
    if exact or device.type not in ("cpu", "cuda"):
        return Kernels(device)
    return fused_or_plain(device, CudaInt4()) if device.type == "cuda" else PackedKernels()


def without_onednn() -> bool:
    """Turn oneDNN off in torch if memory that was written can't be made executable; return whether it was turned off.

    oneDNN compiles code of its own. If that code can't be executed, it raises "could not create a primitive".
    """
    if can_become_executable():
        return False
    torch.backends.mkldnn.set_flags(False)  # type: ignore[no-untyped-call]
    return True


@functools.cache
def _warn(text: str) -> None:
    """Warn with ``text``, once in a process."""
    warnings.warn(text, RuntimeWarning, stacklevel=3)
