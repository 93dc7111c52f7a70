"""``moetier generate DIR PROMPT``: streams text, then says what it cost."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path

from moetier.runtime.config import LOOK_AHEAD, SPECULATE, format_bytes
from moetier.tiers.errors import ConfigError

from .decoding import PREFILL_CHUNK, add_decoding_arguments, chunks_of, decoding_of, encode
from .report import Timing, learning_report, shares_report, speculation_report, tier_json, tier_report
from .resources import add_resource_arguments, resources_of
from .startup import uncollected

HELP = "generate text from a model directory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="a model directory, made by moetier convert")
    parser.add_argument("prompt", nargs="?", help="the text to go on from; read from standard input without it")
    parser.add_argument("--json", action="store_true", help="print one JSON object: text, timing and tiers")
    add_decoding_arguments(parser, new_tokens=256)
    parser.add_argument(
        "--prefill-chunk",
        type=int,
        default=PREFILL_CHUNK,
        metavar="N",
        help="tokens of a prompt that are computed together, where the model can go on in the middle of one: each "
        "expert is read once for all of them (default: %(default)s)",
    )
    parser.add_argument(
        "--speculate",
        choices=SPECULATE,
        default="auto",
        help="promote experts beforehand that the next layers' gates guess: auto, while it is measured to pay "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--look-ahead", type=int, default=LOOK_AHEAD, metavar="N", help="layers to guess (default: %(default)s)"
    )
    parser.add_argument(
        "--prefetch",
        type=int,
        metavar="N",
        help="experts of a block to promote on a guess, at most (default: as many as are worth it)",
    )
    add_resource_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    resources = resources_of(
        arguments, speculate=arguments.speculate, look_ahead=arguments.look_ahead, prefetch=arguments.prefetch
    )
    decoding = decoding_of(arguments)
    if arguments.prefill_chunk < 1:
        raise ConfigError(f"--prefill-chunk is {arguments.prefill_chunk}.", "Give 1 or more.")
    prompt = sys.stdin.read() if arguments.prompt is None else arguments.prompt
    if not prompt:
        raise ConfigError("The prompt is empty.", "Give it as an argument, or on standard input.")

    with uncollected():
        import torch
        import transformers

        from moetier.runtime.generate import load
        from moetier.runtime.streamer import TimedStreamer

        transformers.utils.logging.disable_progress_bar()
        start = time.perf_counter()
        model, tokenizer = load(arguments.directory, **resources)
        load_seconds = time.perf_counter() - start
    with model.tiers:
        if tokenizer is None:
            raise ConfigError(f"{arguments.directory} has no tokenizer.", "Copy the source's tokenizer files into it.")
        inputs = encode(tokenizer, prompt, model.device)
        torch.manual_seed(arguments.seed)
        streamer = TimedStreamer(tokenizer, echo=not arguments.json)
        chunks = chunks_of(model, inputs["input_ids"].shape[1], arguments.prefill_chunk)
        model.generate(**inputs, **decoding, **chunks, streamer=streamer)
        first_token, total = streamer.seconds
        timing = Timing(inputs["input_ids"].shape[1], streamer.tokens, first_token, total)
        tiers, shares = model.tiers.stats(), model.tiers.shares()
        speculation = model.tiers.speculation.stats() if model.tiers.speculation is not None else None
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB

    if arguments.json:
        print(
            json.dumps(
                {
                    "prompt": prompt,
                    "text": streamer.text,
                    "seed": arguments.seed,
                    "load_s": load_seconds,
                    "peak_bytes": peak_bytes,
                    "experts": model.tiers.where,
                    "shares": [asdict(share) for share in shares],
                    **timing.to_json(),
                    "tiers": {stats.name: tier_json(stats, timing) for stats in tiers},
                    "speculation": speculation.to_json() if speculation is not None else None,
                    "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                }
            )
        )
    else:
        sys.stdout.flush()
        head = (
            f"load     {load_seconds:.2f} s\nmemory   {format_bytes(peak_bytes)} at its peak, slots included\n"
            f"experts  of {model.tiers.where}"
        )
        print(f"\n{head}\n{tier_report(timing, tiers)}", file=sys.stderr)
        if shares:
            print(shares_report(shares), file=sys.stderr)
        if speculation is not None:
            print(speculation_report(speculation, tiers), file=sys.stderr)
        if model.tiers.learns:
            print(learning_report(tiers[0]), file=sys.stderr)
    return 0
