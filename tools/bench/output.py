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
from moetier.tools.cli.report import table
from moetier.tools.rates.hardware import Machine

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
    each run, ``say`` is called with a line of progress.
    """
    results: dict[K, list[T]] = {name: [] for name in ways}
    names, times = [*ways], [time.monotonic()]
    for number in range(rounds):
        longest = max((end - begin for begin, end in pairwise(times)), default=0.0)
        if number and times[-1] + longest > until:
            break
        first = number % len(names)
        order = names[first:] + names[:first]
        for name in order if number % 2 == 0 else reversed(order):
            say(f"round {number + 1} of {rounds}: {name}")
            results[name].append(ways[name]())
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


def check_bench(arguments: argparse.Namespace) -> None:
    """Raise TargetError if the folder of the --json file does not exist. Call this before measuring."""
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise TargetError(
            f"There is no folder {arguments.json.parent}.", "Make it, or give --json a path in another folder."
        )


def report(
    arguments: argparse.Namespace,
    machine: Machine,
    rows: list[list[str]],
    results: list[dict[str, Any]],
    *,
    notes: list[str] | None = None,
    ends: list[str] | None = None,
    **more: Any,
) -> None:
    """Print the machine, the table ``rows``, the ``notes``, and ``ends``, sentences that say what the table means.

    With --json, write the results to a file too.

    The file has the machine, the notes, ``results`` (a JSON object for each row of the table) and the fields ``more``.
    """
    from moetier.tiers.store.atomic import write_durably

    print(machine.text())
    print(f"rounds   {arguments.rounds}: median (least to most)")
    print(table(rows))
    for line in (*(notes or []), *(ends or [])):
        print(line)
    if arguments.json is not None:
        document = {
            "command": arguments.what,
            "rounds": arguments.rounds,
            "machine": asdict(machine),
            "notes": notes or [],
            **more,
            "results": results,
        }
        write_durably(arguments.json, json.dumps(document, indent=2).encode() + b"\n")
