"""NVIDIA's GPUs. No other module asks for CUDA, besides the kernels and the streams that this one chooses."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from moetier.runtime.config import format_bytes
from moetier.runtime.kernels.cuda_int4 import CudaInt4, fused_or_plain
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.machine.memory import Available
from moetier.tiers.device.stream import CudaDevice

from .device import ComputeDevice, Diagnosis

DRIVER = Path("/proc/driver/nvidia/version")


class Cuda(ComputeDevice):
    """A GPU. Its tier copies records into slots in the GPU's memory."""

    title = "CUDA device"
    has_memory = True

    @classmethod
    def is_available(cls) -> bool:
        """Return whether torch was built for CUDA and finds a GPU."""
        return torch.cuda.is_available()

    @classmethod
    def diagnose(cls) -> Iterator[Diagnosis]:
        """Yield a line on each GPU, with its memory and kernels; or one that says why torch can't use the driver."""
        if not cls.is_available():
            if DRIVER.exists():
                yield Diagnosis(
                    f"There is an NVIDIA driver, but torch {torch.__version__} can't use it.",
                    "Install torch for a version of CUDA that the driver supports (nvidia-smi shows it).",
                )
            return
        for number in range(torch.cuda.device_count()):
            device = cls(f"cuda:{number}")
            free, total = torch.cuda.mem_get_info(device.torch_device)
            name = torch.cuda.get_device_name(device.torch_device)
            text = f"{device.torch_device} {name}, {format_bytes(free)} free of {format_bytes(total)}"
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                kernels = device.kernels()
            if type(kernels) is Kernels:
                why = " ".join(str(warning.message) for warning in said)
                yield Diagnosis(f"{text}. {why}", "Use a GPU of compute capability 8.0 or above, or --device cpu.")
            else:
                yield Diagnosis(f"{text}; 4-bit products by torch's own kernel")

    def fast_kernels(self) -> Kernels:
        """Return kernels with torch's int4 product, or kernels that decode experts if that product does not work."""
        return fused_or_plain(self.torch_device, CudaInt4())

    def free_memory(self) -> Available:
        """Return the memory of the GPU that is free."""
        return Available(torch.cuda.mem_get_info(self.torch_device)[0], str(self.torch_device))

    def streams(self) -> CudaDevice:
        """Return streams of the GPU. Pages are locked by CUDA."""
        return CudaDevice(self.torch_device)
