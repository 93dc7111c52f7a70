"""Measure the cost of answers of a given form: microseconds for a mask, and the share of a step.

    python tests/measurements/masks.py DIR --tokens 200 --rounds 5

An engine answers with a grammar and without, by turns: random tokens, as the models of measurements have random
weights. Then the masks of such answers are made alone. ``--vocabulary N``: random words are added to the tokenizer
until it has N tokens.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import moetier

SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "size": {"type": "integer"},
            "kind": {"enum": ["monk", "priest", "notary"]},
            "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z-]+$"}},
        },
        "required": ["name", "size", "kind", "tags"],
        "additionalProperties": False,
    },
    "minItems": 1000,
}


def larger(tokenizer: Any, vocabulary: int) -> Any:
    """Return a byte-level tokenizer with the same tokens, and random words up to a number of tokens."""
    random_, words = random.Random(0), dict(tokenizer.get_vocab())
    letters = [*bytes_to_unicode().values()]
    while len(words) < vocabulary:
        words.setdefault("".join(random_.choices(letters[:94], k=random_.randrange(3, 12))), len(words))
    made = Tokenizer(models.BPE(words, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=tokenizer.eos_token)


def seconds_per_token(engine: moetier.Engine, request: moetier.Request) -> float:
    """Answer a request, and return the seconds that each token but the first took."""
    stream = iter(engine.stream(request))
    next(stream)
    began = time.perf_counter()
    count = sum(1 for _ in stream)
    return (time.perf_counter() - began) / max(count, 1)


def masks_alone(grammar: Any, end: int, tokens: int) -> list[float]:
    """Make the masks of an answer of random tokens, and return the seconds that each took with its token."""
    random_, matcher, taken = random.Random(0), grammar.matcher(), list[float]()
    while len(taken) < tokens:
        began = time.perf_counter()
        bounds = matcher.bounds({end})
        taken.append(time.perf_counter() - began)
        token = random_.choice((bounds > 0).nonzero().flatten().tolist())
        began = time.perf_counter()
        matcher.consume(token)
        taken[-1] += time.perf_counter() - began
    return taken


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=0)
    options = parser.parse_args()
    model, tokenizer = moetier.load(options.directory)
    assert tokenizer is not None
    ids = tuple(tokenizer("Chi era don Abbondio?")["input_ids"])
    if options.vocabulary:
        tokenizer = larger(tokenizer, options.vocabulary)
    grammar = moetier.GrammarCompiler(tokenizer).compile(moetier.Grammar.json_schema(SCHEMA))
    found: dict[str, list[float]] = {"free": [], "formed": []}
    with model.tiers, moetier.Engine.of(model) as engine:
        for number in range(-1, options.rounds):  # the first round warms up
            for name, form in ("free", None), ("formed", grammar):
                decoding = {"do_sample": True, "temperature": 1.0, "eos_token_id": None}
                request = moetier.Request(ids, options.tokens, decoding, seed=number + 1, grammar=form)
                taken = seconds_per_token(engine, request)
                if number >= 0:
                    found[name].append(taken)
    free, formed = (statistics.median(found[name]) for name in ("free", "formed"))
    print(f"a step: {free * 1e3:.3f} ms; with a grammar {formed * 1e3:.3f} ms ({formed / free - 1:+.1%})")
    taken_alone = sorted(masks_alone(grammar, tokenizer.eos_token_id or 0, options.tokens * options.rounds))
    middle, late = taken_alone[len(taken_alone) // 2], taken_alone[len(taken_alone) * 99 // 100]
    print(f"a mask of {len(tokenizer):,} tokens: median {middle * 1e6:.0f} us, 99 % within {late * 1e6:.0f} us")


if __name__ == "__main__":
    main()
