"""Measurement that ``bench decode`` and ``bench prefill`` share: fresh processes feed fixed tokens to a model."""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moetier.runtime.config import TIER_OPTIONS, Size
from moetier.runtime.machine.memory import machine_memory
from moetier.tiers.cache.budget import slots_for, smallest_budget
from moetier.tiers.errors import BudgetError
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import LOADERS
from moetier.tiers.text import format_bytes
from moetier.tools.cli.arguments import add_option, size
from moetier.tools.cli.parser import add_directory
from moetier.tools.cli.report import format_seconds
from moetier.tools.rates.hardware import Machine
from moetier.tools.rates.products import UNCACHED_BYTES
from moetier.tools.rates.reads import DISK_SECONDS, GB, NO_FIO, RandomReads, fio_version

from .bound import Bound, BoundRates, need_of, rows_of, verdict
from .output import BenchInterrupted, Spread, add_bench_arguments, alternate, begin_bench, report
from .sandbox import fresh
from .token_ids import add_token_arguments, fixed_ids

KERNEL_SECONDS = 1.0  # of matrix products in each round, for each number of rows
TABLE = (
    *("limit", "--ram", "slots", "tokens/s", "bound", "by", "ratio", "ms a step", "hits", "read a token"),
    *("peak", "in its group"),
)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `moetier bench decode` and `moetier bench prefill` share."""
    add_directory(parser)
    parser.add_argument(
        "--ram",
        type=size,
        action="append",
        metavar="SIZE",
        help="memory for experts; may be repeated (default: as much as generate takes)",
    )
    parser.add_argument(
        "--limit",
        type=size,
        action="append",
        metavar="SIZE",
        help="memory limit of the control group that each run is in; may be repeated (default: none)",
    )
    add_token_arguments(parser)
    add_option(parser, TIER_OPTIONS["threads"])
    add_bench_arguments(parser)


@dataclass(frozen=True)
class Work:
    """Token ids [sequences][tokens] that a model is fed in pieces; the last ``measured`` pieces are timed."""

    ids: list[list[int]]
    source: str  # where the ids come from
    pieces: list[int]  # tokens of each piece, in every sequence
    measured: int

    @classmethod
    def of(cls, arguments: argparse.Namespace, pieces: list[int], *, measured: int, sequences: int = 1) -> Work:
        """Make the work from fixed ids: ``sequences`` sequences, each as long as all ``pieces`` together.

        Raises ConfigError if the ids can't be read.
        """
        ids, source = fixed_ids(arguments, sequences=sequences, length=sum(pieces))
        return cls(ids, source, pieces, measured)

    @property
    def step_tokens(self) -> int:
        """Number of tokens of a measured piece, in all sequences together."""
        return len(self.ids) * self.pieces[-1]

    def to_json(self) -> dict[str, Any]:
        """Return the ids and pieces as JSON, a part of the input of the process that measures."""
        return {"ids": self.ids, "pieces": self.pieces, "measured": self.measured}


@dataclass(frozen=True)
class RunLimits:
    """Memory limits of one run."""

    limit: int | None  # of the run's control group, in bytes; None for no limit
    ram: str | None  # value of --ram; None if it was not given

    @property
    def words(self) -> str:
        """The limits as words of a command line."""
        given = [] if self.limit is None else [f"--limit {format_bytes(self.limit)}"]
        given += [] if self.ram is None else [f"--ram {self.ram}"]
        return " ".join(given)

    def __str__(self) -> str:
        return f"the model {self.words}".strip()


@dataclass(frozen=True)
class Floor:
    """Sizes and routing of a model. Bounds are computed from these and from measured rates."""

    manifest: Manifest
    routing: list[list[list[int]]]  # [pieces][blocks]: the experts that were used
    trunk_bytes: int
    kv_bytes: int  # of the keys and values of all tokens
    idle_bytes: int  # memory of a process that has only imported torch and transformers

    @property
    def resident_bytes(self) -> int:
        """Bytes that a process takes without any records."""
        return self.idle_bytes + self.trunk_bytes + self.kv_bytes

    def check(self, several: Sequence[RunLimits]) -> None:
        """Raise BudgetError if a limit leaves no room for the experts that one token needs in a block."""
        least = self.resident_bytes + smallest_budget(self.manifest)
        if any(limits.limit is not None and limits.limit < least for limits in several):
            raise BudgetError(
                f"A process with the trunk, the context and a token's experts in a block takes {format_bytes(least)}.",
                f"Give a --limit of {least} bytes or more.",
            )

    def slots(self, limits: RunLimits, used: Mapping[str, int]) -> Mapping[str, int]:
        """Return how many slots the limit allows beside the trunk, the context and an idle process, by zarr array.

        If there is no limit, return ``used``, the slots that the run had.
        """
        if limits.limit is None:
            return used
        return slots_for(self.manifest, limits.limit - self.resident_bytes)


def measure(arguments: argparse.Namespace, work: Work) -> None:
    """Measure ``work`` with every combination of --limit and --ram; print and write the results.

    The rates of disk, kernels and memory, from which the bounds are computed, are measured in the same rounds. After
    SIGINT or SIGTERM, what was measured until then is printed. Raises MoetierError.
    """
    from moetier.runtime.stores.registry import read_manifest

    began = begin_bench(arguments)
    several, folder = _combinations(arguments), arguments.directory
    files, manifest, fio = _files_of(folder), read_manifest(folder), fio_version()
    child = {"directory": str(folder.absolute()), "threads": arguments.threads}
    feed = child | {"work": "model"} | work.to_json()

    _say("the memory of an idle process, and which experts the tokens use")
    start = time.monotonic()
    idle = fresh(child | {"work": "idle"})
    seen = fresh(feed | {"record": True}, files=files)
    floor = Floor(manifest, seen["used"], seen["trunk_bytes"], seen["kv_bytes"], idle["peak_bytes"])
    floor.check(several)
    rated = Rated(RandomReads.of_records(folder), rows_of(manifest, floor.routing, work.measured, work.step_tokens))
    ways: dict[Any, Any] = rated.ways(child, work)
    for limits in several:
        ways[limits] = partial(fresh, feed | {"ram": limits.ram}, limit=limits.limit, files=files)
    seconds = len(several) * (time.monotonic() - start) + 2 * KERNEL_SECONDS + DISK_SECONDS
    whole = format_seconds(arguments.rounds * seconds)
    rounds = "1 round takes" if arguments.rounds == 1 else f"{arguments.rounds} rounds take"
    _say(f"{rounds} about {whole}; Ctrl-C prints what was measured until then")
    measured, interrupted_in = _run_rounds(arguments.rounds, ways, several)
    several = [limits for limits in several if measured[limits]]
    page_cache = measured[several[0]][-1]["page_cache"]

    rates, rates_json, notes = rated.summary(measured["disk"], measured["rates"], work)
    results = [result_of(limits, measured[limits], work, floor, rates) for limits in several]
    report(
        arguments,
        began,
        Machine.here(threads=seen["threads"], place=folder, fio=fio),
        [list(TABLE), *map(_row, results)],
        results,
        notes=[*notes, f"tokens   {work.source}; page cache {page_cache}", *([] if fio else [NO_FIO])],
        ends=[_reading(result) for result in results],
        interrupted_in=interrupted_in,
        rates=rates_json,
        tokens={
            "source": work.source,
            "sequences": len(work.ids),
            "before": sum(work.pieces[: -work.measured]),
            "steps": work.measured,
            "step_tokens": work.step_tokens,
        },
        trunk_bytes=floor.trunk_bytes,
        kv_bytes=floor.kv_bytes,
        idle_bytes=floor.idle_bytes,
        page_cache=page_cache,
    )


def _combinations(arguments: argparse.Namespace) -> list[RunLimits]:
    """Return every combination of a --limit and a --ram. Raises ConfigError if a limit is no size."""
    return [
        RunLimits(None if limit is None else Size.parse(limit).of(machine_memory()), ram)
        for limit in arguments.limit or [None]
        for ram in arguments.ram or [None]
    ]


def _files_of(model: Path) -> list[Path]:
    """Return the files of a model, in a folder or one file such as a GGUF: their cached pages are dropped for a run."""
    from moetier.runtime.checkpoint.containers import container_of

    own = model.rglob("*") if model.is_dir() else container_of(model).weight_files(model)
    return sorted(path for path in own if path.is_file())


def _run_rounds(
    rounds: int, ways: dict[Any, Any], several: Sequence[RunLimits]
) -> tuple[dict[Any, list[Any]], int | None]:
    """Return the results of ``ways`` by name, one for each round, and the round that was interrupted, counted from 1.

    SIGTERM interrupts a round as SIGINT does. Raises BenchInterrupted if none of ``several`` has a result then.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return alternate(rounds, ways, say=_say), None
    except BenchInterrupted as stop:
        if not any(stop.results[limits] for limits in several):
            raise
        return stop.results, 1 + min(map(len, stop.results.values()))
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Rated:
    """Rates that are measured beside a model: of its disk, and of products with its records."""

    reads: RandomReads
    rows: int  # of a product with an expert, on average

    def ways(self, child: dict[str, Any], work: Work) -> dict[Any, Any]:
        """Return the measurements, by name: functions without parameters. ``child``: input of a fresh process."""
        products = child | {"work": "rates", "rows": sorted({self.rows, work.step_tokens})}
        products |= {"seconds": KERNEL_SECONDS, "bytes": UNCACHED_BYTES}
        return {"disk": partial(self.reads.rate, LOADERS, DISK_SECONDS), "rates": partial(fresh, products)}

    def summary(
        self, disks: list[float], products: list[dict[str, Any]], work: Work
    ) -> tuple[BoundRates, dict[str, Any], list[str]]:
        """Return the median rates, the rates as JSON, and notes about them.

        ``disks`` and ``products``: results of the measurements, by round.
        """
        disk, memory = Spread.of(disks), Spread.of(rate["memory"] for rate in products)
        experts = Spread.of(rate["kernels"][str(self.rows)] for rate in products)
        trunk = Spread.of(rate["kernels"][str(work.step_tokens)] for rate in products)
        rates_json = {
            "disk_bytes_per_s": disk.to_json(),
            "disk_by": self.reads.by,
            "disk_depth": LOADERS,
            "experts_bytes_per_s": experts.to_json(),
            "experts_rows": self.rows,
            "trunk_bytes_per_s": trunk.to_json(),
            "memory_bytes_per_s": memory.to_json(),
        }
        notes = [
            f"disk     {disk.text(GB)} GB/s, random records of {format_bytes(self.reads.block_bytes)}, {LOADERS} in "
            f"flight, by {self.reads.by}",
            f"kernels  {experts.text(GB)} GB/s of records with {self.rows} rows an expert; memory {memory.text(GB)} "
            f"GB/s by {products[-1]['memory_by']}",
        ]
        return BoundRates(disk.median, experts.median, trunk.median, memory.median), rates_json, notes


def result_of(
    limits: RunLimits, runs: list[dict[str, Any]], work: Work, floor: Floor, rates: BoundRates
) -> dict[str, Any]:
    """Return the result of one combination of --limit and --ram as JSON, in bytes and seconds.

    ``limits``: the combination; ``runs``: results of ``child.model`` with it, by round. A step is one of the timed
    pieces of ``work``.
    """
    tokens = work.measured * work.step_tokens
    speed = Spread.of(tokens / sum(run["seconds"]) for run in runs)
    steps = Spread.of(second for run in runs for second in run["seconds"])
    used = runs[0]["slots"]
    permitted = floor.slots(limits, used)
    need = need_of(floor.manifest, floor.routing, work.measured, permitted, floor.trunk_bytes)
    bound = Bound.of(need, rates)
    attainable = work.step_tokens / bound.seconds
    return {
        "limit_bytes": limits.limit,
        "ram": limits.ram,
        "slots": sum(used.values()),
        "permitted_slots": sum(permitted.values()),
        "records": floor.manifest.record_count,
        "tokens_per_s": speed.to_json(),
        "bound_tokens_per_s": attainable,
        "bound_by": bound.by,
        "bound_s": bound.to_json(),
        "ratio": speed.median / attainable,
        "step_s": {"median": steps.median, "min": steps.min, "max": steps.max},
        "hit_ratio": statistics.median(run["hits"] / max(run["hits"] + run["misses"], 1) for run in runs),
        "bytes_read_per_token": statistics.median(run["bytes_read"] / tokens for run in runs),
        "need_bytes": {"missing": need.missing, "experts": need.experts, "trunk": need.trunk},
        "load_s": Spread.of(run["load_s"] for run in runs).to_json(),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "group_peak_bytes": None if limits.limit is None else max(run["group_peak_bytes"] for run in runs),
    }


def _reading(result: dict[str, Any]) -> str:
    """Return a sentence that says what a row means; it begins with the row's limits, if it has some."""
    limits, need = RunLimits(result["limit_bytes"], result["ram"]).words, result["need_bytes"]
    said = verdict(result["ratio"], result["bound_by"], need["experts"] + need["trunk"], need["missing"])
    return f"{limits}: {said}" if limits else said


def _row(result: dict[str, Any]) -> list[str]:
    """Return a row of the table, in the order of TABLE."""
    step = result["step_s"]
    return [
        "-" if result["limit_bytes"] is None else format_bytes(result["limit_bytes"]),
        result["ram"] or "-",
        f"{result['slots']} of {result['records']} (bound: {result['permitted_slots']})",
        Spread(tuple(result["tokens_per_s"]["runs"])).text(),
        f"{result['bound_tokens_per_s']:.2f}",
        result["bound_by"],
        f"{result['ratio']:.2f}",
        f"{1e3 * step['median']:.1f} ({1e3 * step['min']:.1f} to {1e3 * step['max']:.1f})",
        f"{result['hit_ratio']:.1%}",
        format_bytes(result["bytes_read_per_token"]),
        format_bytes(result["peak_bytes"]),
        "-" if result["group_peak_bytes"] is None else format_bytes(result["group_peak_bytes"]),
    ]
