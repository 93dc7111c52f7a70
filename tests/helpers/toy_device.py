"""An invented device in a module of its own, to which a line of ``runtime.device_names`` refers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import ClassVar

import torch
from fake_device import prompt_device

from moetier.runtime.devices.device import Diagnosis, MemoryDevice
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.kernels.slots import Form, Make, SlotKernels, slot_kernels
from moetier.runtime.machine.memory import Available
from moetier.tiers.device.stream import StreamDevice


class Toy(MemoryDevice):
    """A device with slots of its own. Its memory is the host's, and torch calls it a CPU."""

    title = "toy"
    block_kernels: ClassVar[Make | None] = None  # makes kernels for a block's experts in its slots

    def __init__(self, device: torch.device | str) -> None:
        super().__init__("cpu")

    @classmethod
    def is_available(cls) -> bool:
        return True

    @classmethod
    def diagnose(cls) -> Iterator[Diagnosis]:
        yield Diagnosis("a toy", "Get a larger one.")

    def fast_kernels(self) -> Kernels:
        return Kernels(self.torch_device)

    def slot_kernels(self, trunk: Kernels, forms: Collection[Form]) -> SlotKernels | None:
        return None if self.block_kernels is None else slot_kernels(trunk, forms, self.block_kernels)

    def free_memory(self) -> Available:
        return Available(1 << 30, "the toy")

    def streams(self) -> StreamDevice:
        return prompt_device(0)
