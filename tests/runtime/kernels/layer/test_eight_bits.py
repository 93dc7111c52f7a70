"""Keys and values in 8 bits: quantised once, read by compiled attention with the same bits in every company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from instructions import FEATURES, processor_with
from pairwise import each_two

from moetier.runtime.kernels.layer.attend import attend
from moetier.runtime.kernels.layer.attention_piece import PIECE
from moetier.runtime.kernels.layer.eight_bits import SCALE_BYTES, in_codes
from moetier.runtime.kernels.layer.paged_cache import PageMemory
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS

TYPES = [torch.float32, torch.bfloat16]
DTYPES = pytest.mark.parametrize("dtype", TYPES, ids=["fp32", "bf16"])


def from_codes(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers [heads, tokens, width] of rows int8 [heads, tokens, width + 2], as ``in_codes`` gives them."""
    codes, scale = rows[..., :-SCALE_BYTES], rows[..., -SCALE_BYTES:].contiguous().view(torch.bfloat16)
    return (codes.float() * scale.float()).to(dtype)


@pytest.fixture
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``attend`` compute with some of this processor's instructions."""
    chosen = processor_with(request.param)
    monkeypatch.setattr("moetier.runtime.kernels.layer.attend.this_processor", lambda: chosen)


def some(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@DTYPES
def test_a_number_is_near_its_code_times_the_scale(dtype: torch.dtype) -> None:
    x = some(3, 5, 32, dtype=dtype) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None].to(dtype)
    rows = in_codes(x)
    assert rows.shape == (3, 5, 32 + SCALE_BYTES)
    largest = x.float().abs().amax(-1, keepdim=True)
    assert ((from_codes(rows, torch.float32) - x.float()).abs() <= 0.51 * largest / 127).all()
    assert not from_codes(in_codes(torch.zeros(2, 16)), dtype).any()


CASES: dict[str, tuple[int, tuple[int, int], dict[str, int]]] = {
    "causal": (6, (64, 64), {}),
    "window": (2, (48, 80), {"window": 300, "first": 200}),
    "short window": (16, (32, 16), {"window": 40, "first": 511}),
}


@pytest.mark.parametrize(("processor", "dtype", "case"), each_two(FEATURES, TYPES, CASES), indirect=["processor"])
@pytest.mark.usefixtures("processor")
def test_attention_reads_the_quantised_numbers(dtype: torch.dtype, case: str) -> None:
    heads, widths, given = CASES[case]
    length = 2 * PIECE - 150
    query = some(1, heads, length, widths[0], dtype=dtype)
    key, value = (in_codes(some(1, 2, length, width, seed=width, dtype=dtype)) for width in widths)

    def chunk(start: int, stop: int) -> torch.Tensor:
        return attend(query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], **given)

    whole = chunk(0, length)
    for start, stop in ((5, 6), (700, 701), (length - 1, length), (3, 90), (300, 812)):
        assert torch.equal(chunk(start, stop), whole[:, start:stop])
    exact = attend(query.float(), *(from_codes(rows, torch.float32) for rows in (key, value)), **given)
    near = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(whole.float(), exact, atol=near, rtol=near)


def test_pages_take_about_half_the_memory() -> None:
    whole, half = PageMemory(2), PageMemory(2, bits=8)
    for memory in (whole, half):
        memory.write(0, [1], 0, *[some(1, 4, PAGE_TOKENS, 128, dtype=torch.bfloat16)] * 2)
    assert half.page_bytes <= 0.53 * whole.page_bytes
    keys, _ = half.read(0, [1], 0, PAGE_TOKENS)
    assert torch.equal(keys, in_codes(some(1, 4, PAGE_TOKENS, 128, dtype=torch.bfloat16)))


def test_a_token_by_itself_has_the_codes_of_one_in_a_prompt(tinymix_4bit: Any) -> None:
    """Compiled layers quantise keys and values as torch does. Requests have the same answers in any company."""
    import moetier
    from moetier.runtime.engine.engine import Engine
    from moetier.runtime.engine.sequence import Request

    model, _ = moetier.load(tinymix_4bit, daemon=None, kv_bits=8, sequences=3)
    prompts = [some(size, seed=size).mul(1000).abs().long().add(3).clamp(max=3000).tolist() for size in (300, 90, 700)]
    greedy = {"do_sample": False}
    with model.tiers:
        with Engine.of(model, max_sequences=3) as engine:
            alone = [[*engine.stream(Request(tuple(ids), 12, greedy))] for ids in prompts]
            streams = [engine.stream(Request(tuple(ids), 12, greedy)) for ids in prompts]
            assert [[*stream] for stream in streams] == alone
            assert all(stream.sequence.cached for stream in streams)
        with Engine.of(model) as engine:
            answered = [*prompts[0], *alone[0]]
            for end in range(len(prompts[0]) + 1, len(answered)):  # each token behind a prompt of all before it
                (token,) = engine.stream(Request((*answered[:end],), 1, greedy))
                assert token == answered[end]
    assert model.tiers.kv.bits == 8
