"""``moetier bench datapoint DIR``: measure a model on this machine in five minutes, as a block of Markdown to share."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from moetier.runtime.config import TIER_OPTIONS
from moetier.tiers.errors import ConfigError
from moetier.tiers.manifest import Manifest
from moetier.tiers.text import format_bytes
from moetier.tools.cli.arguments import add_option, size
from moetier.tools.cli.failure import plain
from moetier.tools.cli.parser import DIRECTORY, directory
from moetier.tools.rates.hardware import CpuTimes, Machine
from moetier.tools.rates.reads import RandomReads, fio_version

from .bound import rows_of
from .model import Floor, Rated, RunLimits, Work, result_of
from .output import Spread, alternate, busy_notes
from .sandbox import fresh
from .token_ids import fixed_ids

EXAMPLES = ("moetier bench datapoint ./mixtral-4bit --ram 4GiB > datapoint.md",)

SECONDS = 270.0  # of measuring: the command ends within five minutes, even if the last round takes longer than others
ROUNDS = 3
FEED_SHARE = 0.25  # of the time of a part: for tokens of the run that finds out which experts are used
WARM = 16  # tokens that are decoded before the measured ones
DECODED = [16, *[1] * (WARM + 32)]  # tokens of each piece: a prompt, and then one at a time
PROMPT = [8, 128]
HEAD = ("", "tokens/s", "bound", "limited by", "ratio", "hits", "read a token", "peak memory")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier bench datapoint`."""
    parser.add_argument("directory", type=directory, metavar="DIR", help=DIRECTORY)
    parser.add_argument(
        "--ram", type=size, metavar="SIZE", help="memory for experts (default: as much as generate takes)"
    )
    add_option(parser, TIER_OPTIONS["threads"])
    parser.set_defaults(tokens_file=None, prompt_file=None)


def run(arguments: argparse.Namespace) -> None:
    """Print the block. Raises MoetierError, for example if decoding can't be measured in the time given."""
    from moetier.runtime.stores.registry import read_manifest

    began, times, folder = time.monotonic(), CpuTimes.read(), arguments.directory
    manifest, fio = read_manifest(folder), fio_version()
    child = {"directory": str(folder.absolute()), "threads": arguments.threads, "ram": arguments.ram}
    parts = {"decoding": (DECODED, len(DECODED) - 1 - WARM), f"a prompt of {PROMPT[-1]} tokens": (PROMPT, 1)}
    results: dict[str, dict[str, Any] | str] = {}
    for number, (name, (pieces, measured)) in enumerate(parts.items(), start=1):
        work = Work(*fixed_ids(arguments, sequences=1, length=sum(pieces)), pieces, measured)
        try:
            results[name] = measure(folder, manifest, child, work, began + SECONDS * number / len(parts))
        except ConfigError as error:
            if not results:
                raise
            results[name] = error.cause
    threads = next(result["threads"] for result in results.values() if isinstance(result, dict))
    machine = Machine.here(threads=threads, place=folder, fio=fio)
    print(block(machine, manifest, arguments.ram, results, busy_notes(times)))


def measure(folder: Path, manifest: Manifest, child: dict[str, Any], work: Work, until: float) -> dict[str, Any]:
    """Measure ``work``, or as much of its beginning as fits into the time, with the rates that bound it.

    ``until`` is a time of ``time.monotonic``. Returns the result of ``result_of`` with rates and settings. Raises
    ConfigError if the time is not enough.
    """
    from moetier.runtime.checkpoint.containers import container_of

    own = folder.rglob("*") if folder.is_dir() else container_of(folder).weight_files(folder)
    files = sorted(path for path in own if path.is_file())

    def fed(pieces: Work, **more: Any) -> dict[str, Any]:
        seconds = max(until - time.monotonic(), 1.0)
        return fresh(child | {"work": "model"} | pieces.to_json() | more, files=files, seconds=seconds)

    seconds = (until - time.monotonic()) * FEED_SHARE
    seen = fed(work, record=True, seconds=seconds)
    work = beginning(work, len(seen["used"]), seconds)
    floor = Floor(manifest, seen["used"], seen["trunk_bytes"], seen["kv_bytes"], idle_bytes=0)
    rated = Rated(RandomReads.of_records(folder), rows_of(manifest, floor.routing, work.measured, work.step_tokens))
    limits = RunLimits(None, child["ram"])
    ways: dict[Any, Any] = rated.ways(child, work) | {limits: partial(fed, work)}
    runs = alternate(ROUNDS, ways, until=until)
    rates, _, notes = rated.summary(runs["disk"], runs["rates"], work)
    result = result_of(limits, runs[limits], work, floor, rates)
    settings = {"threads": seen["threads"], "rounds": len(runs[limits]), "page_cache": seen["page_cache"]}
    return result | settings | {"notes": notes, "source": work.source}


def beginning(work: Work, pieces: int, seconds: float) -> Work:
    """Return the first ``pieces`` of ``work``. Two thirds of those after the first are measured, or as many as before.

    ``seconds``: in which these pieces were computed. Raises ConfigError for fewer than two.
    """
    if pieces < 2:
        raise ConfigError(
            f"The first {work.pieces[0]} tokens took more than {seconds:.0f} s.",
            "Use moetier bench decode, which takes the time that it needs.",
        )
    kept = work.pieces[:pieces]
    measured = min(work.measured, max(1, 2 * (pieces - 1) // 3))
    return replace(work, ids=[ids[: sum(kept)] for ids in work.ids], pieces=kept, measured=measured)


def block(
    machine: Machine,
    manifest: Manifest,
    ram: str | None,
    results: Mapping[str, dict[str, Any] | str],
    notes: Sequence[str] = (),
) -> str:
    """Return the measurements as Markdown. Of ``results``, one that is a text says why a part was not measured.

    ``notes``: lines about the machine that begin with a word.
    """
    measured = [result for result in results.values() if isinstance(result, dict)]
    first = measured[0]
    sizes = f"{len(manifest.blocks)} blocks, {manifest.record_count} experts, {format_bytes(manifest.stored_bytes)}"
    about = {
        "machine": machine.text().removeprefix("machine").strip(),
        **dict(note.split(maxsplit=1) for note in (*notes, *first["notes"])),
        "model": f"{manifest.model}: {sizes}; experts of {manifest.bits} bits, trunk of {manifest.trunk_bits}",
        "digest": manifest.digest,
        "settings": f"--ram {ram or '(default)'}: {first['slots']} of {first['records']} experts in memory; "
        f"{first['rounds']} rounds: median (least to most); page cache {first['page_cache']}",
        "tokens": first["source"],
    }
    rows = [
        [name, result, *[""] * (len(HEAD) - 2)] if isinstance(result, str) else [name, *_cells(result)]
        for name, result in results.items()
    ]
    parts = [f"### {manifest.model} on {machine.cpu}", ""]
    parts += _table(["", ""], [[name, text] for name, text in about.items()])
    return "\n".join([*parts, "", *_table(HEAD, rows)])


def _cells(result: dict[str, Any]) -> list[str]:
    return [
        Spread(tuple(result["tokens_per_s"]["runs"])).text(),
        f"{result['bound_tokens_per_s']:.2f}",
        result["bound_by"],
        f"{result['ratio']:.2f}",
        f"{result['hit_ratio']:.1%}",
        format_bytes(result["bytes_read_per_token"]),
        format_bytes(result["peak_bytes"]),
    ]


def _table(head: list[str] | tuple[str, ...], rows: list[list[str]]) -> list[str]:
    lines = [[*head], ["---"] * len(head), *([plain(cell).replace("|", "/") for cell in row] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]
