"""Products with the projections of a record, on one device."""

from __future__ import annotations

import math
import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from moetier.tiers.keys import RecordLayout
from moetier.tiers.quantize import decode, sections


class Kernels:
    """y = x @ W.T for W in a record. Any number of threads may call it: each keeps scratch memory of its own."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._local = threading.local()

    def project(self, x: Tensor, record: Tensor, layout: RecordLayout, name: str) -> Tensor:
        """x [T, K], record uint8 [record bytes] -> [T, N] in the type of x; a bias is not added.

        Bit for bit what the ordinary module gives whose weights are the decoded ones in the type of x.
        16-bit weights of that type are multiplied where they lie; all others are decoded first.
        """
        p = next(p for p in layout.projections if p.name == name)
        stored = sections(record, layout).get(name)
        if stored is None or stored.dtype != x.dtype:
            stored = decode(record, layout, name, self._scratch(p.shape, x.dtype))
        return x @ stored if p.transposed else F.linear(x, stored)

    def _scratch(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """A tensor over this thread's scratch memory: the largest projection that it has decoded."""
        nbytes = math.prod(shape) * dtype.itemsize
        memory: Tensor | None = getattr(self._local, "memory", None)
        if memory is None or len(memory) < nbytes:
            self._local.memory = None  # the old memory goes before the new one comes
            with torch.inference_mode(False):  # one made in inference mode could not be written outside of it
                memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            self._local.memory = memory
        return memory[:nbytes].view(dtype).view(shape)
