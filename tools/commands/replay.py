"""``moetier replay T.npz``: simulate tiers on a trace, with the eviction policies that tiers use."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from moetier.runtime.config import Size
from moetier.tiers.cache.policies import DEFAULT_POLICY, POLICIES
from moetier.tiers.options import TINY, Number
from moetier.tiers.text import format_bytes
from moetier.tools.cli.arguments import size
from moetier.tools.cli.failure import plain
from moetier.tools.cli.parser import UsageError, add_json

EXAMPLES = (
    "moetier replay trace.npz",
    "moetier replay trace.npz --slots 2,4 --policy lru,lrfu --record 84MiB --disk 3.5",
)

SLOTS = Number(int, 1, 32_767)
RATE = Number(float, TINY, 1e6, "Give a speed in GB/s: more than 0, and 1,000,000 at most.")
MILLISECONDS = Number(float, 0, 1e6, "Give 0 to 1,000,000 milliseconds.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier replay`."""
    parser.add_argument("traces", type=Path, nargs="+", metavar="T.npz", help="traces, as moetier trace records them")
    parser.add_argument(
        "--slots",
        type=_numbers,
        metavar="N,M-P",
        help="numbers of experts of each block to cache (default: all numbers up to 8, or eighths of a block that has "
        "more than 8 experts)",
    )
    parser.add_argument(
        "--policy",
        type=_policies,
        metavar="NAMES",
        help=f"{', '.join(POLICIES)}: policies of tiers; learned: lru that begins with the experts used most in "
        "earlier sequences; belady: the upper bound (default: all)",
    )
    parser.add_argument(
        "--device-slots",
        type=SLOTS,
        default=0,
        metavar="N",
        help="number of experts of each block in a device tier, which is then simulated, too, with the same policy "
        f"({DEFAULT_POLICY} instead of learned and belady)",
    )
    speed = parser.add_argument_group("speed")
    speed.add_argument("--record", type=size, metavar="SIZE", help="size of an expert, as moetier inspect shows it")
    speed.add_argument("--disk", type=RATE, metavar="GB/S", help="speed at which misses are read")
    speed.add_argument("--link", type=RATE, metavar="GB/S", help="speed at which the device tier's misses are copied")
    speed.add_argument(
        "--compute",
        type=MILLISECONDS,
        default=0.0,
        metavar="MS",
        help="time to compute a token if all experts are in memory (default: %(default)g)",
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Simulate tiers on the traces, and print the results.

    Raises ConfigError for a file that is not a trace, UsageError for options that contradict each other.
    """
    from moetier.tools.traces.replay import Costs, replay

    record = Size.parse(arguments.record).bytes if arguments.record is not None else None
    if arguments.record is not None and record is None:
        raise UsageError(f"--record can't be {arguments.record!r}.", "Give the size of an expert, such as 84MiB.")
    if (arguments.disk or arguments.link) and record is None:
        raise UsageError("--disk and --link have no effect without the size of an expert.", "Give --record, too.")
    if arguments.link and not arguments.device_slots:
        raise UsageError("--link has no effect without a device tier.", "Give --device-slots, too.")
    costs = Costs(record, arguments.disk, arguments.link, arguments.compute)
    reports = [
        replay(path, arguments.slots, arguments.policy, arguments.device_slots, costs) for path in arguments.traces
    ]
    print(json.dumps({"traces": reports}, indent=2) if arguments.json else "\n\n".join(map(_text, reports)))


def _text(report: dict[str, Any]) -> str:
    from moetier.runtime.trace.recall import RULES, Comparison
    from moetier.tools.cli.report import table

    results = report["results"]
    policies = list(dict.fromkeys(result["policy"] for result in results))
    by = {(result["slots"], result["policy"]): result for result in results}
    slots = sorted({number for number, _ in by})
    lines = [
        f"{report['trace']}{': ' + plain(report['model']) if report['model'] else ''}",
        f"{report['tokens']:,} tokens ({report['prompt_tokens']:,} of prompts) in {report['sequences']} sequences; "
        f"{report['blocks']} blocks of {report['experts']} experts, top-{report['top_k']}",
    ]

    if report["tokens"] == report["prompt_tokens"]:
        lines.append("Nothing was decoded: the trace has only prompts.")

    def show(title: str, name: str, template: str) -> None:
        if report["tokens"] == report["prompt_tokens"] or not all(name in result for result in results):
            return
        rows = [["slots", *policies]]
        for number in slots:
            values = [by[number, policy][name] for policy in policies]
            rows.append(
                [str(number), *(format_bytes(v) if template == "bytes" else format(v, template) for v in values)]
            )
        lines.append(f"\n{title}\n{table(rows)}")

    show("hit ratio while decoding, for numbers of cached experts of each block", "hit_ratio", ".3f")
    show("hit ratio of the device tier", "device_hit_ratio", ".3f")
    show("experts loaded per token", "loads_per_token", ".1f")
    show("bytes read per token", "bytes_per_token", "bytes")
    show("tokens per second, without overlap of reading and computing", "tokens_per_s", ".2f")
    if report["recall"]:
        compared = [Comparison(**entry) for entry in report["recall"]]
        rows = [["look-ahead", *RULES], *([str(recall.lookahead), *recall.cells()] for recall in compared)]
        lines.append(f"\nrecall of the experts that were used\n{table(rows)}")
    return "\n".join(lines)


def _numbers(text: str) -> list[int]:
    """Parse numbers and ranges: "1-4,8" becomes [1, 2, 3, 4, 8]."""
    numbers = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        numbers |= set(range(int(SLOTS(first)), int(SLOTS(last if dash else first)) + 1))
    if not numbers:
        raise argparse.ArgumentTypeError(f"{text!r} names no number")
    return sorted(numbers)


def _policies(text: str) -> list[str]:
    from moetier.tools.traces.simulation import SIMULATED

    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in SIMULATED]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not among {', '.join(SIMULATED)}")
    return names
