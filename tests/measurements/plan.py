"""Compare the estimates of ``moetier plan`` with measurements: memory, hit ratio, decode and prefill rates.

    python tests/measurements/plan.py DIR...

``--ram`` gives budgets as shares of all experts. For each model directory and budget this runs ``moetier plan``, and
twice the process in which ``moetier bench`` measures a model: once for a prompt of 512 tokens, after 8 other tokens;
once for ``--tokens`` decode steps, after a prompt of 512 tokens and ``--warm`` steps. Tokens are those of
DIR/tokens.json, or random ones if there is no such file. Prints estimates, measurements and their ratios. The exit
status is 1 if the memory is off by more than 10 %, or a rate by more than a factor of 1.5.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from moetier.runtime.config import Size
from moetier.tiers.cache.budget import smallest_budget
from moetier.tiers.store.folder import read_manifest, store_folder
from moetier.tiers.text import format_bytes
from moetier.tools.bench.sandbox import fresh
from moetier.tools.bench.token_ids import fixed_ids
from moetier.tools.cli.report import table
from moetier.tools.plan.estimate import PROMPT_TOKENS

MEMORY, SPEED = 1.1, 1.5  # how far off a plan may be
BEFORE_PROMPT = 8  # tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--ram", default="25%,50%,100%", help="budgets, of all experts (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="steps that count (default: %(default)s)")
    parser.add_argument("--warm", type=int, default=48, help="steps before (default: %(default)s)")
    arguments = parser.parse_args()
    rows = [["model", "experts in", "", "plan", "measured", "ratio", ""]]
    for directory in arguments.directories:
        manifest = read_manifest(store_folder(directory))
        for share in arguments.ram.split(","):
            ram = max(Size.parse(share).of(manifest.stored_bytes), smallest_budget(manifest))
            steps = [PROMPT_TOKENS, *[1] * (arguments.warm + arguments.tokens)]
            planned = plan(directory, ram, sum(steps))
            decoded = run(directory, ram, steps, arguments.tokens)
            prompt = run(directory, ram, [BEFORE_PROMPT, PROMPT_TOKENS], 1)
            hits = decoded["hits"] / (decoded["hits"] + decoded["misses"])
            rate, prompt_rate = arguments.tokens / sum(decoded["seconds"]), PROMPT_TOKENS / sum(prompt["seconds"])
            peak, memory = decoded["peak_bytes"], planned["memory"]["process_bytes"]
            name, budget = directory.name, format_bytes(ram)
            planned_hits, said, prompt_said = planned["hit_ratio"], planned["decode"], planned["prefill"]
            cells = [format_bytes(memory), format_bytes(peak), *verdict(memory / peak, MEMORY)]
            rows.append([name, budget, "memory", *cells])
            rows.append(["", "", "hits", f"{planned_hits:.1%}", f"{hits:.1%}", f"{planned_hits / hits:.2f}", ""])
            for what, cost, measured in (("decode", said, rate), ("prefill", prompt_said, prompt_rate)):
                cells = [f"{cost['tokens_per_s']:.2f} ({cost['by']})", f"{measured:.2f}"]
                rows.append(["", "", f"{what}, tokens/s", *cells, *verdict(cost["tokens_per_s"] / measured, SPEED)])
            for what, cost, tokens in (("token", said, rate), ("prompt", prompt_said, prompt_rate / PROMPT_TOKENS)):
                parts = ", ".join(f"{part} {1e3 * cost[part]:.1f}" for part in ("disk", "kernels", "overhead"))
                print(f"{name} {budget}: a {what} {1e3 / tokens:.1f} ms; planned: {parts} ms", flush=True)
    print(table(rows))
    return int(any(row[-1] == "off" for row in rows))


def plan(directory: Path, ram: int, context: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "moetier.tools.main", "plan", str(directory), "--ram", str(ram)]
    command += ["--context", str(context), "--json"]
    forecast = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    (choice,) = forecast["choices"]
    return dict(choice)


def run(directory: Path, ram: int, pieces: list[int], measured: int) -> dict[str, Any]:
    given = argparse.Namespace(directory=directory, tokens_file=None, prompt_file=None)
    ids, _ = fixed_ids(given, sequences=1, length=sum(pieces))
    work = {"work": "model", "directory": str(directory.resolve()), "threads": None, "ram": ram}
    work |= {"ids": ids, "pieces": pieces, "measured": measured}
    return fresh(work, files=sorted(path for path in directory.rglob("*") if path.is_file()))


def verdict(ratio: float, most: float) -> list[str]:
    return [f"{ratio:.2f}", "ok" if 1 / most <= ratio <= most else "off"]


if __name__ == "__main__":
    sys.exit(main())
