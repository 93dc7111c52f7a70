"""``moetier generate DIR PROMPT``: stream generated text, then report its timing, hits and memory."""

from __future__ import annotations

import argparse
import json
import resource
import sys
from typing import Any

from moetier.runtime.generation.decoding import behind, encode, warn_if_cut, within_context
from moetier.runtime.model.context import first_ids, longest_context
from moetier.tiers.errors import ConfigError
from moetier.tools.cli.arguments import (
    add_decoding_arguments,
    add_prefill_argument,
    add_resource_arguments,
    add_speculation_arguments,
    decoding_of,
    resources_of,
)
from moetier.tools.cli.daemon_reads import DaemonWatch
from moetier.tools.cli.failure import show
from moetier.tools.cli.loading import loaded
from moetier.tools.cli.parser import add_json, add_model_argument, check_utf8, show_first, utf8
from moetier.tools.cli.progress import prompt_bar
from moetier.tools.cli.report import Timing, details, line, run_json, slow_line, summary

EXAMPLES = (
    'moetier generate ./mixtral-4bit "To be, or not to be" --ram 6GiB',
    "moetier generate Qwen/Qwen3-30B-A3B:4bit --max-new-tokens 100 < prompt.txt",
)

AT_FIRST = 1 << 20  # characters of standard input that are read before loading; few prompts have more


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier generate`."""
    add_model_argument(parser)
    parser.add_argument(
        "prompt", nargs="?", type=utf8, metavar="PROMPT", help="the text to continue (default: standard input)"
    )
    add_json(parser, "one JSON object: text, timing and tiers")
    parser.add_argument("--verbose", action="store_true", help="report all counters, not only the main figures")
    add_decoding_arguments(parser, new_tokens=256)
    add_prefill_argument(parser)
    add_speculation_arguments(parser)
    add_resource_arguments(parser)
    show_first(parser, "--ram", "--max-new-tokens", "--temperature")


def run(arguments: argparse.Namespace) -> None:
    """Run the command. Raises MoetierError."""
    from moetier.tools.rates.hardware import CpuTimes, busy

    resources = resources_of(arguments)
    decoding = decoding_of(arguments)
    if arguments.prompt is None and sys.stdin.isatty():
        print("Type the prompt, and end it with Enter and Ctrl-D:", file=sys.stderr, flush=True)
    prompt = _text_of_input(AT_FIRST) if arguments.prompt is None else arguments.prompt
    if not prompt:
        raise ConfigError("The prompt is empty.", "Give a prompt as an argument, or on standard input.")

    times = CpuTimes.read()
    with loaded(arguments.directory, resources) as (model, tokenizer, load_seconds):
        import torch
        import transformers

        if arguments.prompt is None and len(prompt) == AT_FIRST:
            prompt = read_on(prompt, model, tokenizer)
        watch = DaemonWatch(model.tiers)
        text, timing = stream_text(model, tokenizer, prompt, decoding, arguments.seed, echoes=not arguments.json)
        reads = watch.end()
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
        report = run_json(timing, model.tiers, reads)
        short = summary(timing, model.tiers, reads, load=load_seconds, peak_bytes=peak_bytes)
        slow = slow_line(timing, model.tiers, arguments.ram)
        is_alone = model.tiers.origin.daemon is None and not model.tiers.origin.shares()  # daemons work for it, too
        if is_alone and (said := busy(times.used_by_others(), torch.get_num_threads())):
            short += "\n" + line("busy", f"{said} meanwhile: without them it may be twice as fast; run it again then")
        short += f"\n{slow}" if slow else ""
        rest = f"\n\n{details(timing, model.tiers)}" if arguments.verbose else ""

    if arguments.json:
        head = {"prompt": prompt, "text": text, "seed": arguments.seed}
        cost = {"load_s": load_seconds, "peak_bytes": peak_bytes}
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        print(json.dumps({**head, **cost, **report, "versions": versions}))
    else:
        sys.stdout.flush()
        print(f"\n{short}{rest}", file=sys.stderr)


def stream_text(
    model: Any, tokenizer: Any, prompt: str, decoding: dict[str, Any], seed: int, *, echoes: bool
) -> tuple[str, Timing]:
    """Generate text that continues ``prompt``, and print it meanwhile if ``echoes``. Return the text and its timing.

    ``decoding`` is what ``decoding_of`` returns. Raises MoetierError.
    """
    import torch

    from moetier.runtime.engine.engine import Engine
    from moetier.runtime.engine.sampling import generates_itself
    from moetier.runtime.engine.sequence import Request
    from moetier.runtime.generation.streamer import TimedStreamer

    inputs = encode(model, tokenizer, prompt)
    tokens = inputs["input_ids"].shape[1]
    streamer = TimedStreamer(tokenizer, echo=show if echoes else None)
    given = dict(within_context(model, tokens, decoding))
    try:
        if generates_itself(model):
            torch.manual_seed(seed)
            streamer.take(model.generate(**inputs, **behind(tokens, given))[0, tokens:].tolist())
        else:
            most = given.pop("max_new_tokens")
            with Engine.of(model, tokens=tokens + most) as engine:
                stream = engine.stream(Request(tuple(inputs["input_ids"][0].tolist()), most, given, seed))
                with prompt_bar(model, stream.sequence):
                    streamer.take(stream)
    except BaseException:
        if streamer.text and echoes:
            print(flush=True)  # so that the error message begins on a line of its own
        raise
    warn_if_cut(model, tokens, streamer.tokens, decoding)
    return streamer.text, Timing(tokens, streamer.tokens, *streamer.seconds)


def _text_of_input(most: int) -> str:
    """Read up to ``most`` characters from standard input. Raises ConfigError if they are not UTF-8."""
    return check_utf8(sys.stdin.read(most), "Standard input")  # in the C locale, Python accepts any bytes


def read_on(prompt: str, model: Any, tokenizer: Any) -> str:
    """Return ``prompt`` with the rest of standard input. Stop reading once the prompt exceeds the model's context."""
    most = longest_context(model.config)
    while most is None or len(first_ids(tokenizer, prompt, most)) < most:
        piece = _text_of_input(3 * len(prompt))
        if not piece:
            break
        prompt += piece
    return prompt
