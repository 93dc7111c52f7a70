"""NVIDIA's GPUs. No other module names CUDA, except for the line of ``runtime.device_names``.

Torch for ROCm calls AMD's GPUs cuda, too, and would use these classes. That was never tried.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetier.runtime.config import format_bytes
from moetier.runtime.kernels.int4 import fused_or_plain
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.libraries.torch_internals import arrange_int4, multiply_int4
from moetier.runtime.machine.memory import Available
from moetier.tiers.device.stream import DeviceStream
from moetier.tiers.quant.packing import pair_columns

from .device import ComputeDevice, Diagnosis

DRIVER = Path("/proc/driver/nvidia/version")
_cuda: Any = torch.cuda  # typed as Any, because half of its functions have no types
_PORTABLE, _READ_ONLY = 0x01, 0x08  # flags of cudaHostRegister: pinned for all devices; read-only


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


class CudaInt4:
    """int4 product of CUDA devices from compute capability 8.0 on ("tinygemm"; ATen/native/cuda/int4mm.cu)."""

    def arrange(self, nibbles: Tensor, columns: int) -> Tensor:
        """Arrange codes uint8 [rows * columns / 2] in the order of tinygemm, which packs them as int32."""
        paired = pair_columns(nibbles, columns)
        return arrange_int4(paired, _inner_tiles(columns)).view(torch.uint8).view(-1)

    def multiply(self, x: Tensor, arranged: Tensor, group: int, pairs: Tensor) -> Tensor:
        """Multiply x bf16 [tokens, columns] -> bf16 [tokens, rows] with tinygemm."""
        tiles = _inner_tiles(x.shape[1])
        matrix = arranged.view(torch.int32).view(-1, x.shape[1] // (16 * tiles), 32, tiles // 2)
        return multiply_int4(x, matrix, group, pairs)


def _inner_tiles(columns: int) -> int:
    """Return how many tiles of 16 columns tinygemm stores side by side: the most that it supports for ``columns``."""
    return next(tiles for tiles in (8, 4, 2) if columns % (16 * tiles) == 0)


class CudaDevice:
    """A CUDA device, with a stream for copies of records and a stream for arranging copied records."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: DeviceStream = _cuda.Stream(device)
        self._arranging: DeviceStream = _cuda.Stream(device)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return an uninitialised tensor uint8 [nbytes] on the device.

        Raises torch.OutOfMemoryError if there is not enough memory.
        """
        with torch.inference_mode(False):  # a tensor made in inference mode can't be changed outside of that mode
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def current_stream(self) -> DeviceStream:
        """Return the calling thread's current stream in torch."""
        stream: DeviceStream = _cuda.current_stream(self._device)
        return stream

    def copy_stream(self) -> DeviceStream:
        """Return this object's stream for copies."""
        return self._copies

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy of uint8 [record bytes]. The copy is asynchronous only if ``source`` is page-locked."""
        with _cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def arranging_stream(self) -> DeviceStream:
        """Return this object's stream for arranging records."""
        return self._arranging

    def run(self, stream: DeviceStream, work: Callable[[], None]) -> None:
        """Call ``work`` with ``stream`` as torch's current stream."""
        with _cuda.stream(stream):
            work()

    def lock_pages(self, memory: torch.Tensor, *, read_only: bool) -> bool:
        """Register host memory, uint8 [nbytes], with CUDA. Return whether this succeeded."""
        flags = _PORTABLE | (_READ_ONLY if read_only else 0)
        if int(_cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, flags)) == 0:
            return True
        # CUDA keeps the error until it is read, and torch has no function for that. Run a kernel that raises the error
        # here, so that no later kernel does.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self._device).add_(1)
        return False

    def unlock_pages(self, memory: torch.Tensor) -> None:
        """Unregister host memory, uint8 [nbytes], that ``lock_pages`` has registered."""
        _cuda.cudart().cudaHostUnregister(memory.data_ptr())
