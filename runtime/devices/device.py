"""Contract of a device that computes models, and the choice of a device."""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from pkgutil import resolve_name
from typing import ClassVar, NamedTuple

import torch

from moetier.runtime.device_names import DEVICES, device_values
from moetier.runtime.kernels.jit.executable import can_become_executable
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.kernels.slots import Form, SlotKernels
from moetier.runtime.machine.memory import Available
from moetier.tiers.device.stream import StreamDevice
from moetier.tiers.errors import ConfigError

PROTECTED = "memory that was written can't be made executable here"
WITHOUT_ONEDNN = "torch computes without oneDNN, which is slow for prompts where the trunk has 16 bits"


class Diagnosis(NamedTuple):
    """Result of a device's check for ``moetier doctor``. With ``advice``, it is a warning."""

    text: str
    advice: str = ""


class ComputeDevice(ABC):
    """A device that computes a model.

    Attributes:
        title: its name in errors, after "no".
        has_memory: whether it has memory of its own (``MemoryDevice``). Otherwise it computes with the records in the
            host's slots.
        torch_device: where torch allocates the tensors that it computes with.
    """

    title: ClassVar[str]
    has_memory: ClassVar[bool] = False

    def __init__(self, device: torch.device | str) -> None:
        """``device``: a torch device, or a value of the option `device`, such as "cpu"."""
        self.torch_device = torch.device(device)

    @classmethod
    @abstractmethod
    def is_available(cls) -> bool:
        """Return whether torch can use such a device in this process."""

    @classmethod
    def diagnose(cls) -> Iterator[Diagnosis]:
        """Yield what ``moetier doctor`` says about each such device of this machine. By default there is nothing."""
        yield from ()

    @abstractmethod
    def fast_kernels(self) -> Kernels:
        """Return the fastest kernels that work here. Warn if the device should have faster ones."""

    def kernels(self, *, exact: bool = False) -> Kernels:
        """Return the fastest kernels. With ``exact``, return kernels with the same bits as the eager model.

        Where oneDNN can't run, it is turned off for the whole process.
        """
        if turn_off_onednn_where_barred():
            warn_once(f"As {PROTECTED}, {WITHOUT_ONEDNN}.")
        return Kernels(self.torch_device) if exact else self.fast_kernels()

    def slot_kernels(self, trunk: Kernels, forms: Collection[Form]) -> SlotKernels | None:
        """Return kernels that compute a block's experts together, of ``forms``, from this device's slots.

        Returns None if there are none; ``trunk``, which are ``fast_kernels``, then multiply with the records, too.
        """
        return None


class MemoryDevice(ComputeDevice):
    """A device with memory of its own, which has trunk, context and the slots of a device tier."""

    has_memory = True

    @abstractmethod
    def free_memory(self) -> Available:
        """Return the device's own memory that is free."""

    @abstractmethod
    def streams(self) -> StreamDevice:
        """Return the streams and memory of a new device tier."""


def device_class(name: str) -> type[ComputeDevice]:
    """Return the class of the device called ``name`` in DEVICES."""
    return resolve_name(DEVICES[name])


def chosen_device(option: str) -> ComputeDevice:
    """Return the device that the option ``device`` names. Raises ConfigError if torch can't use it here."""
    if option == "auto":
        option = next(name for name in reversed(DEVICES) if device_class(name).is_available())
    device_type = device_class(option.partition(":")[0])
    if not device_type.is_available():
        raise ConfigError(
            f"This machine has no {device_type.title} that torch can use.", 'Set `device` to "cpu" or "auto".'
        )
    return device_type(option)


def device_at(device: torch.device, option: str = "auto") -> ComputeDevice:
    """Return the device of a trunk that is on ``device``: that of the option ``device``, or the one that torch names.

    Raises ConfigError if moetier can't compute there.
    """
    name = device.type if option == "auto" else option.partition(":")[0]
    if name not in DEVICES:
        raise ConfigError(f"The trunk is on {device}, where moetier can't compute.", f"Give {device_values()}.")
    return device_class(name)(device)


def turn_off_onednn_where_barred() -> bool:
    """Turn oneDNN off in this process if memory that was written can't be made executable. Return whether it is off.

    oneDNN compiles code of its own. If that code can't be executed, it raises "could not create a primitive".
    """
    if can_become_executable():
        return False
    torch.backends.mkldnn.set_flags(False)  # type: ignore[no-untyped-call]
    return True


@functools.cache
def warn_once(text: str) -> None:
    """Warn with ``text``, once in a process."""
    warnings.warn(text, RuntimeWarning, stacklevel=3)
