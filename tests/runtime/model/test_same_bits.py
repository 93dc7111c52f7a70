"""A token's logits depend on the tokens up to it only: not on chunks, other sequences, or threads."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import convert_tiny
from torch import Tensor
from transformers import DynamicCache

from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.layer.attention import NAME, WITH_SINKS
from moetier.runtime.model.load import load

TYPES = ["qwen3_moe", "mixtral", "gpt_oss", "olmoe", "glm4_moe", "granitemoe"]
SIZES = {"hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 64, "intermediate_size": 64}
TRUNKS = [4, 8, 16]
BEYOND = 530  # tokens: more than a piece of attention


@pytest.mark.parametrize("kind", TYPES)
def test_a_prompt_may_be_cut_anywhere(kind: str, tmp_path: Path) -> None:
    """With a trunk of 16 bits: in one chunk; token by token around the end of a piece; in chunks of 7; with others."""
    _check(kind, 16, BEYOND, [[500, *[1] * 30], [64] * 9, [7] * 76], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("trunk_bits", TRUNKS)
@pytest.mark.parametrize("kind", TYPES)
def test_a_long_prompt_may_be_cut_anywhere(kind: str, trunk_bits: Any, tmp_path: Path) -> None:
    length = 1500
    _check(kind, trunk_bits, length, [[size] * -(-length // size) for size in (1, 7, 64, 512, 1024)], tmp_path)


def _check(kind: str, trunk_bits: Any, length: int, cuts: list[list[int]], folder: Path) -> None:
    sizes = {**SIZES, "max_position_embeddings": 2 * length}
    _, directory = convert_tiny(kind, torch.bfloat16, folder, bits=4, trunk_bits=trunk_bits, **sizes)
    model, _ = load(directory, daemon=None)
    ids = torch.randint(5, 250, (1, length), generator=torch.Generator().manual_seed(0))
    assert model.config._attn_implementation in (NAME, WITH_SINKS)
    with model.tiers, torch.inference_mode():
        wanted = _logits(model, ids, [length])
        for sizes_ in cuts:
            assert _differing(_logits(model, ids, sizes_), wanted) == [], sizes_[:3]
        for threads in _with_threads(1, 3, 4):
            assert _differing(_logits(model, ids, [300, 200, *[1] * 10]), wanted[:, :510]) == [], f"{threads} threads"
        for others in (1, 2, 7):
            company = torch.cat([ids, *(ids.roll(i + 1, 1) for i in range(others))])
            cut = [length // 2, 1, 1, length - length // 2 - 2]
            assert _differing(_logits(model, company, cut)[:1], wanted) == [], f"{others} others"


def _logits(model: Any, ids: Tensor, sizes: Iterable[int]) -> Tensor:
    """Compute the logits [batch, tokens, vocabulary] of ids [batch, length] in chunks of these sizes."""
    cache = DynamicCache(config=model.config)
    ends = [0, *itertools.accumulate(sizes)]
    parts = [
        model(ids[:, begin:end], **{CACHE: cache}, use_cache=True).logits for begin, end in itertools.pairwise(ends)
    ]
    return torch.cat(parts, 1)


def _differing(computed: Tensor, wanted: Tensor) -> list[int]:
    """Return the positions at which logits [1, tokens, vocabulary] differ."""
    assert computed.shape == wanted.shape
    return (computed != wanted).any(2)[0].nonzero().flatten().tolist()


def _with_threads(*counts: int) -> Iterator[int]:
    before = torch.get_num_threads()
    try:
        for count in counts:
            torch.set_num_threads(count)
            yield count
    finally:
        torch.set_num_threads(before)
