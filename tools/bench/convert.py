"""``moetier bench convert SRC``: weights a second, with the optimiser and without, beside the disk's rate.

Where llama-cpp-python is installed, its quantiser takes its turn with the others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moetier.runtime.config import COUNT, format_bytes
from moetier.runtime.threads import usable_cpus
from moetier.tiers.errors import CheckpointError, ConfigError, MoetierError
from moetier.tiers.layout import BITS
from moetier.tools.cli.arguments import add_option
from moetier.tools.cli.settings import without_settings

from .disk import NO_FIO, RandomReads, fio_version
from .output import Machine, Spread, add_bench_arguments, alternate, check_bench, report
from .sandbox import drop_page_cache

EXAMPLES = ("moetier bench convert ./Mixtral-8x7B-v0.1 --no-llama",)

MILLION = 1e6
WAYS: dict[str, list[str]] = {"hqq": [], "fast": ["--fast"]}
LLAMA, LLAMA_BITS = "llama.cpp Q4_0", 4
DEPTH = 4
DISK_SECONDS = 2.0


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
    add_option(parser, "threads")
    parser.add_argument(
        "--no-llama", action="store_true", help="leave out llama.cpp, whose source takes as much disk as SRC again"
    )
    add_bench_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return 0. Raises MoetierError."""
    check_bench(arguments)
    files = sorted(arguments.source.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{arguments.source} has no safetensors files.", "Give the folder of a checkpoint.")
    fio = fio_version()
    reads = RandomReads.of_files(files)
    ways: dict[str, Any] = {"disk": partial(reads.rate, DEPTH, DISK_SECONDS)}
    for name, options in WAYS.items():
        words = [*options, "--bits", str(arguments.bits)]
        words += ["--workers", str(arguments.workers)] if arguments.workers else []
        words += ["--threads", str(arguments.threads)] if arguments.threads else []
        ways[name] = partial(convert_once, arguments.source, arguments.into, words, files)
    notes = [] if fio else [NO_FIO]
    with ExitStack() as stack:
        if not arguments.no_llama:
            folder = tempfile.TemporaryDirectory(prefix="moetier-bench-", dir=arguments.into)
            try:
                ways[LLAMA] = llama_way(arguments, Path(stack.enter_context(folder)))
            except MoetierError as error:
                notes.append(f"{LLAMA} is left out: {error.cause}")
        found = alternate(arguments.rounds, ways)

    disk = Spread.of(found.pop("disk"))
    rows, results = (
        [["way", "million weights/s", "fast is", "bound (reading)", "ratio", "seconds", "peak"]],
        list[dict[str, Any]](),
    )
    speeds = {name: Spread.of(run["weights"] / run["seconds"] for run in runs) for name, runs in found.items()}
    for name, runs in found.items():
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
    notes.insert(
        0,
        f"disk     {disk.text(1e9)} GB/s, random reads of {format_bytes(reads.block_bytes)}, {DEPTH} in flight, "
        f"by {reads.by}; page cache {found['hqq'][-1]['page_cache']}",
    )
    machine = Machine.here(place=arguments.source, fio=fio)
    rates = {"disk_bytes_per_s": disk.to_json(), "disk_by": reads.by}
    return report(arguments, machine, rows, results, notes=notes, rates=rates)


def convert_once(source: Path, into: Path | None, options: list[str], files: list[Path]) -> dict[str, Any]:
    """Run ``moetier convert`` into a temporary folder and return its report; its time is without imports."""
    page_cache = drop_page_cache(files, whole=False)
    with tempfile.TemporaryDirectory(prefix="moetier-bench-", dir=into) as folder:
        command = [sys.executable, "-m", "moetier.tools.main", "convert", str(source), str(Path(folder) / "out")]
        result = subprocess.run(
            [*command, *options, "--json"],
            capture_output=True,
            text=True,
            env=without_settings(os.environ),
            check=False,
        )
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.startswith(("moetier: ", "  "))][-2:]
        cause, fix = lines if len(lines) == 2 else (result.stderr[-500:], "See moetier convert.")
        raise CheckpointError(cause.removeprefix("moetier: "), fix.strip())
    found: dict[str, Any] = json.loads(result.stdout)
    return found | {"page_cache": page_cache}


def llama_way(arguments: argparse.Namespace, folder: Path) -> Callable[[], dict[str, Any]]:
    """Return a call that quantises the same weights with llama.cpp; they are put into ``folder`` in 16 bits first.

    Raises MoetierError where that is not possible.
    """
    from moetier.tiers.store.atomic import disk_errors

    from .gguf_export import export_gguf

    if arguments.bits != LLAMA_BITS:
        raise ConfigError(f"it has {LLAMA_BITS} bits, and --bits is {arguments.bits}.", "")
    if find_spec("llama_cpp") is None:
        raise ConfigError("llama-cpp-python is not installed.", "")
    source = folder / "source.gguf"
    with disk_errors(folder):
        export_gguf(arguments.source, source, kind="F16", quiet=False)
    threads = arguments.workers or arguments.threads or usable_cpus()
    return partial(quantize_once, source, folder / "target.gguf", threads)


def quantize_once(source: Path, target: Path, threads: int) -> dict[str, Any]:
    """Run llama.cpp's quantiser and return what ``convert_once`` returns.

    ``weights`` are those that are in Q4_0 afterwards, and the time is that of llama.cpp's call.
    """
    import gguf

    from .engines import llama_quantize

    drop_page_cache([source], whole=False)
    seconds, peak = llama_quantize(source, target, threads=threads)
    tensors, kind = gguf.GGUFReader(target).tensors, gguf.GGMLQuantizationType.Q4_0
    weights = sum(int(tensor.n_elements) for tensor in tensors if tensor.tensor_type == kind)
    target.unlink()
    return {"weights": weights, "source_bytes": source.stat().st_size, "seconds": seconds, "peak_bytes": peak}
