"""Measure prompts whose keys and values are on disk: after a restart, with many conversations, and decoding meanwhile.

    python tests/measurements/kept_pages.py DIR [--tokens N] [--conversations N --held N] [--decode] [--ram SIZE]
        [--limit SIZE] [--daemon FOLDER]

DIR is a model directory. Each run is a process of its own, in a control group with ``--limit`` of memory; the page
cache is dropped before one that reads, if this user may do that. What is measured begins once the model is loaded, and
the experts that fit are in memory, in that of the daemon in FOLDER with ``--daemon``. Without a further option, a
prompt of N tokens gets an answer in one process, and another one computes the next turn. ``--conversations`` computes
so many prompts while memory has room for ``--held`` of them, and then the next turn of each. ``--decode`` compares
decoding beside the writing of a prompt's pages with decoding alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pairs import times_as_fast
from transformers import AutoConfig

import moetier
from moetier import Engine, Request
from moetier.runtime.config import Size
from moetier.runtime.engine.pages.page_folder import PageOptions
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS
from moetier.runtime.machine.memory import machine_memory
from moetier.runtime.model.budgets import kv_cache_bytes
from moetier.tiers.text import format_bytes
from moetier.tools.bench.sandbox import memory_group

ANSWER, TURN = 20, 24  # tokens of an answer, and of the next turn
STEPS = 40  # tokens that are decoded beside writing, and as many alone: the first ones after a prompt are slower


def ids_of(seed: int, tokens: int) -> tuple[int, ...]:
    """Return random tokens."""
    return tuple(torch.randint(5, 1000, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist())


def first(engine: Engine, ids: tuple[int, ...], tokens: int = ANSWER) -> tuple[float, list[int], int]:
    """Compute an answer. Return the seconds until its first token, its tokens, and cached tokens of the prompt."""
    begin = time.perf_counter()
    stream = engine.stream(Request(ids, tokens, {"min_new_tokens": tokens, "do_sample": False}))
    answer = iter(stream)
    answered = [next(answer)]
    seconds = time.perf_counter() - begin
    return seconds, [*answered, *answer], stream.sequence.cached


def finish_writing(engine: Engine) -> None:
    """Wait until all pages are written."""
    while engine.saved is not None and engine.saved.writer.is_writing:
        time.sleep(0.05)


def drop_page_cache() -> None:
    """Drop what the system has cached of files, if this user may."""
    subprocess.run(["sync"], check=True)
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")


def load_experts(model: Any) -> None:
    """Wait until no more experts are read ahead."""
    ready = -1
    while (now := model.tiers.stats()[0].ready) != ready:
        ready = now
        time.sleep(1.0)


def turns(engine: Engine, arguments: argparse.Namespace) -> None:
    """Compute the first turn of each conversation, or the second."""
    number = arguments.conversations or 1
    times = []
    for seed in range(1, number + 1):
        ids = ids_of(seed, arguments.tokens)
        path = Path(arguments.folder, f"{seed}.answer")
        if arguments.part == "second":
            ids = (*ids, *map(int, path.read_text().split()), *ids_of(1000 + seed, TURN))
        seconds, answer, cached = first(engine, ids)
        times.append(seconds)
        if arguments.part != "second":
            path.write_text(" ".join(map(str, answer)))
        if number == 1 or seed <= 3:
            print(
                f"  {arguments.part} turn: {len(ids):,} tokens, {cached:,} of them cached, first token {seconds:.3f} s"
            )
    print(f"{arguments.part} turns: median {median(times):.3f} s, longest {max(times):.3f} s", flush=True)
    if number > 1:
        print(f"  in order: {' '.join(f'{seconds:.3f}' for seconds in times)}")
    finish_writing(engine)
    if engine.saved is not None:
        print(f"  {engine.saved.traffic()}")


def decode(engine: Engine, other: Engine, arguments: argparse.Namespace) -> None:
    """Compare decoding while an engine writes the pages of a prompt with decoding after the same prompt in another."""
    steps: dict[Engine, list[float]] = {engine: [], other: []}  # seconds of a token
    for seed in range(1, 2 * arguments.rounds + 1):
        for each in (engine, other) if seed % 2 else (other, engine):
            first(each, ids_of(seed, arguments.tokens), 2)  # its pages are written from now on
            stream = each.stream(Request(ids_of(0, 64), 4000, {"min_new_tokens": 4000, "do_sample": False}))
            answer = iter(stream)
            next(answer)
            begin = time.perf_counter()
            for _ in range(STEPS):
                next(answer)
            steps[each].append((time.perf_counter() - begin) / STEPS)
            if each.saved is not None and not each.saved.writer.is_writing:
                raise SystemExit("All pages were written before the tokens were decoded: give more --tokens.")
            del answer, stream
            finish_writing(each)
    beside, alone = (1 / median(steps[each]) for each in (engine, other))
    print(f"decoding: {alone:.2f} tokens/s alone, {beside:.2f} beside writing:")
    print(f"  {times_as_fast(steps[other], steps[engine])}")
    print(f"  {engine.saved.traffic() if engine.saved else ''}")


def run(arguments: argparse.Namespace) -> None:
    """Load the model, and compute what this process is for."""
    warnings.simplefilter("ignore")
    begin = time.perf_counter()
    held = arguments.held if arguments.conversations else 2
    tokens = PAGE_TOKENS * -(-(arguments.tokens + 500) // PAGE_TOKENS)
    config = AutoConfig.from_pretrained(arguments.directory)
    options: dict[str, Any] = {"context": tokens, "kv_cache": held * kv_cache_bytes(config, tokens)}
    own = {"ram": arguments.ram} if arguments.daemon is None else {}
    model, _ = moetier.load(arguments.directory, daemon=arguments.daemon, **own, **options)
    disk = PageOptions(Path(arguments.folder), 1 << 40, 7 * 86_400.0)
    with model.tiers, Engine.of(model, max_sequences=2, disk=disk) as engine:
        first(engine, ids_of(0, 300), 4)  # compiles
        load_experts(model)
        print(f"{arguments.part}: loaded in {time.perf_counter() - begin:.1f} s")
        if arguments.part != "decode":
            turns(engine, arguments)
            return
        with Engine.of(model, max_sequences=2) as other:
            first(other, ids_of(0, 300), 4)
            decode(engine, other, arguments)


def main() -> None:
    """Parse the arguments, and run the processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--conversations", type=int, default=0)
    parser.add_argument("--held", type=int, default=5)
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--rounds", type=int, default=6, help="pairs of pairs with --decode (default: %(default)s)")
    parser.add_argument("--ram")
    parser.add_argument("--limit", help="memory of each process")
    parser.add_argument("--daemon", help="folder of a daemon's sockets, which reads the experts")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        run(arguments)
        return
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for part in ["decode"] if arguments.decode else ["first", "second"]:
            drop_page_cache()
            command = [sys.executable, __file__, *sys.argv[1:], "--part", part, "--folder", folder]
            if arguments.limit is None:
                subprocess.run(command, check=True)
                continue
            with memory_group(Size.parse(arguments.limit).of(machine_memory())) as group:
                ended = group.run(command)
                print(ended.stdout, ended.stderr, f"  peak {format_bytes(group.peak)}", sep="", flush=True)
                ended.check_returncode()


if __name__ == "__main__":
    main()
