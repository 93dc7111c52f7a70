"""Interface of kernels, which multiply with the projections of records on one device.

A device chooses its kernels (``runtime.devices``).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetier.runtime.kernels.jit.processor import Processor
from moetier.tiers.errors import BudgetError, ConfigError
from moetier.tiers.layout import RecordLayout
from moetier.tiers.quant.codec import decode, sections

FLOATS = frozenset({torch.float32, torch.bfloat16})  # types of numbers that compiled kernels read and write
CPU = torch.device("cpu")  # where they write. Without it, torch's default device would be used
_ORDINARY = frozenset({Tensor, nn.Parameter})


def is_readable(x: Any) -> bool:
    """Return whether compiled code can take x from a module: an ordinary tensor on a CPU, contiguous.

    Subclasses of Tensor have operations of their own, and some have no memory.
    """
    return type(x) in _ORDINARY and x.is_cpu and x.is_contiguous()


def has_memory(x: Tensor) -> bool:
    """Return whether the numbers of x, such as [rows, columns], are in memory of a CPU. FakeTensor has none."""
    return x.is_cpu and type(x).__torch_dispatch__ is Tensor.__torch_dispatch__


def moved_error(where: torch.device, device: torch.device) -> ConfigError:
    """Return the error for a model that was moved to ``where`` while its experts are on ``device``."""
    return ConfigError(
        f"The model was moved to {where}; its experts are on {device}.", "Load it on the device where it is to run."
    )


class Kernels:
    """Kernels that compute y = x @ W.T for a matrix W that is stored in a record.

    This base class decodes W into the type of x, and multiplies with torch's own operations. So y has the same bits as
    the output of an ordinary linear module with the decoded weights. Thread-safe: each thread has its own scratch
    memory.
    """

    # the processor for which compiled code multiplies with records; None if there is no such code
    processor: Processor | None = None

    # prepares a record (uint8 [record bytes], on the device) of the given layout in place, once, before its first use;
    # None if records need no preparation
    arrange: Callable[[Tensor, RecordLayout], None] | None = None

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._local = threading.local()
        self._make_room: Callable[[], int] = lambda: 0

    def on_out_of_memory(self, make_room: Callable[[], int]) -> None:
        """Register ``make_room``, which makes the device tier give memory back, and returns how many bytes.

        It is called by threads that hold no lease.
        """
        self._make_room = make_room

    def packs(self, layout: RecordLayout) -> bool:
        """Return whether these kernels multiply with all projections of a layout as they are stored, undecoded."""
        return False

    def project(self, x: Tensor, record: Tensor, layout: RecordLayout, name: str, bias: Tensor | None = None) -> Tensor:
        """Multiply with one projection of a record.

        16-bit weights in the type of x are multiplied as they are stored; all others are decoded first.

        Args:
            x: [tokens, columns].
            record: uint8 [record bytes].
            layout: the record's layout.
            name: the projection's name.
            bias: [rows]; None for experts, whose modules add biases afterwards.

        Returns:
            [tokens, rows] in the type of x.
        """
        p = layout.projection(name)
        if (stored := sections(record, layout).get(name)) is None or stored.dtype != x.dtype:
            stored = decode(record, layout, name, self._scratch(p.shape, x.dtype))
        if p.transposed:
            assert bias is None, "transposed matrices are of experts, which have none"
            return x @ stored
        return F.linear(x, stored, bias)

    def with_room(self, work: Callable[[], Tensor]) -> Tensor:
        """Call ``work``, and return its result [tokens, ...].

        If the device runs out of memory, make the device tier give some back, and call ``work`` once more. Raises
        BudgetError if that does not help.
        """
        try:
            return work()
        except torch.OutOfMemoryError as error:
            said = str(error)
        # outside the handler, because the error's frames keep tensors of the failed call alive
        if freed := self._make_room():
            try:
                return work()
            except torch.OutOfMemoryError as error:
                said = str(error)
        numbers = said.partition(" If reserved but")[0].partition("\n")[0]  # torch's advice on its allocator follows
        relief = f"after its tier gave back {freed:,} bytes" if freed else "and its tier has no slots to give back"
        raise BudgetError(
            f"The device ran out of memory, {relief}: {numbers}",
            "Give its tier less (`device_memory`), compute fewer tokens at a time (moetier generate --prefill-chunk), "
            "or free memory of the device.",
        )

    def _scratch(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return a tensor of ``shape`` in this thread's scratch memory, which grows to the largest tensor asked for."""
        nbytes = math.prod(shape) * dtype.itemsize
        memory: Tensor | None = getattr(self._local, "memory", None)
        if memory is None or len(memory) < nbytes:
            memory = self._local.memory = None  # frees the old memory before the new one is allocated
            # memory that is made in inference mode could not be written outside of it
            with torch.inference_mode(False):
                memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            self._local.memory = memory
        return memory[:nbytes].view(dtype).view(shape)
