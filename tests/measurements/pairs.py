"""Two releases compared: one command of each, run by turns.

    python tests/measurements/pairs.py OLD/.venv/bin/python NEW/.venv/bin/python --rounds 10 \
        -- bench decode DIR --ram 50% --rounds 1 --json {json}

``{json}`` stands for a file, and ``--key`` says which number in it counts, such as ``runs.0.tokens_per_s``: the larger
the better. Without ``{json}`` the time of the whole command counts; ``{new}`` stands for a folder that is empty each
time. Prints both medians, and the geometric mean of NEW's speed over OLD's with its 95 % interval over the rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from speculation import student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="an interpreter with a release of moetier")
    parser.add_argument("new", help="another")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--key", default="", help="of the number in {json}, with dots")
    parser.add_argument("command", nargs="+", metavar="ARGUMENT", help="of moetier, behind --")
    arguments = parser.parse_args()
    speeds: dict[str, list[float]] = {"old": [], "new": []}
    for number in range(arguments.rounds):
        for name in ("old", "new") if number % 2 == 0 else ("new", "old"):
            speeds[name].append(run(getattr(arguments, name), arguments.command, arguments.key))
        print(f"{number + 1}: {speeds['old'][-1]:.4g} {speeds['new'][-1]:.4g}", file=sys.stderr, flush=True)
    ratios = [math.log(new / old) for old, new in zip(speeds["old"], speeds["new"], strict=True)]
    mean, half = statistics.fmean(ratios), student(len(ratios) - 1) * statistics.stdev(ratios) / len(ratios) ** 0.5
    shown = {name: statistics.median(found) for name, found in speeds.items()}
    if not arguments.key:
        shown = {name: 1 / speed for name, speed in shown.items()}
    print(
        f"old {shown['old']:.4g}, new {shown['new']:.4g}{'' if arguments.key else ' s'}: {math.exp(mean):.3f} times as "
        f"fast ({math.exp(mean - half):.3f} to {math.exp(mean + half):.3f}), {arguments.rounds} pairs"
    )


def run(python: str, command: list[str], key: str) -> float:
    """Run a command, and return how fast it was."""
    with tempfile.TemporaryDirectory(dir=".") as name:
        places = {"{json}": str(Path(name) / "found.json"), "{new}": str(Path(name) / "new")}
        words = [places.get(word, word) for word in command]
        began = time.perf_counter()
        done = subprocess.run([python, "-m", "moetier.tools.main", *words], capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        if done.returncode:
            sys.exit(f"{python}: {done.stderr}")
        shutil.rmtree(places["{new}"], ignore_errors=True)
        if not key:
            return 1 / seconds
        found = json.loads(Path(places["{json}"]).read_text())
        for part in key.split("."):
            found = found[int(part) if part.isdigit() else part]
        return float(found)


if __name__ == "__main__":
    main()
