"""Triton's kernels in its interpreter, on tensors of a CPU. ``TRITON_INTERPRET`` is 1 before this is imported."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from moetier.runtime.kernels.triton_experts import SlotExperts

__all__ = ["SlotExperts"]


def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> TensorHandle:
    """Multiply as the interpreter does, which takes the bits of bf16 for integers."""
    a, b = (
        (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.is_bf16() else x.data.astype(np.float32)
        for x in (a, b)
    )
    return TensorHandle(np.matmul(a, b) + d.data, d.dtype.scalar)


def cast_impl(self: Any, source: Any, kind: Any, ours: Any = InterpreterBuilder.cast_impl) -> TensorHandle:
    """Round fp32 to the nearest bf16, as compiled code does; the interpreter cuts bits off."""
    if kind.scalar.is_bf16() and source.dtype.scalar.is_fp32():
        rounded = torch.from_numpy(np.atleast_1d(source.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(rounded.reshape(np.shape(source.data)), kind.scalar)
    return ours(self, source, kind)


InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
