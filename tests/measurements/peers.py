"""Compare moetier with llama.cpp and accelerate's disk offload: same tokens, same memory limits, alternating runs.

    python tests/measurements/peers.py DIR --gguf FILE

``gguf_export.py`` makes FILE from the checkpoint that DIR was converted from. The extra ``peers`` installs the other
engines.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from engines import Run, accelerate_decode, llama_run, run_script

from moetier.runtime.config import TIER_OPTIONS, Size
from moetier.runtime.machine.threads import usable_cpus
from moetier.tiers.options import COUNT
from moetier.tiers.text import format_bytes
from moetier.tools.bench.model import Work
from moetier.tools.bench.output import Spread, add_bench_arguments, alternate, begin_bench, report
from moetier.tools.bench.sandbox import fresh
from moetier.tools.bench.token_ids import add_token_arguments
from moetier.tools.cli.arguments import add_option, size
from moetier.tools.cli.parser import DIRECTORY, UsageError, directory
from moetier.tools.rates.hardware import Machine

EXAMPLES = ("python tests/measurements/peers.py ./mixtral-4bit --gguf mixtral-q4_0.gguf --limit 16GiB",)

Engine = Callable[[], Run]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the script."""
    parser.add_argument("directory", type=directory, metavar="DIR", help=DIRECTORY)
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same model for llama.cpp")
    parser.add_argument("--checkpoint", type=Path, metavar="SRC", help="the same model for accelerate")
    parser.add_argument("--limit", type=size, metavar="SIZE", help="memory limit of each engine (default: none)")
    parser.add_argument(
        "--checkpoint-limit",
        type=size,
        metavar="SIZE",
        help="memory limit of accelerate, which reads bf16 (default: --limit)",
    )
    parser.add_argument(
        "--ram", type=size, metavar="SIZE", help="memory for moetier's experts (default: as much as generate takes)"
    )
    parser.add_argument(
        "--tokens", type=COUNT, default=32, metavar="N", help="tokens to measure (default: %(default)s)"
    )
    parser.add_argument(
        "--warm", type=COUNT, default=16, metavar="N", help="steps before measuring (default: %(default)s)"
    )
    parser.add_argument(
        "--prefill", action="store_true", help="feed the measured tokens as one prompt; not with accelerate"
    )
    add_token_arguments(parser)
    add_option(parser, TIER_OPTIONS["threads"])
    add_bench_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; return 0. Raises MoetierError."""
    began = begin_bench(arguments)
    if arguments.gguf is None and (arguments.checkpoint is None or arguments.prefill):
        raise UsageError("There is no peer to measure.", "Give --gguf FILE; or --checkpoint SRC, without --prefill.")
    threads = arguments.threads or usable_cpus()
    pieces = [arguments.warm, arguments.tokens] if arguments.prefill else [1] * (arguments.warm + arguments.tokens)
    work = Work.of(arguments, pieces, measured=1 if arguments.prefill else arguments.tokens)
    measured = alternate(arguments.rounds, engines_of(arguments, work, threads))
    own = Spread.of(run.tokens_per_s for run in measured["moetier"])
    rows, results = [["engine", "tokens/s", "moetier is faster by", "peak in its group"]], list[dict[str, Any]]()
    for name, runs in measured.items():
        speed, peak = Spread.of(run.tokens_per_s for run in runs), max(run.peak_bytes for run in runs)
        rows.append([name, speed.text(), f"{own.median / speed.median:.2f}", format_bytes(peak)])
        results.append(
            {
                "engine": name,
                "tokens_per_s": speed.to_json(),
                "ratio": own.median / speed.median,
                "peak_bytes": peak,
            }
        )
    limit = "none" if arguments.limit is None else arguments.limit
    notes = [f"limit    {limit}; {'a prompt' if arguments.prefill else 'steps'} of {work.source}"]
    machine = Machine.here(threads=threads, place=arguments.directory)
    return report(
        arguments, began, machine, rows, results, notes=notes, limit=arguments.limit, prefill=arguments.prefill
    )


def engines_of(arguments: argparse.Namespace, work: Work, threads: int) -> dict[str, Engine]:
    """Return the engines by name. llama.cpp repacks weights only where it has all the memory that it wants."""
    (ids,) = work.ids
    limit = _bytes(arguments.limit)
    common = {"threads": threads, "warmup": arguments.warm}
    engines: dict[str, Engine] = {"moetier": partial(_moetier, arguments, work, threads, limit)}
    if arguments.gguf is not None:
        llama = partial(llama_run, arguments.gguf, ids, together=arguments.prefill, limit=limit, **common)
        engines["llama.cpp, mapped"] = llama
        if limit is None:
            engines["llama.cpp, repacked"] = partial(llama, repack=True)
    if arguments.checkpoint is not None and not arguments.prefill:
        theirs = _bytes(arguments.checkpoint_limit) or limit
        engines["accelerate, bf16"] = partial(accelerate_decode, arguments.checkpoint, ids, limit=theirs, **common)
    return engines


def _moetier(arguments: argparse.Namespace, work: Work, threads: int, limit: int | None) -> Run:
    feed = {"work": "model", "directory": str(arguments.directory.resolve()), "threads": threads, "ram": arguments.ram}
    files = [path for path in arguments.directory.rglob("*") if path.is_file()]
    result = fresh(feed | work.to_json(), limit=limit, files=files)
    return Run(
        work.measured * work.step_tokens, sum(result["seconds"]), result["group_peak_bytes"] or result["peak_bytes"]
    )


def _bytes(limit: str | None) -> int | None:
    from moetier.runtime.machine.memory import machine_memory

    return None if limit is None else Size.parse(limit).of(machine_memory())


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line ``words``, by default sys.argv's, and return the exit code."""
    return run_script(__name__, "Compare moetier with llama.cpp and accelerate's disk offload.", words)


if __name__ == "__main__":
    sys.exit(main())
