"""``python -m moetier [options] -m MODULE [argument ...]``: run a Python program, with budgets for its models.

The program loads models with transformers' ``from_pretrained`` and need not know of moetier. Without ``-m``, or with
the name of a command as the first word, this is the same as the ``moetier`` command.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Sequence

from moetier.tiers.errors import MoetierError
from moetier.tools.cli.arguments import add_resource_arguments, add_speculation_arguments, resources_of
from moetier.tools.cli.parser import CommandParser, UsageError

from .main import COMMANDS, say
from .main import main as run_command

EPILOG = "Arguments after -m MODULE are the program's. Example: python -m moetier --ram 6GiB -m lm_eval --model hf ..."


def main(argv: Sequence[str]) -> int:
    """Run a command line or a program, and return the exit status. Raises what the program raises, also SystemExit."""
    words = list(argv)
    if not words or words[0] in COMMANDS or words[0] in ("-h", "--help", "--version"):
        return run_command(words)
    if "-m" not in words and not words[0].startswith("-"):
        return run_command(words)
    parser = CommandParser(
        prog="python -m moetier",
        usage="%(prog)s [options] -m MODULE [argument ...]",
        description="Run a Python program. The model directories that it loads with from_pretrained get these budgets.",
        epilog=EPILOG,
    )
    add_resource_arguments(parser)
    add_speculation_arguments(parser)
    options = words[: words.index("-m")] if "-m" in words else words
    arguments = parser.parse_args(options)
    program = words[len(options) + 1 :]
    try:
        if not program:
            raise UsageError(
                "-m MODULE is missing.", "Name the program to run: python -m moetier --ram 6GiB -m lm_eval"
            )
        budgets = resources_of(arguments)
        if budgets.pop("device") != "auto":
            raise UsageError("The program itself chooses the device.", "Leave out --device.")
        from moetier.runtime.model.registration import register

        register(**budgets)
        module, *sys.argv[1:] = program
        _check_module(module)
    except MoetierError as error:
        return say(error)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def _check_module(name: str) -> None:
    """Check that a module can be run as a program, without running it. Raises UsageError."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise UsageError(f"There is no program {name!r} to run.", "Name an installed module, as with python -m MODULE.")
