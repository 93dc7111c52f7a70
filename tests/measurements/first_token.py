"""Measure the seconds from the start of ``moetier generate`` to the first token, beside those of its imports alone.

    python tests/measurements/first_token.py DIR

Starts four commands by turns, and waits for the first byte that each prints:

    imports      a script that imports torch and transformers as scripts usually do
    modules      the same, with the modules of transformers that any model and any generation needs
    generate     ``moetier generate DIR "To be" --max-new-tokens 1 --daemon none``
    all imports  the same in a process that has imported all of ``modules``: ``runtime.libraries.lean`` has no effect

hqq, which this project's tests need, is hidden from all but ``generate``: transformers would import it, which compiles
code with torch. Prints the seconds and the CPU seconds of each command, as medians (least to most). For the last two it
also prints by how many seconds they exceed ``modules``, round by round.
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
    results = alternate(arguments.rounds, ways)
    print(f"machine  {platform.machine()}, {os.cpu_count()} CPUs; {arguments.rounds} rounds: median (least to most)")
    for name, runs in results.items():
        seconds, of_processor = zip(*runs, strict=True)
        more = Spread.of(mine - other for mine, (other, _) in zip(seconds, results["modules"], strict=True))
        beyond = f"; {more.text()} s beyond modules" if name in ("generate", "all imports") else ""
        print(f"{name:<18}{Spread.of(seconds).text()} s, processor {Spread.of(of_processor).text()} s{beyond}")


def first_byte(code: str, *words: str) -> tuple[float, float]:
    """Seconds until this Python code has printed something, and the processor's of the whole run; it is to succeed."""
    began, command = time.perf_counter(), [sys.executable, "-c", code, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - began
        process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not first:
        sys.exit(f"{' '.join(command)}: status {process.returncode}")
    return seconds, used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
