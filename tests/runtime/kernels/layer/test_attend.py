"""Attention of many tokens has the bits of attention of one, on all sets of instructions that this machine has."""

from __future__ import annotations

import math
from array import array

import pytest
import torch
from instructions import FEATURES, processor_with
from pairwise import each_two
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moetier.runtime.kernels.layer.attend import attend
from moetier.runtime.kernels.layer.attention_code import NO_WINDOW
from moetier.runtime.kernels.layer.attention_piece import PIECE
from moetier.runtime.kernels.layer.eight_bits import in_codes
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS, KeyPages

TYPES = [torch.float32, torch.bfloat16]
DTYPES = pytest.mark.parametrize("dtype", TYPES, ids=["fp32", "bf16"])


@pytest.fixture
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``attend`` compute with some of this processor's instructions."""
    chosen = processor_with(request.param)
    monkeypatch.setattr("moetier.runtime.kernels.layer.attend.this_processor", lambda: chosen)


def numbers(dtype: torch.dtype, heads: int, length: int, widths: tuple[int, int], key_heads: int = 2) -> list[Tensor]:
    """Return queries of ``length`` tokens, keys and values."""
    random = torch.Generator().manual_seed(length)
    shapes = (1, heads, length, widths[0]), (1, key_heads, length, widths[0]), (1, key_heads, length, widths[1])
    return [torch.randn(shape, generator=random).to(dtype) for shape in shapes]


CASES: dict[str, tuple[int, tuple[int, int], int, int, bool]] = {
    "causal": (6, (64, 64), 0, 0, False),
    "window and sinks": (2, (48, 80), 300, 200, True),
    "short window": (16, (32, 16), 40, 511, False),
}


@pytest.mark.parametrize(("processor", "dtype", "case"), each_two(FEATURES, TYPES, CASES), indirect=["processor"])
@pytest.mark.usefixtures("processor")
def test_chunks_change_no_bit(dtype: torch.dtype, case: str) -> None:
    heads, widths, window, first, has_sinks = CASES[case]
    length = 2 * PIECE - 150
    query, key, value = numbers(dtype, heads, length, widths)
    sinks = torch.linspace(-3, 3, heads).to(dtype) if has_sinks else None
    given = {"sinks": sinks, "first": first, **({"window": window} if window else {})}

    def chunk(start: int, stop: int) -> Tensor:
        return attend(query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], **given)

    whole = chunk(0, length)
    for size, starts in (
        (1, range(0, length, 97)),
        (7, range(0, length, 111)),
        (64, range(0, length, 64)),
        (512, [0, 300]),
    ):
        for start in starts:
            stop = min(start + size, length)
            assert torch.equal(chunk(start, stop), whole[:, start:stop]), (start, stop)
    rows = torch.arange(0, length, 7)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    if window:
        seen &= ~seen.tril(-window)
    scores = (
        query[:, :, rows].double() @ key.double().repeat_interleave(heads // 2, 1).transpose(2, 3) * widths[0] ** -0.5
    )
    scores = scores.masked_fill(~seen[rows], -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(1, heads, len(rows), 1)], 3)
    expected = scores.softmax(3)[..., :length] @ value.double().repeat_interleave(heads // 2, 1)
    near = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(whole[:, rows].double(), expected.transpose(1, 2), atol=near, rtol=near)


@pytest.mark.parametrize(
    ("processor", "dtype", "has_codes", "span"),
    each_two(FEATURES, TYPES, [False, True], [(NO_WINDOW, 0), (300, 700)]),
    indirect=["processor"],
)
@pytest.mark.usefixtures("processor")
def test_pages_change_no_bit(dtype: torch.dtype, has_codes: bool, span: tuple[int, int]) -> None:
    """Keys and values may lie in pages in any order; what is in the others is not used."""
    window, first = span
    length = PIECE + 100
    query, key, value = numbers(dtype, 6, length, (64, 48))
    key, value = (in_codes(part) if has_codes else part for part in (key, value))
    count = -(-(first + length) // PAGE_TOKENS)
    pages = KeyPages(array("q", torch.randperm(count + 3, generator=torch.Generator().manual_seed(1))[:count].tolist()))
    places = [pages.place(position) for position in range(first, first + length)]
    memories = []
    for part in (key, value):
        unused = 127 if has_codes else math.nan
        memories.append(part.new_full((1, 2, PAGE_TOKENS * (count + 3), part.shape[3]), unused))
        memories[-1][:, :, places] = part
    for tokens in (1, 7, 100):
        given = {"window": window, "first": first}
        in_order = attend(query[:, :, -tokens:], key, value, **given)
        paged = attend(query[:, :, -tokens:], *memories, **given, pages=pages, length=length)
        assert torch.equal(in_order, paged)


@DTYPES
def test_other_sequences_and_threads_change_no_bit(dtype: torch.dtype) -> None:
    """And neither does where a cache has keys and values: in the order of positions, or of heads."""
    parts = [numbers(dtype, 8, 700 + i, (64, 64)) for i in (0, 0, 0)]
    query, key, value = (torch.cat([part[i] * (number + 1) for number, part in enumerate(parts)]) for i in range(3))
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            outputs.append(attend(query, key, value))
            outputs.append(torch.cat([attend(*(part[i : i + 1] for part in (query, key, value))) for i in range(3)]))
            turned = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in (query, key, value)]
            outputs.append(attend(*turned))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@DTYPES
def test_a_mask_may_have_a_row_for_each_token(dtype: torch.dtype) -> None:
    query, key, value = numbers(dtype, 4, 96, (32, 32))
    mask = torch.where(torch.rand(1, 96, 96, generator=torch.Generator().manual_seed(0)) < 0.5, 0.0, -5.0)
    expected = scaled_dot_product_attention(
        *(part.double() for part in (query, key, value)),
        mask.double().masked_fill(~torch.ones(96, 96, dtype=torch.bool).tril(), -math.inf)[:, None],
        enable_gqa=True,
    )
    near = 1e-5 if dtype == torch.float32 else 1e-2
    whole = attend(query, key, value, mask)
    torch.testing.assert_close(whole.double(), expected.transpose(1, 2), atol=near, rtol=near)
    last = attend(query[:, :, -1:], key, value, mask[:, -1:])
    assert torch.equal(last, whole[:, -1:])
