"""``moetier bench convert SRC``: weights converted per second, by HQQ and by rounding, beside the disk's rate."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from moetier.runtime.config import TIER_OPTIONS
from moetier.tiers.errors import CheckpointError
from moetier.tiers.layout import BITS
from moetier.tiers.options import COUNT
from moetier.tiers.text import format_bytes
from moetier.tools.cli.arguments import add_option
from moetier.tools.cli.settings import without_settings
from moetier.tools.rates.hardware import Machine
from moetier.tools.rates.reads import DISK_SECONDS, NO_FIO, RandomReads, fio_version

from .output import Spread, add_bench_arguments, alternate, begin_bench, report
from .sandbox import drop_page_cache

EXAMPLES = ("moetier bench convert ./Mixtral-8x7B-v0.1",)

MILLION = 1e6
WAYS: dict[str, list[str]] = {"hqq": [], "fast": ["--fast"]}
DEPTH = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier bench convert`."""
    parser.add_argument("source", type=Path, metavar="SRC", help="folder of a checkpoint")
    parser.add_argument(
        "--bits", type=int, choices=BITS[1:], default=4, help="bits per expert weight (default: %(default)s)"
    )
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="folder for temporary files (default: $TMPDIR)")
    parser.add_argument(
        "--workers", type=COUNT, metavar="N", help="experts that are quantised at a time, as in moetier convert"
    )
    add_option(parser, TIER_OPTIONS["threads"])
    add_bench_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run the command. Raises MoetierError."""
    measure(arguments, {})


def measure(arguments: argparse.Namespace, others: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
    """Convert a checkpoint in each of WAYS and of ``others``, by turns; print and write the results.

    ``others`` is a dictionary from the names of further ways to functions that return what ``convert_once`` returns.
    Raises MoetierError.
    """
    began = begin_bench(arguments)
    if not (files := sorted(arguments.source.glob("*.safetensors"))):
        raise CheckpointError(f"{arguments.source} has no safetensors files.", "Give the folder of a checkpoint.")
    fio = fio_version()
    reads = RandomReads.of_files(files)
    ways: dict[str, Any] = {"disk": partial(reads.rate, DEPTH, DISK_SECONDS)}
    for name, options in WAYS.items():
        words = [*options, "--bits", str(arguments.bits)]
        words += ["--workers", str(arguments.workers)] if arguments.workers else []
        words += ["--threads", str(arguments.threads)] if arguments.threads else []
        ways[name] = partial(convert_once, arguments.source, arguments.into, words, files)
    measured = alternate(arguments.rounds, ways | dict(others))

    disk = Spread.of(measured.pop("disk"))
    rows = [["way", "million weights/s", "fast is", "bound (reading)", "ratio", "seconds", "peak"]]
    results: list[dict[str, Any]] = []
    speeds = {name: Spread.of(run["weights"] / run["seconds"] for run in runs) for name, runs in measured.items()}
    for name, runs in measured.items():
        weights, source = runs[0]["weights"], runs[0]["source_bytes"]
        speed, seconds = speeds[name], Spread.of(run["seconds"] for run in runs)
        times = speeds["fast"].median / speed.median
        bound = weights / (source / disk.median)
        peak = max(run["peak_bytes"] for run in runs)
        cells = [f"{bound / MILLION:.1f}", f"{speed.median / bound:.2f}", seconds.text(), format_bytes(peak)]
        rows.append([name, speed.text(MILLION), f"{times:.2f} times as fast", *cells])
        results.append(
            {
                "way": name,
                "bits": arguments.bits,
                "weights": weights,
                "source_bytes": source,
                "weights_per_s": speed.to_json(),
                "fast_times_as_fast": times,
                "bound_weights_per_s": bound,
                "ratio": speed.median / bound,
                "seconds": seconds.to_json(),
                "peak_bytes": peak,
            }
        )
    notes = [
        f"disk     {disk.text(1e9)} GB/s, random reads of {format_bytes(reads.block_bytes)}, {DEPTH} in flight, "
        f"by {reads.by}; page cache {measured['hqq'][-1]['page_cache']}",
        *([] if fio else [NO_FIO]),
    ]
    machine = Machine.here(place=arguments.source, fio=fio)
    rates = {"disk_bytes_per_s": disk.to_json(), "disk_by": reads.by}
    report(arguments, began, machine, rows, results, notes=notes, rates=rates)


def convert_once(source: Path, into: Path | None, options: list[str], files: list[Path]) -> dict[str, Any]:
    """Run ``moetier convert`` into a temporary folder in ``into``, and return its report as JSON.

    ``options``: options of the command; ``files``: files to drop from the page cache before. The report's ``seconds``
    do not count imports. Raises CheckpointError if the command fails.
    """
    page_cache = drop_page_cache(files, whole=False)
    with tempfile.TemporaryDirectory(prefix="moetier-bench-", dir=into) as folder:
        command = [sys.executable, "-m", "moetier.tools.main", "convert", str(source), str(Path(folder) / "out")]
        result = subprocess.run(
            [*command, *options, "--json"],
            capture_output=True,
            text=True,
            env=without_settings(os.environ) | {"XDG_DATA_HOME": os.devnull},  # it gets no name
            check=False,
        )
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.startswith(("moetier: ", "  "))][-2:]
        cause, fix = lines if len(lines) == 2 else (result.stderr[-500:], "Check that moetier convert works with it.")
        raise CheckpointError(cause.removeprefix("moetier: "), fix.strip())
    report: dict[str, Any] = json.loads(result.stdout)
    return report | {"page_cache": page_cache}
