"""Bytes of the states that a model keeps for a sequence besides keys and values."""

from __future__ import annotations

from typing import Any

from torch import nn

from moetier.runtime.libraries.torch_internals import parameters_of

NUMBER_BYTES = 4  # of recurrent states, and of some convolutions' inputs


def state_bytes(model: Any) -> int:
    """Return the bytes of a sequence's state, in all layers, at most a little more than it takes.

    That is for each convolution its last inputs, and for each module with decays (Mamba, linear attention) the
    recurrent state of its heads. ``model`` may be on the meta device.
    """
    numbers = sum(
        module.in_channels * (module.dilation[0] * (module.kernel_size[0] - 1) + 1)
        for module in model.modules()
        if isinstance(module, nn.Conv1d)
    )
    numbers += sum(_recurrent(module) for module in model.modules() if "A_log" in parameters_of(module))
    return NUMBER_BYTES * numbers


def _recurrent(module: Any) -> int:
    """Return how many numbers the recurrent state has of a module with a decay for each head, or for each channel."""
    if module.A_log.dim() == 2:  # [channels, state]
        return int(module.A_log.numel())
    if hasattr(module, "num_v_heads"):
        return int(module.num_v_heads * module.head_k_dim * module.head_v_dim)
    width = getattr(module, "head_dim", 0)
    return int(getattr(module, "num_heads", 0) * width * getattr(module, "ssm_state_size", width))
