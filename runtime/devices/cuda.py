"""NVIDIA's GPUs. No other module names CUDA, except for the line of ``runtime.device_names``.

Torch for ROCm calls AMD's GPUs cuda, too, and would use these classes. That was never tried.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetier.runtime.kernels.experts.expert_code import Activation
from moetier.runtime.kernels.int4 import fused_or_plain
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.kernels.slots import BlockKernels, Form, SlotKernels, slot_kernels
from moetier.runtime.libraries.torch_internals import arrange_int4, multiply_int4
from moetier.runtime.machine.memory import Available
from moetier.tiers.device.stream import DeviceStream
from moetier.tiers.layout import RecordLayout
from moetier.tiers.quant.codec import layout_for
from moetier.tiers.quant.packing import pair_columns
from moetier.tiers.text import format_bytes

from .device import Diagnosis, MemoryDevice

DRIVER = Path("/proc/driver/nvidia/version")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # of torch without CUDA
USUAL = Form(  # what is tried without a model: 4 bits, as moetier quantises
    layout_for({"gate_up_proj": ((256, 128), "bfloat16"), "down_proj": ((128, 128), "bfloat16")}, bits=4),
    Activation(),
    torch.bfloat16,
)
_cuda: Any = torch.cuda  # typed as Any, because half of its functions have no types


class Cuda(MemoryDevice):
    """A GPU. Its tier copies records into slots in the GPU's memory."""

    title = "CUDA device"

    @classmethod
    def is_available(cls) -> bool:
        """Return whether torch was built for CUDA and finds a GPU."""
        return torch.cuda.is_available()

    @classmethod
    def diagnose(cls) -> Iterator[Diagnosis]:
        """Yield a line on each GPU, with its memory and kernels; or one that says why torch can't use any."""
        if not cls.is_available():
            if DRIVER.exists():
                yield Diagnosis(
                    f"There is an NVIDIA driver, but torch {torch.__version__} can't use it.",
                    "Install torch for a version of CUDA that the driver supports (nvidia-smi shows it).",
                )
            elif torch.version.cuda is not None:
                yield Diagnosis(
                    "none that torch can use: everything is computed on the CPU. "
                    f"torch is a build for CUDA {torch.version.cuda}; the one of {CPU_INDEX} takes 4 GB less"
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
                together = device.slot_kernels(kernels, [USUAL]) is not None
            if type(kernels) is Kernels:
                why = " ".join(str(warning.message) for warning in said)
                yield Diagnosis(f"{text}. {why}", "Use a GPU of compute capability 8.0 or above, or --device cpu.")
            else:
                way = "all of a block together, by Triton's kernels" if together else "one by one"
                yield Diagnosis(f"{text}; 4-bit products by torch's own kernel; experts {way}")

    def fast_kernels(self) -> Kernels:
        """Return kernels with torch's int4 product, or kernels that decode experts if that product does not work."""
        return fused_or_plain(self.torch_device, CudaInt4())

    def slot_kernels(self, trunk: Kernels, forms: Collection[Form]) -> SlotKernels | None:
        """Return Triton's kernels, if Triton is installed and they can compute with all ``forms``; else None."""
        return None if find_spec("triton") is None else slot_kernels(trunk, forms, _triton)

    def free_memory(self) -> Available:
        """Return the memory of the GPU that is free."""
        return Available(torch.cuda.mem_get_info(self.torch_device)[0], str(self.torch_device))

    def streams(self) -> CudaStreams:
        """Return streams and memory of the GPU."""
        return CudaStreams(self.torch_device)


def _triton(layout: RecordLayout, activation: Activation, experts: int) -> BlockKernels:
    """Return Triton's kernels. The import may fail, with many types of errors."""
    from moetier.runtime.kernels.triton_experts import SlotExperts

    return SlotExperts(layout, activation, experts)


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


class CudaStreams:
    """Streams of a CUDA device: one for copies of records, and one for arranging copied records."""

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

    def page_locked(self, nbytes: int) -> torch.Tensor:
        """Return page-locked memory of the host, uint8 [nbytes]. Raises RuntimeError if CUDA refuses it."""
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def current_stream(self) -> DeviceStream:
        """Return the calling thread's current stream in torch."""
        stream: DeviceStream = _cuda.current_stream(self._device)
        return stream

    def copy_stream(self) -> DeviceStream:
        """Return this object's stream for copies."""
        return self._copies

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy of uint8 [bytes of a piece]. It is asynchronous only if ``source`` is page-locked."""
        with _cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def arranging_stream(self) -> DeviceStream:
        """Return this object's stream for arranging records."""
        return self._arranging

    def run(self, stream: DeviceStream, work: Callable[[], None]) -> None:
        """Call ``work`` with ``stream`` as torch's current stream."""
        with _cuda.stream(stream):
            work()
