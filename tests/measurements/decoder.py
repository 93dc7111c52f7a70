"""Program that decodes when a line arrives on standard input. ``sharing.py`` and ``busy.py`` start it.

It loads a model, decodes ``--warm`` tokens and prints "ready". For each line of input it decodes ``--tokens`` tokens
after the same prompt, and prints tokens, times and counters as one line of JSON. It ends when the input ends.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import torch
import transformers

import moetier


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--daemon")
    parser.add_argument("--ram")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--warm", type=int, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a prompt each; several are one batch")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    model, _ = moetier.load(arguments.directory, daemon=arguments.daemon, ram=arguments.ram, threads=arguments.threads)
    prompts = torch.stack(
        [
            torch.randint(3, model.config.vocab_size, (16,), generator=torch.Generator().manual_seed(seed))
            for seed in arguments.seeds
        ]
    )

    def decode(tokens: int) -> tuple[list[list[int]], list[float]]:
        """The new tokens, and seconds of each step behind the first."""
        times: list[float] = []

        class Clock(transformers.generation.streamers.BaseStreamer):  # type: ignore[misc]
            def put(self, value: torch.Tensor) -> None:
                times.append(time.perf_counter())

            def end(self) -> None:
                pass

        many = len(prompts) > 1  # streamers take one sequence; a batch is timed by its processor
        processors = [lambda ids, scores: (times.append(time.perf_counter()), scores)[1]] if many else []
        generated = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            streamer=None if many else Clock(),
            logits_processor=transformers.LogitsProcessorList(processors),
        )
        times = times[0 if many else 1 :]  # a streamer is shown the prompt before the first new token
        return generated[:, prompts.shape[1] :].tolist(), [end - begin for begin, end in itertools.pairwise(times)]

    with model.tiers:
        if arguments.warm:
            decode(arguments.warm)
        print("ready", flush=True)
        for _ in sys.stdin:
            before = model.tiers.host.stats()
            tokens, steps = decode(arguments.tokens)
            after = model.tiers.host.stats()
            results = {
                "tokens": tokens,
                "seconds": sum(steps),
                "steps": steps,
                "where": model.tiers.where,
                "hits": after.hits - before.hits,
                "misses": after.misses - before.misses,
                "discarded": after.discarded - before.discarded,
            }
            print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
