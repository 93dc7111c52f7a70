"""Options, alternating runs and output that all ``moetier bench`` commands share.

The things that are compared are called ways. Each way runs once in each round. The order changes from round to round,
so that fluctuations of the machine affect all ways alike.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from moetier.tiers.errors import TargetError
from moetier.tiers.options import COUNT
from moetier.tools.cli.report import format_seconds, table
from moetier.tools.rates.hardware import CpuTimes, Machine, busy

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Spread:
    """Values of several runs."""

    runs: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Make a spread of any number of values."""
        return cls(tuple(values))

    @property
    def median(self) -> float:
        """Median of the runs."""
        return statistics.median(self.runs)

    @property
    def min(self) -> float:
        """Least of the runs."""
        return min(self.runs)

    @property
    def max(self) -> float:
        """Greatest of the runs."""
        return max(self.runs)

    def to_json(self) -> dict[str, Any]:
        """Return median, range and all runs as JSON."""
        return {"median": self.median, "min": self.min, "max": self.max, "runs": list(self.runs)}

    def text(self, unit: float = 1.0, digits: int = 2) -> str:
        """Return the median and the range in multiples of ``unit``: "1.20 (1.10 to 1.30)"."""
        middle, low, high = (f"{value / unit:.{digits}f}" for value in (self.median, self.min, self.max))
        return middle if len(self.runs) == 1 else f"{middle} ({low} to {high})"


class BenchInterrupted(KeyboardInterrupt):
    """Ctrl-C has ended the runs. ``results`` has those that ended before, as ``alternate`` would return them."""

    def __init__(self, results: dict[Any, list[Any]]) -> None:
        super().__init__()
        self.results = results


def alternate(
    rounds: int,
    ways: Mapping[K, Callable[[], T]],
    *,
    until: float = math.inf,
    say: Callable[[str], None] = lambda line: None,
) -> dict[K, list[T]]:
    """Run each of ``ways`` once in each round. Return the results of each way, in the order of the rounds.

    Each round begins with another way; every second round goes through the ways in reverse. After the first round, none
    begins that would not end before ``until``, a time of ``time.monotonic``, if it took as long as the longest. Before
    each run, ``say`` is called with a line of progress. Raises BenchInterrupted at Ctrl-C.
    """
    results: dict[K, list[T]] = {name: [] for name in ways}
    names, times = [*ways], [time.monotonic()]
    for number in range(rounds):
        longest = max((end - begin for begin, end in pairwise(times)), default=0.0)
        if number and times[-1] + longest > until:
            break
        first = number % len(names)
        order = names[first:] + names[:first]
        left = f", about {format_seconds((rounds - number) * longest)} left" if number else ""
        try:
            for name in order if number % 2 == 0 else reversed(order):
                say(f"round {number + 1} of {rounds}{left}: {name}")
                results[name].append(ways[name]())
        except KeyboardInterrupt:
            raise BenchInterrupted(results) from None
        times.append(time.monotonic())
    return results


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all `moetier bench` commands share."""
    parser.add_argument(
        "--rounds",
        type=COUNT,
        default=3,
        metavar="N",
        help="times that everything is run, by turns (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file, as one JSON object")


def begin_bench(arguments: argparse.Namespace) -> CpuTimes:
    """Return the CPU times at the beginning, for ``report``. Raises TargetError if --json names no existing folder."""
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise TargetError(
            f"There is no folder {arguments.json.parent}.", "Make it, or give --json a path in another folder."
        )
    return CpuTimes.read()


def report(
    arguments: argparse.Namespace,
    began: CpuTimes,
    machine: Machine,
    rows: list[list[str]],
    results: list[dict[str, Any]],
    *,
    notes: list[str] | None = None,
    ends: list[str] | None = None,
    interrupted_in: int | None = None,
    **more: Any,
) -> None:
    """Print the machine, the table ``rows``, the ``notes``, and ``ends``, sentences that say what the table means.

    With --json, write the results to a file too. It has the machine, the notes, ``results`` (a JSON object for each row
    of the table) and the fields ``more``. A note says if other processes used the CPUs since ``began``.

    ``interrupted_in``: the round in which Ctrl-C has ended the runs; None: it has not. If it has, this raises
    KeyboardInterrupt at the end.
    """
    from moetier.tiers.store.atomic import write_durably

    rounds = str(arguments.rounds)
    if interrupted_in is not None:
        rounds += f", interrupted in round {interrupted_in}"
        more["interrupted_in"] = interrupted_in
    notes = [*(notes or []), *busy_notes(began)]
    print(machine.text())
    print(f"rounds   {rounds}: median (least to most)")
    print(table(rows))
    for line in (*notes, *(ends or [])):
        print(line)
    if arguments.json is not None:
        document = {
            "command": arguments.what,
            "rounds": arguments.rounds,
            "machine": asdict(machine),
            "notes": notes,
            **more,
            "results": results,
        }
        write_durably(arguments.json, json.dumps(document, indent=2).encode() + b"\n")
    if interrupted_in is not None:
        raise KeyboardInterrupt


def busy_notes(began: CpuTimes) -> list[str]:
    """Return a note that other processes used the CPUs since ``began``; none if that changes little."""
    said = busy(began.used_by_others())
    return [f"busy     {said} meanwhile: without them it may be twice as fast; run it again then"] if said else []
