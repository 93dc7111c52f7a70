"""Page locks of the memory that a device copies from: all of it in one registration, when it is first copied from."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from .stream import Device


class PageLocks:
    """Its owner sees to it that nothing is unlocked while a copy out of it is under way."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._locked: dict[int, torch.Tensor] = {}  # by the memory's id: all of it, which lives as long as that
        self._retired: dict[int, torch.Tensor] = {}  # to be unlocked, since the host has other memory now
        self._pageable = False  # once it has failed

    @property
    def has_retired(self) -> bool:
        return bool(self._retired)

    def lock(self, memory: Any) -> None:
        """Warns once where the system does not."""
        if self._pageable or id(memory) in self._locked:
            return
        if id(memory) in self._retired:  # a late reader of what was replaced
            self._locked[id(memory)] = self._retired.pop(id(memory))
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            whole = torch.frombuffer(memory, dtype=torch.uint8)
        if self._device.lock_pages(whole, read_only=memoryview(memory).readonly):
            self._locked[id(memory)] = whole
            return
        self._pageable = True
        warnings.warn(
            "The system does not page-lock the host tier: copies to the device will be slower.",
            RuntimeWarning,
            stacklevel=2,
        )

    def retire(self, memory: Any) -> None:
        """By who copies out of the memory that took its place."""
        if (whole := self._locked.pop(id(memory), None)) is not None:
            self._retired[id(memory)] = whole

    def unlock_retired(self) -> None:
        self._unlock(self._retired)

    def unlock(self) -> None:
        """All that is not retired. Idempotent."""
        self._unlock(self._locked)

    def _unlock(self, locked: dict[int, torch.Tensor]) -> None:
        while locked:
            self._device.unlock_pages(locked.popitem()[1])
