"""Masks of causal attention, which say which positions a token attends to.

transformers makes a mask for each forward pass. If it shows no more than causal attention does, with or without a
window, compiled code needs only a Band of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import eager_mask, sdpa_mask

from .attention_code import NO_WINDOW
from .attention_piece import PIECE
from .pages import KeyPages

_BAND = "moetier_band"  # name of an attribute of masks


class Band(NamedTuple):
    """A causal mask in short: each token attends to its own position, and to the ``window`` - 1 before it."""

    first: int  # position of the first key in its sequence
    window: int  # most positions that a token attends to, its own included
    pages: KeyPages | None = None  # in which keys and values lie; None: one after the other


def band_of(mask: Tensor | None) -> Band | None:
    """Return the Band of a mask [batch, 1, tokens, cached] of ``causal_mask`` or ``sink_mask``; None for others.

    transformers gives attention functions no positions, so the mask carries its Band as an attribute. A mask that the
    architecture's code derives from it has none.
    """
    return None if mask is None else vars(mask).get(_BAND)


def with_band(mask: Tensor, band: Band) -> Tensor:
    """Note the Band of a mask [batch, 1, tokens, cached], and return the mask."""
    vars(mask)[_BAND] = band
    return mask


def band_mask(tokens: int, length: int, band: Band, device: torch.device) -> Tensor | None:
    """Return a mask, bool [1, 1, tokens, length], of the last tokens of a sequence; None if none is needed.

    ``length`` is the number of keys, of which the first is at ``band.first``. The mask has no memory but its Band:
    ``written_out`` gives its numbers.
    """
    if tokens == 1 and band.first % PIECE == 0 and band.pages is None:
        return None
    return with_band(torch.ones((), dtype=torch.bool, device=device).expand(1, 1, tokens, length), band)


def written_out(mask: Tensor | None) -> Tensor | None:
    """Return a mask [batch, 1, tokens, length] with all its numbers, if ``band_mask`` made it; others unchanged."""
    band = band_of(mask)
    if mask is None or band is None or any(mask.stride()):
        return mask
    tokens, length = mask.shape[2:]
    return causal(tokens, length, min(band.window, length), mask.device)[None, None]


def in_order(key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return keys and values one after the other, [1, heads, length, width], if a mask's Band says that they are not.

    ``key`` and ``value`` are [1, heads, places, width].
    """
    band = band_of(mask)
    if mask is None or band is None or band.pages is None:
        return key, value
    positions = torch.arange(band.first, band.first + mask.shape[3], device="cpu")
    places = band.pages.places(positions).to(key.device)
    return key.index_select(2, places), value.index_select(2, places)


def causal_mask(**given: Any) -> Tensor | None:
    """Return transformers' mask [batch, 1, tokens, cached] for SDPA; None if tokens attend to all up to their own.

    transformers makes such masks for tokens that follow others, and for a token that attends to a whole sliding window.
    """
    may_skip, first = given.get("allow_is_causal_skip", True), given.get("kv_offset", 0)
    if 1 < given["q_length"] < given["kv_length"]:  # without a mask, SDPA would take the tokens for the first ones
        given["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(**given)
    if mask is None or not may_skip:
        return mask
    tokens, length = mask.shape[2:]
    window = length if tokens == 1 else int(mask[0, 0, -1].sum())
    if not window or not bool((mask == causal(tokens, length, window, mask.device)).all()):
        return mask
    if window == length and first % PIECE == 0:
        return None
    return with_band(mask, Band(first, NO_WINDOW if window == length else window))


def causal(tokens: int, length: int, window: int, device: torch.device) -> Tensor:
    """Return the mask [tokens, length] of the last tokens of a sequence: each attends to ``window`` positions."""
    mask = torch.ones((tokens, length), dtype=torch.bool, device=device).tril(length - tokens)
    return mask if window == length else mask.triu(length - tokens - window + 1)


def sink_mask(**given: Any) -> Tensor | None:
    """Return the additive mask [batch, 1, tokens, cached] that an architecture's own function takes.

    If the mask is that of a Band, it carries the Band, so that compiled code need not read it. Returns None for one
    token as ``causal_mask`` does.
    """
    shown = causal_mask(**given)
    if shown is None and given["q_length"] == 1:
        return None
    mask: Tensor = eager_mask(**given)
    band = Band(0, NO_WINDOW) if shown is None else band_of(shown)
    return mask if band is None else with_band(mask, band)
