"""A token's logits depend on the tokens up to it only: not on chunks, other sequences, or threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import FURTHER, REQUIRED
from chunks import apart, logits_in_chunks, published_widths
from comparison import convert_tiny
from torch import Tensor
from transformers import DynamicCache

from moetier.runtime.checkpoint.config_json import read_config
from moetier.runtime.engine.model_runner import windows_of
from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.products.matmul import matmul
from moetier.runtime.model.context import has_states
from moetier.runtime.model.load import load
from moetier.runtime.model.same_bits import VARYING, bits_of, varying_part, varying_part_here
from moetier.runtime.stores.registry import read_manifest
from moetier.tools.main import main

TYPES = ["qwen3_moe", "mixtral", "gpt_oss", "olmoe", "glm4_moe", "granitemoe"]
OTHERS = sorted((REQUIRED | FURTHER) - VARYING.keys() - {*TYPES})
QUICK = ["qwen3_next"]
# qwen4_exp is further apart: attention of one token to chosen positions is compiled, that of many is torch's
MEASURED = [kind for kind, varying in VARYING.items() if varying.moetier and kind not in (*QUICK, "qwen4_exp")]
OTHER_EXPERT = 2.5  # how far a logit may move if a last bit sends a token to another expert
SCATTER = 0.06  # of a share of one prompt's 150 tokens, which has a standard deviation of up to 0.04
TRUNKS = [4, 8, 16]
BEYOND = 530  # tokens: more than a piece of attention


@pytest.mark.parametrize("kind", [*TYPES[::2], *(pytest.param(kind, marks=pytest.mark.slow) for kind in TYPES[1::2])])
def test_a_prompt_may_be_cut_anywhere(kind: str, tmp_path: Path) -> None:
    """With a trunk of 16 bits: in one chunk; around the end of a piece token by token and by 7; with others."""
    _check(kind, 16, BEYOND, [[500, *[1] * 30], [64] * 9, [481, *[7] * 7]], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_all_types_that_are_not_said_to_vary(kind: str, tmp_path: Path) -> None:
    _check(kind, 16, BEYOND, [[500, *[1] * 30], [7] * 76], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("trunk_bits", TRUNKS)
@pytest.mark.parametrize("kind", TYPES)
def test_a_long_prompt_may_be_cut_anywhere(kind: str, trunk_bits: Any, tmp_path: Path) -> None:
    length = 1500
    _check(kind, trunk_bits, length, [[size] * -(-length // size) for size in (1, 7, 64, 512, 1024)], tmp_path)


@pytest.fixture(autouse=True)
def widths() -> Iterator[None]:
    with published_widths():
        yield


@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MEASURED)])
def test_logits_are_no_further_apart_than_in_plain_transformers(kind: str, tmp_path: Path) -> None:
    prompts = 1 if kind in QUICK else 4
    found, plain = apart(kind, tmp_path, prompts=prompts)
    assert found.share <= plain.share + SCATTER / prompts**0.5
    assert found.largest <= max(1.2 * plain.largest, OTHER_EXPERT)


@pytest.mark.slow
def test_latent_attention_has_the_same_bits_where_plain_transformers_has_not(tmp_path: Path) -> None:
    found, plain = apart("deepseek_v3", tmp_path, prompts=1)
    assert found == (0, 0)
    assert plain.share > 0.1


def _check(kind: str, trunk_bits: Any, length: int, cuts: list[list[int]], folder: Path) -> None:
    room = {"max_position_embeddings": 2 * length}
    _, directory = convert_tiny(kind, torch.bfloat16, folder, bits=4, trunk_bits=trunk_bits, fast=True, **room)
    model, _ = load(directory, daemon=None, same_bits=True)  # else torch may multiply 16-bit matrices with AMX
    ids = torch.randint(5, 250, (1, length), generator=torch.Generator().manual_seed(0))
    assert varying_part_here(model) is None
    with model.tiers, torch.inference_mode():
        wanted = logits_in_chunks(model, ids, [length])
        for sizes_ in cuts:
            assert _differing(logits_in_chunks(model, ids, sizes_), wanted) == [], sizes_[:3]
        # transformers can't cut a full window, nor states of which it keeps only the last
        if all(window is None for window in windows_of(model)) and not has_states(model):
            cache = DynamicCache(config=model.config)
            model(ids[:, :400], **{CACHE: cache}, use_cache=True)
            cache.crop(-150)
            rest = model(ids[:, 250:], **{CACHE: cache}, use_cache=True).logits
            assert _differing(rest, wanted[:, 250:]) == [], "after cutting and continuing"
        for threads in _with_threads(1, 3, 4):
            some = logits_in_chunks(model, ids, [300, 200, *[1] * 10])
            assert _differing(some, wanted[:, :510]) == [], f"{threads} threads"
        for others in (1, 2, 7):
            company = torch.cat([ids, *(ids.roll(i + 1, 1) for i in range(others))])
            cut = [length // 2, 1, 1, length - length // 2 - 2]
            assert _differing(logits_in_chunks(model, company, cut)[:1], wanted) == [], f"{others} others"


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


def test_what_makes_bits_vary(tinymix_4bit: Path, tmp_path: Path) -> None:
    manifest, config = read_manifest(tinymix_4bit), read_config(tinymix_4bit)
    assert varying_part(config, manifest) is None
    assert str(varying_part(config | {"model_type": "qwen3_next"}, manifest)).startswith("linear attention (tokens")
    assert varying_part(config | {"model_type": "qwen3_omni_moe"}, manifest) == "an attention of its own"
    assert varying_part(config | {"dtype": "float32"}, manifest) == "the trunk's products in float32"
    _, wide = convert_tiny("mixtral", torch.bfloat16, tmp_path)
    assert "16-bit experts" in str(varying_part(config, read_manifest(wide)))


@pytest.mark.parametrize("same_bits", [False, True])
def test_where_torch_is_faster_it_computes_16_bit_matrices(
    tinymix_4bit: Path, same_bits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is with AMX. ``--same-bits`` is to compute them with the bits of one row all the same."""
    monkeypatch.setattr("moetier.runtime.kernels.products.row.prefers_torch", lambda: True)
    model, _ = load(tinymix_4bit, daemon=None, same_bits=same_bits)
    with model.tiers, torch.inference_mode():
        assert (varying_part_here(model) is None) is same_bits
        x, weight = torch.randn(64, model.config.hidden_size).to(model.dtype), model.lm_head.weight
        plain = weight.detach().as_subclass(Tensor)
        wanted = matmul(x, plain, plain.dtype) if same_bits else F.linear(x, plain)
        assert torch.equal(F.linear(x, weight), wanted)


@pytest.mark.parametrize("amx", [False, True])
def test_commands_say_so(
    tinymix_4bit: Path, amx: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They agree with a server, which asks ``varying_part_here``."""
    monkeypatch.setattr("moetier.runtime.kernels.products.row.prefers_torch", lambda: amx)
    model, _ = load(tinymix_4bit, daemon=None)
    with model.tiers:
        said = bits_of(varying_part_here(model))
    assert main(["inspect", str(tinymix_4bit)]) == 0
    assert f"logits           {said}\n" in capsys.readouterr().out
    main(["doctor", str(tinymix_4bit)])
    assert said in " ".join(capsys.readouterr().out.split())
