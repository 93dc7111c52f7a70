"""The step that this thread computes for several sequences, whose tokens are packed into one row.

All modules but attention compute each token by itself. Attention functions compute sequence by sequence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class PackedQuery(NamedTuple):
    """Attention of one sequence's new tokens."""

    query: Tensor  # [1, heads, tokens, width]
    keys: Tensor  # [1, key heads, places, width], of which the mask's ``Band`` says where the sequence's lie
    values: Tensor  # [1, key heads, places, values]
    mask: Tensor | None  # as ``band_mask`` returns it


class PackedStep(Protocol):
    """Keys and values of several sequences."""

    def parts(self, layer: int, query: Tensor) -> Iterator[PackedQuery]:
        """Take the queries [1, heads, tokens, width] of all sequences' new tokens apart."""


_step: ContextVar[PackedStep | None] = ContextVar("moetier_packed_step", default=None)


@contextlib.contextmanager
def packed(step: PackedStep | None) -> Iterator[None]:
    """Let attention functions compute with ``step`` within the block, on this thread."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def packed_step() -> PackedStep | None:
    """Return the step that this thread computes for several sequences; None if there is none."""
    return _step.get()


def attend_to_each(
    step: PackedStep, attend: Callable[..., Any], module: Any, query: Tensor, named: dict[str, Any]
) -> tuple[Tensor, None]:
    """Call transformers' attention function ``attend`` for each sequence of a step.

    ``named`` are further arguments of the function. Returns [1, tokens, heads, values], and None in place of the
    attention weights.
    """
    with packed(None):
        outputs = [attend(module, *part, **named)[0] for part in step.parts(module.layer_idx, query)]
    return torch.cat(outputs, 1), None
