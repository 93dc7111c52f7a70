"""What every ``moetier bench`` command is told, and how it says what it found."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from moetier.runtime.number import COUNT
from moetier.tiers.errors import TargetError
from moetier.tools.cli.report import table

from .machine import Machine


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounds",
        type=COUNT,
        default=3,
        metavar="N",
        help="times that everything is run, by turns (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file, as one JSON object")


def check_bench(arguments: argparse.Namespace) -> None:
    """Before anything is measured. Raises TargetError."""
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise TargetError(f"{arguments.json.parent} is no folder.", "Make it, or name another with --json.")


def report(
    arguments: argparse.Namespace,
    machine: Machine,
    rows: list[list[str]],
    results: list[dict[str, Any]],
    *,
    notes: list[str] | None = None,
    **more: Any,
) -> int:
    """Prints the machine, the table ``rows`` and ``notes``; writes ``--json``. ``results``: one for each row."""
    from moetier.tiers.store.atomic import write_durably

    print(machine.text())
    print(f"rounds   {arguments.rounds}: median (least to most)")
    print(table(rows))
    for note in notes or []:
        print(note)
    if arguments.json is not None:
        document = {
            "command": arguments.what,
            "rounds": arguments.rounds,
            "machine": machine.to_json(),
            "notes": notes or [],
            **more,
            "results": results,
        }
        write_durably(arguments.json, json.dumps(document, indent=2).encode() + b"\n")
    return 0
