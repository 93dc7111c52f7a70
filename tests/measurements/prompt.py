"""Measure a long prompt through the engine: seconds and bytes read, decoding after it, and the next turn.

python tests/measurements/prompt.py DIR [--tokens N] [--waiting N] [--beside] [--prefill-chunk N] [--ram SIZE]

DIR is a model directory. Run it in a control group to limit its memory. The prompt has random tokens. ``--waiting``
computes so many prompts of that length that wait together in place of the turns, ``--beside`` one beside the stream of
another request.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from statistics import quantiles
from typing import Any

import torch

import moetier
from moetier import Engine, Request

AFTER, WARM, TURN = 32, 96, 24  # tokens decoded after the prompt, until the cache is warm, and of the next turn


class Prompts:
    """Prompts of random tokens, and what the host tier has read."""

    def __init__(self, model: Any, engine: Engine) -> None:
        self._model = model
        self._engine = engine
        self._random = torch.Generator().manual_seed(0)

    def ids(self, tokens: int) -> tuple[int, ...]:
        """Return a prompt of ``tokens`` tokens."""
        return tuple(torch.randint(5, 1000, (tokens,), generator=self._random).tolist())

    def stream(self, ids: tuple[int, ...], tokens: int) -> Any:
        """Begin to compute an answer of exactly ``tokens`` tokens."""
        return self._engine.stream(Request(ids, tokens, {"min_new_tokens": tokens, "do_sample": False}))

    def read(self) -> float:
        """Return the GiB that the host tier has read."""
        return sum(stats.bytes_in for stats in self._model.tiers.stats() if stats.name == "host") / 2**30


def turns(prompts: Prompts, tokens: int) -> None:
    """Measure a prompt, decoding after it, and the next turn."""
    ids, read, begin = prompts.ids(tokens), prompts.read(), time.perf_counter()
    stream = iter(prompts.stream(ids, 1 + AFTER + 2 * WARM))
    answer = [next(stream)]
    first = time.perf_counter() - begin
    print(f"prompt of {tokens:,}: {first:.2f} s, {prompts.read() - read:.2f} GiB read")
    for what, count in ((f"first {AFTER} tokens", AFTER), (f"tokens up to {AFTER + WARM}", WARM), ("further", WARM)):
        begin, read = time.perf_counter(), prompts.read()
        answer += [next(stream) for _ in range(count)]
        seconds = (time.perf_counter() - begin) / count
        print(f"  {what}: {1 / seconds:.2f} tokens/s, {(prompts.read() - read) / count * 1024:.1f} MiB a token")
    begin = time.perf_counter()
    next(iter(prompts.stream((*ids, *answer, *prompts.ids(TURN)), 2)))
    print(f"next turn with {TURN} new tokens: {(time.perf_counter() - begin) / first:.4f} of the first token's time")


def waiting(prompts: Prompts, tokens: int, count: int) -> None:
    """Compare one prompt with ``count`` that wait together."""
    for number in (1, count):
        begin, read = time.perf_counter(), prompts.read()
        for stream in [prompts.stream(prompts.ids(tokens), 1) for _ in range(number)]:
            list(stream)
        print(f"{number} of {tokens:,}: {time.perf_counter() - begin:.2f} s, {prompts.read() - read:.2f} GiB read")


def beside(prompts: Prompts, engine: Engine, tokens: int) -> None:
    """Measure the gaps of a stream while a prompt is computed, and how long that takes."""
    begin = time.perf_counter()
    [*prompts.stream(prompts.ids(tokens), 1)]
    alone = time.perf_counter() - begin
    times = list[float]()
    request = Request(prompts.ids(64), 4000, {"min_new_tokens": 4000, "do_sample": False})
    other = engine.submit(request, lambda _: times.append(time.perf_counter()), lambda _: None)
    while len(times) < 20:
        time.sleep(0.05)
    begin = time.perf_counter()
    [*prompts.stream(prompts.ids(tokens), 1)]
    end = time.perf_counter()
    other.cancel()
    seen = [at for at in times if begin <= at <= end]
    gaps = [two - one for one, two in itertools.pairwise(seen)]
    print(
        f"prompt of {tokens:,}: {alone:.2f} s alone, {end - begin:.2f} s beside a stream, whose gaps were "
        f"{quantiles(gaps)[1]:.3f} s (median), {quantiles(gaps, n=100)[98]:.3f} s (p99), {max(gaps):.3f} s (longest)"
    )


def main() -> None:
    """Parse the arguments, and print what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--waiting", type=int, default=0)
    parser.add_argument("--beside", action="store_true")
    parser.add_argument("--prefill-chunk", type=int)
    parser.add_argument("--ram")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    most = max(arguments.waiting, 2)
    model, _ = moetier.load(
        arguments.directory,
        daemon=None,
        ram=arguments.ram,
        context=arguments.tokens + (4100 if arguments.beside else 500),
        prefill_chunk=arguments.prefill_chunk,
        sequences=most if arguments.waiting or arguments.beside else 1,
    )
    with model.tiers, Engine.of(model, max_sequences=most) as engine:
        prompts = Prompts(model, engine)
        [*prompts.stream(prompts.ids(300), 4)]  # compiles
        print(f"{torch.get_num_threads()} threads, {[stats.slots for stats in model.tiers.stats()]} slots")
        if arguments.waiting:
            waiting(prompts, arguments.tokens, arguments.waiting)
        elif arguments.beside:
            beside(prompts, engine, arguments.tokens)
        else:
            turns(prompts, arguments.tokens)


if __name__ == "__main__":
    main()
