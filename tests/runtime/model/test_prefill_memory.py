"""Memory of a prompt's tokens that are computed together: what is reserved, what is taken, and where it is short."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cgroups import memory_limit
from comparison import convert_tiny
from prepared import Prepared

import moetier
from moetier.runtime.config import Size
from moetier.runtime.engine.engine import Engine
from moetier.runtime.engine.packed_runner import PackedRunner
from moetier.runtime.generation.decoding import encode, longest_prompt
from moetier.runtime.machine.memory import Available, usable
from moetier.runtime.model.budgets import Needs
from moetier.runtime.model.prefill_memory import (
    MIN_IN_LOCKSTEP,
    MIN_TOKENS,
    PASS_TOKENS,
    AttentionMemory,
    Lockstep,
    Prefill,
)
from moetier.tiers.errors import BudgetError

SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"hidden_size": 1024, "head_dim": 128, "num_attention_heads": 16, "sliding_window": None},
    "qwen3_moe": {"hidden_size": 1024, "head_dim": 128, "num_attention_heads": 16},
    "gpt_oss": {"hidden_size": 1024, "head_dim": 64, "num_attention_heads": 16, "sliding_window": 128},
    "deepseek_v3": {
        **{"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": None},
        **{"qk_nope_head_dim": 128, "v_head_dim": 128, "qk_rope_head_dim": 64},
    },
    "qwen3_next": {"hidden_size": 1024, "head_dim": 128, "linear_num_value_heads": 16, "linear_num_key_heads": 8},
}
TYPES_OF_LAYERS = {
    "gpt_oss": ["sliding_attention", "full_attention"],
    "qwen3_next": ["linear_attention", "full_attention"],
}
CONTEXT = 2048
WHOLE, LIMIT = 4096, 480 << 20  # tokens; bytes, too few for the tokens together: libraries that are read count, too

# prints the bytes that a process takes for a prompt besides keys and values, and how many are reserved for them
CHILD = """
import ctypes, json, sys
from pathlib import Path
import torch
import moetier
from moetier.runtime.engine.packed_runner import PackedRunner
from moetier.runtime.engine.runner import Task
from moetier.runtime.engine.sequence import Request, TokenSequence
from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS
from moetier.runtime.model import budgets
from moetier.runtime.model.budgets import kv_cache_bytes

def own(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

folder, chunk, tokens, exact, in_lockstep = json.loads(sys.argv[1])
needs, find = [], budgets.prefill_of
budgets.prefill_of = lambda *given: needs.append(find(*given)) or needs[-1]
model, _ = moetier.load(folder, daemon=None, context=tokens, prefill_chunk=chunk, exact=exact)
ids = torch.randint(2, 250, (1, tokens), generator=torch.Generator().manual_seed(0))
with model.tiers, torch.inference_mode():
    for few in (64, 8, 1):
        model(ids[:, :few], use_cache=False, logits_to_keep=1)
    ctypes.CDLL(None).malloc_trim(0)
    before = {name: own(name) for name in ("VmRSS", "RssFile", "RssShmem")}
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident memory begins anew
    if in_lockstep:  # ``chunk`` tokens are the whole prompt
        runner = PackedRunner(model, -(-tokens // PAGE_TOKENS), later_chunk=chunk, packs=True)
        pages = [*range(-(-tokens // PAGE_TOKENS))]
        runner.run([Task(TokenSequence(Request((*ids[0].tolist(),), 1)), 0, tokens, pages)], lambda: False)
    cache = None
    for part in () if in_lockstep else ids.split(chunk, 1):
        cache = model(part, **{CACHE: cache}, use_cache=True, logits_to_keep=1).past_key_values
    after = {name: own(name) for name in ("VmHWM", "VmRSS", "RssFile", "RssShmem")}
    print(before, after)  # pytest shows it if the test fails
    grown = sum(max(0, after[name] - before[name]) for name in ("RssFile", "RssShmem"))  # the kernel may take some back
    taken = after["VmHWM"] - before["VmRSS"] - grown - kv_cache_bytes(model.config, tokens, dtype=model.dtype)
reserved = needs[0]._lockstep_bytes(tokens) if in_lockstep else needs[0]._together_bytes(chunk)
print(json.dumps([taken, reserved, model.tiers.prefill_chunk]))
"""


def measured(scripts: Prepared, *given: object) -> tuple[int, int, int]:
    """Return the bytes taken, the bytes reserved, and the tokens of a chunk.

    The kernel counts pages of all kinds together, and reclaims those of files when the machine's memory is short. This
    can only add to what is taken. So a process that seems to take too much is measured again, up to three times.
    """
    for _ in range(3):
        ended = scripts.run(CHILD, json.dumps(given))
        assert ended.returncode == 0, ended.stderr
        print(ended.stdout)
        taken, reserved, chunk = json.loads(ended.stdout.splitlines()[-1])
        if taken <= reserved:
            break
    return taken, reserved, chunk


@pytest.mark.parametrize(
    ("model_type", "chunk", "exact"),
    [
        ("qwen3_moe", CONTEXT, False),
        ("gpt_oss", 512, False),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                *[(model_type, CONTEXT, False) for model_type in ("mixtral", "gpt_oss", "deepseek_v3", "qwen3_next")],
                *[(model_type, 512, False) for model_type in ("mixtral", "qwen3_moe", "deepseek_v3")],
                *[(model_type, 512, True) for model_type in ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")],
            )
        ],
    ],
)
def test_what_is_reserved_covers_what_is_taken(
    model_type: str, chunk: int, exact: bool, tmp_path: Path, scripts: Prepared
) -> None:
    """A whole prompt, and chunks, the last of which attends to all that come before."""
    sizes = SIZES[model_type] | {"max_position_embeddings": CONTEXT, "num_hidden_layers": 2}
    sizes |= {"layer_types": TYPES_OF_LAYERS[model_type]} if model_type in TYPES_OF_LAYERS else {}
    _, directory = convert_tiny(model_type, torch.bfloat16, tmp_path, bits=4, **sizes)
    taken, reserved, computed = measured(scripts, str(directory), chunk, CONTEXT, exact, False)
    assert computed == chunk
    # without AMX, attention takes less than the part that is reserved for it
    assert reserved / (4 if exact else 2.2) < taken <= reserved


@pytest.mark.parametrize(
    ("tokens", "window"),
    [(6000, None), pytest.param(16000, None, marks=pytest.mark.slow), pytest.param(9000, 5000, marks=pytest.mark.slow)],
)
def test_what_is_reserved_for_lockstep_covers_what_it_takes(
    tokens: int, window: int | None, tmp_path: Path, scripts: Prepared
) -> None:
    """A wide model, whose hidden states of all tokens take most of the memory. With a window, all layers have it."""
    sizes = {"hidden_size": 2048, "head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 1}
    sizes |= {"num_hidden_layers": 2, "max_position_embeddings": tokens}
    if window is None:
        _, directory = convert_tiny("qwen3_moe", torch.bfloat16, tmp_path, bits=4, **sizes, moe_intermediate_size=64)
    else:
        windows = {"sliding_window": window, "layer_types": ["sliding_attention"] * 2}
        _, directory = convert_tiny("gpt_oss", torch.bfloat16, tmp_path, bits=4, **sizes, **windows)
    taken, reserved, _ = measured(scripts, str(directory), tokens, tokens, False, True)
    assert reserved / 2 < taken <= reserved


HERE = Available(1 << 30, "this machine")


@pytest.mark.parametrize(
    ("asked", "experts", "share"),
    [
        (None, 4 << 30, 0.2),  # most is left for experts
        ("100%", 4 << 30, 0.2),
        ("800MiB", 4 << 30, 224 / 1024),
        ("6GiB", 100 << 20, 924 / 1024),  # all experts fit beside it
        (None, 0, 1.0),  # a daemon has them
    ],
)
def test_fewer_tokens_where_memory_is_short(asked: str | None, experts: int, share: float) -> None:
    needs = Needs(prefill=Prefill(1 << 20, states=4096))
    found = needs.within(None if asked is None else Size.parse(asked), experts, HERE).prefill
    assert found.nbytes == pytest.approx(share * HERE.bytes, abs=40 << 20)
    assert found.nbytes + min(experts, HERE.bytes - found.nbytes) <= HERE.bytes
    assert found.tokens % MIN_TOKENS == 0
    assert needs.within(None, 4 << 30, Available(1 << 34, "this machine")) == needs  # there is enough
    assert needs.within(None, 4 << 30, Available(1, "this machine")).prefill.tokens == MIN_TOKENS
    assert usable(HERE.bytes) > needs.within(None, 4 << 30, HERE).reserve


def test_prompts_in_lockstep_get_what_they_need_at_least() -> None:
    """That is for 2,048 tokens, which may take half of the memory. Where a fifth is more, that is what they get."""
    for states, tokens in ((8 << 10, 20_000), (80 << 10, MIN_IN_LOCKSTEP), (1 << 20, 400)):
        lockstep = Lockstep(tokens=1 << 20, states=states, fixed=0)
        prefill = Needs(prefill=Prefill(1 << 20, 1 << 20, lockstep, states=8192)).within(None, 4 << 30, HERE).prefill
        assert prefill.lockstep_chunk == pytest.approx(tokens, rel=0.05)
        assert prefill.nbytes <= 0.5 * HERE.bytes


def test_the_experts_get_what_they_need_at_least() -> None:
    needs = Needs(prefill=Prefill(1 << 20, states=4096))
    found = needs.within(None, 4 << 30, HERE, smallest=700 << 20).prefill
    assert found.tokens > MIN_TOKENS
    assert found.nbytes <= usable(HERE.bytes) - (700 << 20)


def test_it_is_reported_that_fewer_tokens_are_computed_together(
    tinymix_4bit: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = Available(60 << 20, "this machine")
    monkeypatch.setattr("moetier.runtime.model.tiers.memory_for_model", lambda: free)
    model, _ = moetier.load(tinymix_4bit, daemon=None, prefill_chunk=2048, ram="8MiB")
    with model.tiers:
        chunk = model.tiers.prefill_chunk
    assert MIN_TOKENS <= chunk < 2048
    assert f"Memory leaves room to compute {chunk:,} tokens of a prompt together, not 2,048." in caplog.text


def test_a_whole_needs_no_masks_but_its_chunks_do() -> None:
    asked = Prefill(8192, context=8192, states=100_000, attentions=(AttentionMemory(masked=16_000, mask=3),))
    assert asked.nbytes == 8192 * 125_000
    assert asked.within(asked.nbytes) == asked
    less = asked.within(asked.nbytes - 1)
    assert less.tokens % MIN_TOKENS == 0
    assert less.nbytes <= asked.nbytes < replace(less, tokens=less.tokens + MIN_TOKENS).nbytes
    assert asked.later_chunk == less.tokens < 8192


@pytest.mark.parametrize("context", [96, 300])
def test_prompts_of_short_contexts_are_computed_beside_others(context: int, tinymix_4bit: Path) -> None:
    """There is memory to compute the prompts of all sequences in lockstep, or each is a single pass.

    The engine packs only such models.
    """
    model, _ = moetier.load(tinymix_4bit, daemon=None, context=context, sequences=4)
    with model.tiers, Engine.of(model, max_sequences=4) as engine:
        assert isinstance(engine._runner, PackedRunner)
        prefill = model.tiers.prefill
        assert prefill.lockstep_chunk is not None
        assert prefill.lockstep_chunk >= (context if context < PASS_TOKENS else 4 * context)
    short = replace(prefill, context=300, tokens=300)
    less = short.within(short.nbytes - 1)
    assert (less.tokens, less.nbytes) < (300, short.nbytes)


def test_a_window_limits_the_mask() -> None:
    wide = Prefill(256, context=8192, attentions=(AttentionMemory(mask=4),)).nbytes
    assert Prefill(256, context=8192, attentions=(AttentionMemory(mask=4, window=128),)).nbytes * 20 < wide


@pytest.mark.parametrize("free", [60 << 20, pytest.param(90 << 20, marks=pytest.mark.slow)])
def test_a_prompt_that_cannot_be_divided_is_refused_if_it_has_no_room(
    free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory is reserved for a chunk, and a longer prompt fits if experts leave room."""
    _, directory = convert_tiny("minimax", torch.bfloat16, tmp_path, bits=4, max_position_embeddings=32768)
    monkeypatch.setattr("moetier.runtime.model.tiers.memory_for_model", lambda: Available(free, "this machine"))
    model, _ = moetier.load(directory, daemon=None, ram="100%", context=32768, prefill_chunk=256)
    with model.tiers:
        room = longest_prompt(model)
        assert room is not None
        assert 256 <= room < 32768
        ids = [5] * (room + 1)
        with pytest.raises(
            BudgetError, match=f"which this model can only compute together. Memory has room for {room:,}."
        ):
            encode(model, lambda *_, **__: {"input_ids": ids}, "a")
        assert encode(model, lambda *_, **__: {"input_ids": ids[1:]}, "a")["input_ids"].shape == (1, room)
    assert not caplog.text


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch leaves too little of this limit")
def test_a_chunk_shrinks_in_a_control_group(tmp_path: Path) -> None:
    """`moetier bench prefill` and tests/measurements/peers.py feed the whole prompt if memory has room for that."""
    sizes = {"hidden_size": 1024, "num_attention_heads": 32, "head_dim": 128, "num_hidden_layers": 1}
    _, directory = convert_tiny(
        "qwen3_moe", torch.bfloat16, tmp_path, bits=4, fast=True, **sizes, max_position_embeddings=WHOLE
    )
    work = {"work": "model", "directory": str(directory), "ids": [[5, 6, 7, 8] * (WHOLE // 4)], "pieces": [WHOLE]}
    command = [sys.executable, "-m", "moetier.tools.bench.child"]
    with memory_limit(LIMIT) as group:
        ended = group.run(command, text=json.dumps(work | {"measured": 1}))
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert MIN_TOKENS <= found["prefill_chunk"] < WHOLE


@pytest.mark.parametrize(
    ("options", "is_packed"), [({}, True), ({"kv_bits": 8}, False), ({"same_bits": True}, False)], ids=str
)
def test_memory_for_packed_keys_is_reserved_where_torch_may_compute(
    tinymix_4bit: Path, options: dict[str, Any], is_packed: bool
) -> None:
    """With AMX. Other processors reserve the same, so that a plan says the same."""
    model, _ = moetier.load(tinymix_4bit, daemon=None, **options)
    with model.tiers:
        assert [attention.packed > 0 for attention in model.tiers.prefill.attentions] == [is_packed]
