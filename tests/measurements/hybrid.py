"""Measure the first token of a second turn of a small model with linear attention, with and without what is kept.

    python tests/measurements/hybrid.py build/hybrid --tokens 8000

DIR is made if it is missing: a random model with the layers of Qwen3-Next (three with linear attention for each with
full attention), experts and trunk in 4 bits. In each round the second prompt, a first one of ``--tokens`` tokens with
its answer and 60 further tokens, is computed behind the first one and alone. Prints the seconds to the first token for
both, as medians (least to most), how many tokens were computed, the ratio of the medians, and the bytes of a snapshot.

A prompt's last 8 tokens are a forward pass of their own, as a snapshot is taken before them. ``--pairs`` compares first
turns with first turns without that pass. ``--ram`` is the memory for experts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import transformers
from pairs import times_as_fast

import moetier
from moetier.runtime.engine import kv_cache
from moetier.runtime.engine.engine import Engine
from moetier.runtime.engine.sequence import Request
from moetier.runtime.generation.compat import CACHE
from moetier.tools.bench.output import Spread

ANSWER, QUESTION = 64, 60  # tokens


def make(directory: Path) -> None:
    """Make the model directory of a small random model."""
    config = transformers.Qwen3NextConfig(
        vocab_size=4096,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=8,
        linear_num_value_heads=16,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=256,
        shared_expert_intermediate_size=256,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3NextForCausalLM._from_config(config, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        options = ["--bits", "4", "--trunk-bits", "4"]
        subprocess.run(
            [sys.executable, "-m", "moetier.tools.main", "convert", folder, str(directory), *options], check=True
        )


def first_token(engine: Engine, ids: list[int]) -> tuple[float, int, list[int]]:
    """Return the seconds to the first token of an answer, how many tokens of the prompt were kept, and the answer."""
    began = time.perf_counter()
    stream = engine.stream(Request(tuple(ids), ANSWER, {"do_sample": False}))
    tokens = iter(stream)
    first = next(tokens)
    seconds = time.perf_counter() - began
    return seconds, stream.sequence.cached, [first, *tokens]


def compare_last_pass(model: Any, prompt: list[int], pairs: int) -> None:
    """Compare first turns, whose last tokens are a pass of their own, with first turns without it."""
    seconds: dict[int, list[float]] = {kv_cache.LAST_TOKENS: [], 0: []}
    for number in range(pairs):
        for last in [*seconds] if number % 2 else [*reversed(seconds)]:
            with patch.object(kv_cache, "LAST_TOKENS", last), Engine.of(model) as engine:
                seconds[last].append(first_token(engine, prompt)[0])
    own, together = seconds.values()
    print(f"first turn of {len(prompt):,}: {median(own):.3f} s, {median(together):.3f} s without the last pass:")
    print(f"  with it {times_as_fast(together, own)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokens", type=int, default=8000, help="of the first prompt (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=0)
    parser.add_argument("--ram")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if not arguments.directory.exists():
        make(arguments.directory)
    model, _ = moetier.load(arguments.directory, daemon=None, context=arguments.tokens + 1024, ram=arguments.ram)
    ids = torch.randint(4096, (arguments.tokens + QUESTION,), generator=torch.Generator().manual_seed(0)).tolist()
    prompt, question = ids[: arguments.tokens], ids[arguments.tokens :]
    if arguments.pairs:
        with model.tiers:
            compare_last_pass(model, prompt, arguments.pairs)
        return
    kept, anew, counts, are_equal = [], [], set(), []
    with model.tiers:
        for _ in range(arguments.rounds):
            with Engine.of(model) as engine:
                answer = first_token(engine, prompt)[2]
                second = [*prompt, *answer, *question]
                seconds, cached, after = first_token(engine, second)
                kept.append(seconds)
                counts.add((len(second) - cached, len(second)))
            with Engine.of(model) as engine:
                seconds, _, alone = first_token(engine, second)
                anew.append(seconds)
                are_equal.append(alone == after)
        with torch.no_grad():
            state = model(input_ids=torch.tensor([ids[:8]]), use_cache=True).get(CACHE)
        nbytes = sum(
            part.nbytes
            for layer in state.layers
            for parts in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {}))
            for part in parts.values()
        )
    spreads = [Spread.of(seconds) for seconds in (kept, anew)]
    for name, spread in zip(("kept", "anew"), spreads, strict=True):
        print(f"{name}  first token after {spread.text(digits=3)} s")
    print(f"computed behind the first turn: {' '.join(f'{new} of {total}' for new, total in counts)} tokens")
    print(f"kept takes {spreads[0].median / spreads[1].median:.2%} of anew; equal answers: {sum(are_equal)}")
    print(f"a snapshot has {nbytes:,} bytes, a page {model.tiers.kv.page_bytes:,}")


if __name__ == "__main__":
    sys.exit(main())
