"""``moetier doctor [DIR]``: check this machine and a model directory, and say how to correct what is wrong."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moetier.tools.cli.help_format import WIDTH
from moetier.tools.cli.parser import DIRECTORY, add_json, directory

if TYPE_CHECKING:
    from moetier.tools.doctor.machine import Finding

EXAMPLES = ("moetier doctor", "moetier doctor ./mixtral-4bit --checksums")

EXIT_BAD = 1
PROBE_SECONDS = 2.0  # of random reads from the disk


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier doctor`."""
    parser.add_argument(
        "directory",
        type=directory,
        nargs="?",
        metavar="DIR",
        help=f"what to check, with its disk: {DIRECTORY} (default: check the disk of the current folder)",
    )
    parser.add_argument("--checksums", action="store_true", help="read every byte of DIR, as moetier verify does")
    parser.add_argument(
        "--report", action="store_true", help="print a block for a bug report, with the home folder as ~"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; return 1 if a check fails, else 0. Raises ConfigError for --checksums without DIR."""
    from moetier.tiers.errors import ConfigError
    from moetier.tools.doctor.machine import State, lines_of

    if arguments.checksums and arguments.directory is None:
        raise ConfigError("--checksums needs a model directory.", "Name one: moetier doctor DIR --checksums")
    results = []
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    for finding in findings(arguments.directory, checksums=arguments.checksums, seconds=PROBE_SECONDS):
        results.append(finding)
        if not arguments.json and not arguments.report:
            print("\n".join(lines_of([finding], width)), flush=True)
    counts = {str(state): sum(finding.state is state for finding in results) for state in State}
    result = {"counts": counts, "findings": [asdict(finding) for finding in results]}
    text = ", ".join(f"{count} {state}" for state, count in counts.items())
    if arguments.report:
        lines = "\n".join((*lines_of(results, WIDTH), text))
        home = f"{Path.home()}/"
        print("```text\n{}\n```".format(lines if home == "//" else lines.replace(home, "~/")))
    else:
        print(json.dumps(result, indent=2) if arguments.json else text)
    return EXIT_BAD if counts[State.FAIL] else 0


def findings(directory: Path | None, *, checksums: bool = False, seconds: float) -> Iterator[Finding]:
    """Run the checks one after the other, and yield their findings.

    ``directory`` is a model directory to check, too; None: check only the machine. ``checksums`` means to read all
    bytes of the directory. The disk is measured for ``seconds``.
    """
    from moetier.runtime.machine.memory import shortage
    from moetier.tools.doctor import machine, model_directory
    from moetier.tools.doctor.machine import State, fail, findings_of
    from moetier.tools.rates.hardware import CpuTimes

    times = CpuTimes.read()
    light = {"python": machine.python, "libraries": machine.libraries, "config": machine.configuration}
    others: dict[str, Callable[[], Iterator[Finding]]] = {
        "cpu": machine.processor,
        "kernel": machine.kernel,
        "gpu": machine.gpus,
        "memory": partial(model_directory.memory, directory),
        "memfd": machine.memory_files,
        "/dev/shm": machine.shared_memory,
        "daemons": machine.daemons,
    }
    for name, at in light.items():
        yield from findings_of(name, at)
    if short := shortage():
        yield fail("memory", short, "Free some memory, or raise the control group's limit. Other checks were skipped.")
        return
    for name, at in others.items():  # these import torch, which takes memory
        yield from findings_of(name, at)
    if directory is not None:
        of_store = list(findings_of("store", partial(model_directory.health, directory, checksums=checksums)))
        yield from of_store
        if any(finding.state is State.FAIL for finding in of_store):
            return  # broken records can't be used to measure the disk
    yield from findings_of("disk", partial(model_directory.disk, directory, seconds))
    yield from findings_of("load", partial(machine.others, times))
