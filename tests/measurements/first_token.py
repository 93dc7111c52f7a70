"""Seconds from the command to the first token, beside what the imports cost that nobody gets round.

    python tests/measurements/first_token.py DIR

Starts ``moetier generate DIR "To be" --max-new-tokens 1`` and processes that import torch and transformers and do
nothing else, by turns, and waits for the first byte that each prints. ``imports`` is what a script begins with, of
which transformers does most when a name is first used; ``modules`` imports what any model and any generation is made
of. hqq, where it is installed as this project's tests need it, is hidden from these: transformers imports it, and it
compiles with torch. ``all imports`` is ``generate`` in a process that has imported transformers as it is, so that
``runtime.lean`` has no effect. Prints medians (least to most) of the seconds and of the processor's seconds of each,
and, round by round, the difference to ``modules``. Without a daemon, whatever runs.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from moetier.tools.bench.output import Spread, alternate

WITHOUT_HQQ = "import sys; sys.modules['hqq'] = None; "
IMPORTS = "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer; "
MODULES = IMPORTS + "from transformers import GenerationMixin, PreTrainedModel; "
PRINT = "print('.', flush=True)"
WITHOUT_GC = "import gc; gc.disable(); "
GENERATE = "import sys; from moetier.tools.main import main; sys.exit(main())"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    words = ["generate", str(arguments.directory), "To be", "--max-new-tokens", "1", "--daemon", "none"]
    ways = {
        "imports": partial(first_byte, WITHOUT_HQQ + IMPORTS + PRINT),
        "modules": partial(first_byte, WITHOUT_HQQ + MODULES + PRINT),
        "generate": partial(first_byte, GENERATE, *words),
        "all imports": partial(first_byte, WITHOUT_HQQ + WITHOUT_GC + MODULES + GENERATE, *words),
    }
    for way in ways.values():  # not counted: files come into the page cache
        way()
    found = alternate(arguments.rounds, ways)
    print(f"machine  {platform.machine()}, {os.cpu_count()} CPUs; {arguments.rounds} rounds: median (least to most)")
    for name, runs in found.items():
        seconds, of_processor = zip(*runs, strict=True)
        more = Spread.of(mine - other for mine, (other, _) in zip(seconds, found["modules"], strict=True))
        beyond = f"; {more.text()} s beyond modules" if name in ("generate", "all imports") else ""
        print(f"{name:<18}{Spread.of(seconds).text()} s, processor {Spread.of(of_processor).text()} s{beyond}")


def first_byte(code: str, *words: str) -> tuple[float, float]:
    """Seconds until this Python code has printed something, and the processor's of the whole run; it is to succeed."""
    began, command = time.perf_counter(), [sys.executable, "-c", code, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        found = process.stdout.read(1)
        seconds = time.perf_counter() - began
        process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not found:
        sys.exit(f"{' '.join(command)}: status {process.returncode}")
    return seconds, used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
