"""Compare the speed of two releases of moetier, which run the same work by turns.

    python tests/measurements/pairs.py OLD/.venv/bin/python NEW/.venv/bin/python --decode DIR --ram 2GiB
    python tests/measurements/pairs.py OLD/.venv/bin/python NEW/.venv/bin/python -- convert SOURCE {new} --bits 4

Options such as ``--pairs`` go before OLD in the second form.

With ``--decode``, each pair is two new processes, one of each release. Both load the model, and decode the same tokens
by turns, or with ``--prompt`` run the same prompts; one sleeps while the other works. Where a model does not fit into
memory, the process that starts first may be a quarter slower, as it gets what is scattered of the free memory. So NEW
starts first in every second pair, two such pairs count as one, and as root memory is compacted before. Otherwise a
whole command is timed, in which ``{new}`` stands for a path that does not exist yet. Prints both medians, and how many
times as fast NEW is: the geometric mean of the ratios, with its 95 % interval over the pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from speculation import student

STEPS = 32  # tokens of a turn
# for each line that it reads, decodes STEPS tokens or runs a prompt, and prints the seconds of a step
DECODER = """
import statistics, sys, time, warnings, torch, moetier
warnings.simplefilter("ignore")
model, _ = moetier.load(sys.argv[1], ram=sys.argv[2], daemon=None, speculate="off")
random = torch.Generator().manual_seed(0)
prompt = int(sys.argv[3])

def turn():
    steps = [prompt] if prompt else [1] * (STEPS + 1)
    seconds, past = [], None
    for ids in torch.randint(1000, (1, sum(steps)), generator=random).split(steps, dim=1):
        began = time.perf_counter()
        past = model(ids, past_key_values=past, use_cache=not prompt, logits_to_keep=1).past_key_values
        seconds.append(time.perf_counter() - began)
    return statistics.mean(seconds[1:] or seconds)

with torch.no_grad():
    model(torch.randint(1000, (1, 1024), generator=random), use_cache=False)  # loads what there is room for
    for line in sys.stdin:
        print(turn(), flush=True)
""".replace("STEPS", str(STEPS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="an interpreter with a release of moetier")
    parser.add_argument("new", help="another")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--decode", metavar="DIR", help="a model directory")
    parser.add_argument("--prompt", type=int, default=0, metavar="N", help="with --decode: run prompts of N tokens")
    parser.add_argument("--turns", type=int, default=3, help="with --decode: of each process (default: %(default)s)")
    parser.add_argument("--ram", default="80%", help="for its experts (default: %(default)s)")
    parser.add_argument("command", nargs="*", metavar="ARGUMENT", help="of moetier, behind --")
    arguments = parser.parse_args()
    if arguments.decode:
        pairs = [mean_of(pair(arguments, 0), pair(arguments, 1)) for _ in range(arguments.pairs)]
    else:
        pairs = [pair(arguments, number) for number in range(arguments.pairs + 1)][1:]  # in the first, caches fill
    old, new = zip(*pairs, strict=True)
    print(f"old {statistics.median(old):.4g} s, new {statistics.median(new):.4g} s: {times_as_fast([*old], [*new])}")


def mean_of(*pairs: tuple[float, float]) -> tuple[float, float]:
    """Return the geometric means of the seconds of OLD and of NEW."""
    old, new = zip(*pairs, strict=True)
    return statistics.geometric_mean(old), statistics.geometric_mean(new)


def times_as_fast(old: list[float], new: list[float]) -> str:
    """Return how many times as fast the work that took the ``new`` seconds was as that which took the ``old`` ones."""
    logs = [math.log(one / two) for one, two in zip(old, new, strict=True)]
    mean, half = statistics.fmean(logs), student(len(logs) - 1) * statistics.stdev(logs) / len(logs) ** 0.5
    low, high = math.exp(mean - half), math.exp(mean + half)
    return f"{math.exp(mean):.3f} times as fast ({low:.3f} to {high:.3f}), {len(logs)} pairs"


def pair(arguments: argparse.Namespace, number: int) -> tuple[float, float]:
    """Run the work with each release, NEW first if ``number`` is odd, and return the seconds of OLD and of NEW."""
    order = ("old", "new") if number % 2 == 0 else ("new", "old")
    if not arguments.decode:
        seconds = {name: run(getattr(arguments, name), arguments.command) for name in order}
    else:
        with contextlib.ExitStack() as ends:
            decode: dict[str, Callable[[], float]] = {}
            for name in order:
                compact_memory()
                decode[name] = decoder(ends, getattr(arguments, name), arguments)
                decode[name]()  # loads the model, and caches fill
            turns: dict[str, list[float]] = {"old": [], "new": []}
            for turn in range(arguments.turns):
                for name in reversed(order) if turn % 2 == 0 else order:
                    turns[name].append(decode[name]())
            seconds = {name: statistics.fmean(turns[name]) for name in order}
    print(f"{seconds['old']:.4g} {seconds['new']:.4g}", file=sys.stderr, flush=True)
    return seconds["old"], seconds["new"]


def compact_memory() -> None:
    """Let the kernel join its free memory, so that all processes begin alike. Does nothing where that is not allowed.

    The disk reads more slowly into memory whose pages are scattered, and what is scattered depends on who came first.
    """
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/compact_memory").write_text("1")


def decoder(ends: contextlib.ExitStack, python: str, arguments: argparse.Namespace) -> Callable[[], float]:
    """Start a process that loads a model, and return a function that runs one turn in it and returns seconds."""
    words = [python, "-c", DECODER, arguments.decode, arguments.ram, str(arguments.prompt)]
    process = ends.enter_context(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    ends.callback(process.kill)
    assert process.stdin is not None
    assert process.stdout is not None

    def decode() -> float:
        print(file=process.stdin, flush=True)
        return float(process.stdout.readline())

    return decode


def run(python: str, command: list[str]) -> float:
    """Run a command, and return how many seconds it took."""
    with tempfile.TemporaryDirectory(dir=".") as name:
        new = str(Path(name) / "new")
        words = [python, "-m", "moetier.tools.main", *(new if word == "{new}" else word for word in command)]
        began = time.perf_counter()
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        if done.returncode:
            sys.exit(f"{python}: {done.stderr}")
        return seconds


if __name__ == "__main__":
    main()
