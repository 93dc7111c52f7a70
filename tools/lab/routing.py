"""Routing like a trained model's, of models with random weights.

A trained model uses some experts more often than others while a text keeps to its topic. A random one that decodes
random tokens does not: its experts are all equally likely, and a cache of them hits by chance alone. So here the tokens
have topics. Token t is of topic t mod TOPICS; a part (``share``) of its embedding is its topic's direction, the rest is
its own. The token ids that such a model is fed keep to a topic for a while, and within it follow Zipf's law. Gates are
random: what they read in the residual stream is the token, and its topic.
"""

from __future__ import annotations

import bisect
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetier.tools.cli.report import table

if TYPE_CHECKING:
    from moetier.runtime.trace.trace import Trace

TOPICS = 64
TOKENS_FILE = "tokens.json"
TOKENS = 8192  # in it
TRACED = 1024  # of them, from the first on, are what a curve is measured on


@dataclass(frozen=True)
class Routing:
    """What the routing of a geometry is made by, and what it is to look like."""

    share: float  # of the variance of an embedding: its topic's
    stay: float  # how likely the next token is of the same topic
    model: str  # whose curve it is
    curve: Mapping[int, float]  # hit ratio of an LRU with so many slots for each block, cold at the start


MIXTRAL = {1: 0.166, 2: 0.327, 3: 0.453, 4: 0.574, 5: 0.689, 6: 0.799, 7: 0.902, 8: 0.995}
ROUTINGS = {
    "mixtral-4L": Routing(0.05, 0.85, "Mixtral-8x7B-Instruct", MIXTRAL),
    "qwen3-8L": Routing(0.8, 0.96, "Qwen3-30B-A3B", {8: 0.428, 16: 0.611, 32: 0.807, 64: 0.912}),
    # nobody's trace: Qwen3's curve at the same multiples of the experts that a token uses
    "fine-4L": Routing(0.8, 0.97, "as Qwen3-30B-A3B", {10: 0.428, 20: 0.611, 40: 0.807, 80: 0.912}),
}


def token_ids(geometry: str, vocabulary: int, *, count: int = TOKENS, seed: int = 0) -> list[int]:
    """The fixed tokens that every engine is fed."""
    numbers = random.Random(f"{geometry} {seed}")
    ranks = range(1, vocabulary // TOPICS)  # the first tokens of a vocabulary are no words
    chances = list(itertools.accumulate(1 / rank for rank in ranks))
    topic, found = numbers.randrange(TOPICS), []
    for _ in range(count):
        if numbers.random() >= ROUTINGS[geometry].stay:
            topic = numbers.randrange(TOPICS)
        rank = ranks[bisect.bisect(chances, numbers.random() * chances[-1], hi=len(ranks) - 1)]
        found.append(topic + TOPICS * rank)
    return found


def read_tokens(folder: Path) -> list[int]:
    """Of a folder that ``moetier synthetic`` made: a checkpoint, or the model directory beside it."""
    ids: list[int] = json.loads((folder / TOKENS_FILE).read_bytes())["token_ids"]
    return ids


def record_tokens(model: Any, ids: Sequence[int]) -> Trace:
    """Which experts a loaded model uses for these tokens, whatever it would have said itself. A trace without prompt:
    to its reader they were decoded one by one."""
    import torch

    from moetier.runtime.trace.recorder import Recorder

    with torch.inference_mode(), Recorder(model, look_ahead=1) as recorder:
        model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1)
        recorder.end_sequence(ids, n_prefill=0)
        return recorder.trace()


def lru_curve(trace: Trace, slots: Sequence[int]) -> dict[int, float]:
    """Hit ratios, by experts of each block that are cached."""
    from .simulation import simulate

    return {number: simulate(trace, "lru", number).decoding.hit_ratio for number in slots}


def curve_table(geometry: str, trace: Trace) -> str:
    """The curve beside the one that it is to look like."""
    routing = ROUTINGS[geometry]
    found = lru_curve(trace, list(routing.curve))
    chance = trace.num_experts[0]
    rows = [["slots", *map(str, found)]]
    rows += [[name, *(f"{ratio:.3f}" for ratio in ratios)] for name, ratios in (
        (geometry, found.values()), (routing.model, routing.curve.values()), ("chance", (n / chance for n in found)),
    )]  # fmt: skip
    return f"hit ratio of an LRU in each block, {trace.tokens} tokens\n{table(rows)}"
