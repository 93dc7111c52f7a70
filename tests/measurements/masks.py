"""Measure the cost of answers of a given form: what a grammar takes of a step, and microseconds for a mask.

    python tests/measurements/masks.py DIR --tokens 200 --rounds 9

An engine answers with a grammar and without, by turns: random tokens, as the models of measurements have random
weights. The time that a step waits for its mask is measured in the step, for the first token of an answer apart. Each
pair of answers also gives what the grammar adds to a step, whatever the reason; that has the noise of whole steps. Then
the masks of such answers are made alone. ``--thread``: all masks are made on the other thread, as slow ones are.
``--vocabulary N``: random words are added to the tokenizer until it has N tokens.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import moetier
from moetier.runtime.engine import constraint, sampling

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


class Timed(constraint.Constraint):
    """Constraint that notes the seconds of each token in the step."""

    answers: ClassVar[list[list[float]]] = []

    def __init__(self, grammar: Any) -> None:
        super().__init__(grammar)
        self._taken = list[float]()
        self.answers.append(self._taken)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Note the seconds of a mask."""
        began = time.perf_counter()
        bounded = super().__call__(input_ids, scores)
        self._taken.append(time.perf_counter() - began)
        return bounded

    def advance(self, token: int) -> None:
        """Add the seconds of a token that was chosen."""
        began = time.perf_counter()
        super().advance(token)
        self._taken[-1] += time.perf_counter() - began


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


def spread(seconds: list[float]) -> str:
    """Return the median of times, with the least and the most, in microseconds."""
    middle, least, most = (1e6 * value for value in (statistics.median(seconds), min(seconds), max(seconds)))
    return f"{middle:.0f} us ({least:.0f} to {most:.0f})"


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--thread", action="store_true")
    parser.add_argument("--vocabulary", type=int, default=0)
    options = parser.parse_args()
    if options.thread:
        constraint.QUICK_SECONDS = 0.0
    sampling.Constraint = Timed  # type: ignore[misc]
    model, tokenizer = moetier.load(options.directory, ram="100%")
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
    step = statistics.median(found["free"])
    waits = [statistics.mean(taken[1:]) for taken in Timed.answers[1:]]
    firsts = [taken[0] for taken in Timed.answers]
    added = [formed - free for formed, free in zip(found["formed"], found["free"], strict=True)]
    print(
        f"a step: {spread(found['free'])}; it waits for a mask: {spread(waits)}, {statistics.median(waits) / step:.1%}"
    )
    print(f"the first mask: {spread(firsts)}")
    print(f"a grammar adds, in pairs of answers: {spread(added)}, {statistics.median(added) / step:+.1%}")
    taken_alone = sorted(masks_alone(grammar, tokenizer.eos_token_id or 0, options.tokens * options.rounds))
    middle, late = taken_alone[len(taken_alone) // 2], taken_alone[len(taken_alone) * 99 // 100]
    print(f"a mask of {len(tokenizer):,} tokens: median {middle * 1e6:.0f} us, 99 % within {late * 1e6:.0f} us")


if __name__ == "__main__":
    main()
