"""Logits of one prompt, computed in chunks of several sizes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from comparison import convert_tiny
from torch import Tensor

import moetier
from moetier.runtime.generation.compat import CACHE
from moetier.runtime.model.same_bits import Apart

LENGTH = 150  # tokens of a prompt
SIZES = (1, 7, 33, LENGTH)  # of chunks


@contextlib.contextmanager
def published_widths() -> Iterator[None]:
    """Let tiny models have the widths that compiled code needs, as all published models do."""
    with pytest.MonkeyPatch.context() as patch:
        for name in architectures.TINY:
            if name.endswith("intermediate_size"):
                patch.setitem(architectures.TINY, name, 64)
        patch.setitem(architectures.TINY, "qk_rope_head_dim", 16)  # torch rounds rotations of 8 in two ways
        patch.setitem(architectures.OWN["HYV4VLTextConfig"]["rope_parameters"], "mrope_section", [4, 2, 2])
        yield


def logits_in_chunks(model: Any, ids: Tensor, sizes: Iterable[int]) -> Tensor:
    """Compute the logits [batch, tokens, vocabulary] of ids [batch, length] in chunks of these sizes."""
    parts, given = [], dict[str, Any]()
    for begin, end in itertools.pairwise([0, *itertools.accumulate(sizes)]):
        outputs = model(ids[:, begin:end], **given, use_cache=True)
        given[CACHE] = outputs.get(CACHE)  # of the class that the model makes
        parts.append(outputs.logits)
    return torch.cat(parts, 1)


def apart(model_type: str, folder: Path, *, prompts: int) -> tuple[Apart, Apart]:
    """Return how far logits are apart in a tiny model with experts of 4 bits and a trunk of 16.

    First as moetier computes them, and then as plain transformers does, with the same weights.
    """
    with published_widths():
        _, directory = convert_tiny(model_type, torch.bfloat16, folder, bits=4, max_position_embeddings=2 * LENGTH)
    found = []
    for exact in (False, True):
        # without same_bits, torch may compute prompts' attention and 16-bit matrices with AMX
        model, _ = moetier.load(directory, daemon=None, exact=exact, same_bits=not exact)
        with model.tiers, torch.inference_mode():
            found.append(_apart(model, prompts))
    return found[0], found[1]


def _apart(model: Any, prompts: int) -> Apart:
    largest, differing = 0.0, 0
    for seed in range(prompts):
        ids = torch.randint(5, 250, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
        ways = torch.cat([logits_in_chunks(model, ids, _sizes(size)) for size in SIZES]).float()
        differences = (ways.amax(0) - ways.amin(0)).amax(1)  # [tokens]
        largest = max(largest, float(differences.max()))
        differing += int((differences > 0).sum())
    return Apart(largest, differing / (prompts * LENGTH))


def _sizes(size: int) -> list[int]:
    return [size] * (LENGTH // size) + [LENGTH % size] * (LENGTH % size > 0)
