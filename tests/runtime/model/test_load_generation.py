"""Everything that generate() does comes out as with the ordinary model, on the smallest budget there is."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from comparison import convert_tiny, smallest_ram
from integrity import check_integrity
from prepared import Prepared
from torch import Tensor
from transformers import TextStreamer

import moetier
from moetier.runtime.moe.experts import EXPERT_PARAMETERS, experts_modules
from moetier.tiers.errors import ChecksumError
from moetier.tiers.layout import BITS, Bits, ExpertKey
from moetier.tiers.quant.codec import decode
from moetier.tiers.store.folder import GROUP
from moetier.tiers.store.shard import ShardFile

DTYPES = [torch.float32, torch.bfloat16]
QUICK = {(4, torch.bfloat16)}  # widths of experts, and types
NAMES = ["fp32", "bf16"]
LONG = 600  # tokens of a prompt


def prompt(batch: int = 1, tokens: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(2, 250, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | options
    torch.manual_seed(0)
    tokens: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **options)
    return tokens


@pytest.fixture(scope="module", params=DTYPES, ids=NAMES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """An ordinary mixtral, and itself with room for one block's top-k records."""
    folder = tmp_path_factory.mktemp("mixtral")
    ordinary, directory = convert_tiny("mixtral", request.param, folder, max_position_embeddings=1024)
    tiered, _ = moetier.load(directory, ram=smallest_ram(directory))
    with tiered.tiers:
        yield ordinary, tiered


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 1.3, "top_k": 40},
        {"do_sample": True, "top_p": 0.8},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"num_return_sequences": 3, "do_sample": True},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"repetition_penalty": 1.3},
    ],
    ids=lambda options: ", ".join(f"{key}={value}" for key, value in options.items()) or "greedy",
)
def test_generate(pair: tuple[Any, Any], options: dict[str, Any]) -> None:
    ordinary, tiered = pair
    assert torch.equal(generate(tiered, prompt(), **options), generate(ordinary, prompt(), **options))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_batch_with_padding(pair: tuple[Any, Any], cache: str) -> None:
    ordinary, tiered = pair
    ids, mask = prompt(batch=4, tokens=11), torch.ones(4, 11, dtype=torch.int64)
    for row in range(1, 4):
        ids[row, : 3 * row], mask[row, : 3 * row] = 0, 0
    expected = generate(ordinary, ids, mask, cache_implementation=cache)
    assert torch.equal(generate(tiered, ids, mask, cache_implementation=cache), expected)


def test_a_long_prompt(pair: tuple[Any, Any]) -> None:
    ordinary, tiered = pair
    ids = prompt(tokens=LONG)
    with torch.no_grad():
        assert torch.equal(tiered(ids).logits, ordinary(ids).logits)
    assert torch.equal(generate(tiered, ids), generate(ordinary, ids))


def test_several_threads_at_once(pair: tuple[Any, Any]) -> None:
    ordinary, tiered = pair
    prompts = [prompt(tokens=5 + 7 * number, seed=number) for number in range(4)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(lambda ids: generate(tiered, ids), prompts))
    assert all(torch.equal(ours, generate(ordinary, ids)) for ours, ids in zip(found, prompts, strict=True))
    check_integrity(tiered.tiers.host)


def test_streaming(tinymix_4bit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = moetier.load(tinymix_4bit)
    with model.tiers:
        inputs = tokenizer("def read_lines(path):", return_tensors="pt")
        streamer = TextStreamer(tokenizer, skip_prompt=True)
        tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False, streamer=streamer)
    new = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])
    assert new.strip()
    assert capsys.readouterr().out.strip() == new.strip()


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        pytest.param(bits, dtype, marks=[pytest.mark.slow] * ((bits, dtype) not in QUICK))
        for bits in BITS
        for dtype in DTYPES
        if bits < 16
    ],
    ids=str,
)
def test_quantised_is_the_ordinary_model_with_the_decoded_weights(
    bits: Bits, dtype: torch.dtype, tmp_path: Path
) -> None:
    ordinary, directory = convert_tiny("mixtral", dtype, tmp_path, bits=bits, fast=True)
    tiered, _ = moetier.load(directory, ram=smallest_ram(directory), exact=True)
    quick, _ = moetier.load(directory, ram=smallest_ram(directory))
    with tiered.tiers, quick.tiers, torch.no_grad():
        whole = ordinary(prompt()).logits
        _take_decoded(ordinary, tiered)
        decoded = ordinary(prompt()).logits
        assert torch.equal(tiered(prompt()).logits, decoded)
        assert not torch.equal(whole, decoded)
        assert torch.equal(generate(tiered, prompt()), generate(ordinary, prompt()))
        # with records where they lie, what goes in is rounded: by much less than the weights were, but for 8 bits
        off = float((quick(prompt()).logits - decoded).norm() / decoded.norm())
        assert 0 < off < 0.1  # some tokens go to other experts for it
        if bits < 8:
            assert off < float((whole - decoded).norm() / decoded.norm()) / 3


def _take_decoded(ordinary: Any, tiered: Any) -> None:
    """Replaces an ordinary model's experts by what the other's records hold."""
    modules = experts_modules(ordinary)
    for number, block in enumerate(tiered.tiers.manifest.blocks):
        layout = tiered.tiers.manifest.layout(number)
        keys = [ExpertKey(number, expert) for expert in range(block.experts)]
        for lease in tiered.tiers.source.acquire(keys):
            for projection in layout.projections:
                assert projection.name in EXPERT_PARAMETERS
                assert projection.bits < 16
                weights = getattr(modules[block.path], projection.name)[lease.key.expert]
                decode(lease.record, layout, projection.name, weights)


def test_a_damaged_expert_is_an_error_and_never_a_wrong_token(tmp_path: Path) -> None:
    """One bit of one record: who wants that expert is told, the others go on, and mended it is served."""
    ordinary, directory = convert_tiny("mixtral", torch.bfloat16, tmp_path)
    directory = copytree(directory, tmp_path / "damaged")
    tiered, _ = moetier.load(directory)
    with tiered.tiers:
        shard = ShardFile.of(directory / GROUP, tiered.tiers.manifest, 1)
        _flip_bit(shard.path, 3 * shard.slot_bytes + 1000)
        for _ in range(2):  # the failure is not cached either
            with pytest.raises(ChecksumError, match="expert 3"):
                generate(tiered, prompt(tokens=200))
        assert tiered.tiers.host.stats().failures >= 2, "the rest of the model is read in the background, too"
        _flip_bit(shard.path, 3 * shard.slot_bytes + 1000)
        ids = prompt(tokens=200)
        assert torch.equal(generate(tiered, ids), generate(ordinary, ids))


def _flip_bit(path: Path, offset: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 4]))


def test_no_progress_bar_is_written_to_a_pipe(scripts: Prepared, tinymix_4bit: Path) -> None:
    script = (
        "import sys, moetier; from transformers.utils import logging\n"
        "with moetier.load(sys.argv[1])[0].tiers: print(logging.is_progress_bar_enabled())"
    )
    result = scripts.run(script, tinymix_4bit)
    assert (result.returncode, result.stdout) == (0, "True\n"), "as it was before"
    assert result.stderr == ""
