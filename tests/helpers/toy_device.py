"""An invented device in a module of its own, to which a line of ``runtime.device_names`` refers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fake_device import prompt_device

from moetier.runtime.devices.device import ComputeDevice, Diagnosis
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.machine.memory import Available
from moetier.tiers.device.stream import Device


class Toy(ComputeDevice):
    """A device with slots of its own. Its memory is the host's, and torch calls it a CPU."""

    title = "toy"
    has_memory = True

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

    def free_memory(self) -> Available:
        return Available(1 << 30, "the toy")

    def streams(self) -> Device:
        return prompt_device(0)
