"""Names of the devices on which models can be computed, as the option ``device`` takes them.

A new device is a module with a subclass of ``ComputeDevice`` (``runtime.devices.device``), and one line in DEVICES.
"""

from __future__ import annotations

from moetier.tiers.errors import ConfigError

HOST = "cpu"
# name -> module and class, which is imported when the device is used. Except for HOST, NAME:N is the device number N.
# "auto" is the last one of which this machine has any.
DEVICES = {
    HOST: "moetier.runtime.devices.cpu:Cpu",
    "cuda": "moetier.runtime.devices.cuda:Cuda",
}


def device_values() -> str:
    """Return the values of the option ``device``, as text for a user."""
    numbered = (f'"{name}"' if name == HOST else f'"{name}" or "{name}:N"' for name in DEVICES)
    return ", ".join(['"auto"', *numbered])


def check_device(option: str) -> str:
    """Return the option ``device`` unchanged. Raises ConfigError if it names no device; whether one exists is open."""
    name, colon, number = option.partition(":")
    is_name = name in DEVICES or name == "auto"
    if not is_name or (colon and (name in ("auto", HOST) or not number.isdecimal())):
        raise ConfigError(f"{option!r} is not a device.", f"Give {device_values()}.")
    return option
