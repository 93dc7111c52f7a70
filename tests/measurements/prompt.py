"""Measure a long prompt through the engine: seconds and bytes read, decoding after it, and the next turn.

python tests/measurements/prompt.py DIR [--tokens N] [--conversations N] [--waiting N] [--beside]
    [--answer N] [--rounds N] [--prefill-chunk N] [--ram SIZE] [--kv-cache SIZE]

DIR is a model directory. Run it in a control group to limit its memory. The prompt has random tokens. A line
says how much longer a token takes after the prompt than in a short context: because of attention, which is what is left
once the cache is warm again, and because the prompt's experts have taken slots. With ``--ram 100%`` it is attention.

In place of one conversation's turns, ``--conversations`` computes the first turns of so many conversations, and then
their second turns in the same order; ``--waiting`` so many prompts that wait together, and the same one by one, with
answers of ``--answer`` tokens; and ``--beside`` a prompt beside the stream of another request. Decoding of prompts that
wait is measured from the time at which all of them have their first token until all have ended.
"""

from __future__ import annotations

import argparse
import itertools
import threading
import time
import warnings
from statistics import median, quantiles
from typing import Any

import torch

import moetier
from moetier import Engine, Request

AFTER, WARM, TURN = 32, 96, 24  # tokens decoded after the prompt, until the cache is warm, and of the next turn
SHORT = 64  # tokens of a short prompt


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

    def submit(self, ids: tuple[int, ...], tokens: int, times: list[float], end: threading.Event) -> None:
        """Begin to compute an answer of ``tokens`` tokens. Their times are appended to ``times``."""
        request = Request(ids, tokens, {"min_new_tokens": tokens, "do_sample": False})
        self._engine.submit(request, lambda *_: times.append(time.perf_counter()), lambda _: end.set())

    def read(self) -> float:
        """Return the GiB that the host tier has read."""
        return sum(stats.bytes_in for stats in self._model.tiers.stats() if stats.name == "host") / 2**30


def decoded(prompts: Prompts, stream: Any, count: int, what: str) -> tuple[list[int], float]:
    """Return the next ``count`` tokens of a stream, and the milliseconds of each, which are printed."""
    begin, read = time.perf_counter(), prompts.read()
    tokens = [next(stream) for _ in range(count)]
    seconds = (time.perf_counter() - begin) / count
    print(f"  {what}: {1 / seconds:.2f} tokens/s, {(prompts.read() - read) / count * 1024:.1f} MiB read a token")
    return tokens, 1000 * seconds


def turns(prompts: Prompts, tokens: int) -> None:
    """Measure a prompt, decoding after it, and the next turn."""
    stream = iter(prompts.stream(prompts.ids(SHORT), 1 + 2 * WARM))
    [next(stream) for _ in range(1 + WARM)]
    _, short = decoded(prompts, stream, WARM, f"in a context of {SHORT + WARM}")
    ids, read, begin = prompts.ids(tokens), prompts.read(), time.perf_counter()
    stream = iter(prompts.stream(ids, 1 + AFTER + 2 * WARM))
    answer = [next(stream)]
    first = time.perf_counter() - begin
    print(f"prompt of {tokens:,}: {first:.2f} s, {prompts.read() - read:.2f} GiB read")
    spans = (f"first {AFTER} tokens", AFTER), (f"tokens up to {AFTER + WARM}", WARM), ("further", WARM)
    parts = [decoded(prompts, stream, count, what) for what, count in spans]
    (_, after), *_, (_, warm) = parts
    print(
        f"  a token takes {short:.1f} ms in a short context, {warm - short:+.1f} ms behind {tokens:,} tokens "
        f"(attention, if as much is read), and {after - warm:+.1f} ms in the first {AFTER} (slots that the prompt took)"
    )
    begin = time.perf_counter()
    next(iter(prompts.stream((*ids, *answer, *(id for part, _ in parts for id in part), *prompts.ids(TURN)), 2)))
    print(f"next turn with {TURN} new tokens: {(time.perf_counter() - begin) / first:.4f} of the first token's time")


def conversations(prompts: Prompts, tokens: int, count: int) -> None:
    """Measure second turns by turns, each of which continues a conversation that all others have followed."""
    texts, seconds = [prompts.ids(tokens) for _ in range(count)], [list[float](), list[float]()]
    for times in seconds:
        for number, ids in enumerate(texts):
            begin = time.perf_counter()
            stream = iter(prompts.stream(ids, 8))
            answer = [next(stream)]
            times.append(time.perf_counter() - begin)
            texts[number] = (*ids, *answer, *stream, *prompts.ids(TURN))
    first, second = map(median, seconds)
    print(
        f"{count} conversations of {tokens:,} by turns: first token after {first:.2f} s; with {TURN + 1} new tokens "
        f"after {second:.3f} s (longest {max(seconds[1]):.3f} s): {second / first:.4f} of the first turn's time"
    )


def waiting(prompts: Prompts, tokens: int, count: int, answer: int) -> tuple[float, float]:
    """Compare prompts that wait together, and decoding after them, with the same one by one.

    Returns how many times as fast together are decoding, and the whole.
    """
    results = []
    for together in (False, True):
        begin, read, ends, times = time.perf_counter(), prompts.read(), [], list[list[float]]()
        for _ in range(count):
            of_one, end = list[float](), threading.Event()
            prompts.submit(prompts.ids(tokens), answer, of_one, end)
            times.append(of_one)
            ends.append(end)
            if not together:
                end.wait()
        for end in ends:
            end.wait()
        whole = time.perf_counter() - begin
        # decoding: from the time at which all prompts are computed, or of each by itself
        spans = [of_one[-1] - of_one[0] for of_one in times]
        last = max(of_one[0] for of_one in times)
        late = sum(at > last for of_one in times for at in of_one)
        rate = late / (max(of_one[-1] for of_one in times) - last) if together else count * (answer - 1) / sum(spans)
        results.append((whole, rate))
        print(
            f"{count} of {tokens:,} {'together' if together else 'one by one'}: {whole:.2f} s, "
            f"{prompts.read() - read:.2f} GiB read, decoding at {rate:.2f} tokens/s"
        )
    (alone, slow), (whole, fast) = results
    print(f"together: decoding {fast / slow:.2f} times as fast, the whole {alone / whole:.2f} times")
    return fast / slow, alone / whole


def beside(prompts: Prompts, engine: Engine, tokens: int) -> None:
    """Measure the gaps of a stream while a prompt is computed, and how long that takes."""
    begin = time.perf_counter()
    [*prompts.stream(prompts.ids(tokens), 1)]
    alone = time.perf_counter() - begin
    times = list[float]()
    request = Request(prompts.ids(64), 4000, {"min_new_tokens": 4000, "do_sample": False})
    other = engine.submit(request, lambda *_: times.append(time.perf_counter()), lambda _: None)
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
    parser.add_argument("--conversations", type=int, default=0)
    parser.add_argument("--waiting", type=int, default=0)
    parser.add_argument("--beside", action="store_true")
    parser.add_argument("--answer", type=int, default=1 + AFTER, help="tokens, with --waiting")
    parser.add_argument("--rounds", type=int, default=1, help="with --waiting")
    parser.add_argument("--prefill-chunk", type=int)
    parser.add_argument("--ram")
    parser.add_argument("--kv-cache")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    most = max(arguments.waiting, arguments.conversations, 2)
    model, _ = moetier.load(
        arguments.directory,
        daemon=None,
        ram=arguments.ram,
        context=arguments.tokens + (4100 if arguments.beside else 500),
        prefill_chunk=arguments.prefill_chunk,
        kv_cache=arguments.kv_cache,
        sequences=most if arguments.waiting or arguments.beside or arguments.conversations else 1,
    )
    with model.tiers, Engine.of(model, max_sequences=most) as engine:
        prompts = Prompts(model, engine)
        [*prompts.stream(prompts.ids(300), 4)]  # compiles
        print(f"{torch.get_num_threads()} threads, {[stats.slots for stats in model.tiers.stats()]} slots")
        if arguments.conversations:
            conversations(prompts, arguments.tokens, arguments.conversations)
        elif arguments.waiting:
            waiting(prompts, 300, arguments.waiting, AFTER)  # compiles
            print("that was to compile the code; now what counts:")
            results = [
                waiting(prompts, arguments.tokens, arguments.waiting, arguments.answer) for _ in range(arguments.rounds)
            ]
            decoding, whole = map(median, zip(*results, strict=True))
            print(f"medians: decoding {decoding:.2f} times as fast, the whole {whole:.2f} times")
        elif arguments.beside:
            beside(prompts, engine, arguments.tokens)
        else:
            turns(prompts, arguments.tokens)


if __name__ == "__main__":
    main()
