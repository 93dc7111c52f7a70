"""``python -m moetier [options] -m MODULE [argument ...]``: run a Python program, and set the budgets of its models.

The program loads models with transformers' ``from_pretrained``, and needs no code for moetier. If the first word is
the name of a command, this is the same as the ``moetier`` command.
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

EPILOG = "Arguments after -m MODULE go to the program. Example: python -m moetier --ram 6GiB -m lm_eval --model hf ..."


def main(argv: Sequence[str]) -> int:
    """Run a ``moetier`` command or a Python program, and return the exit status.

    ``argv`` has the words after ``python -m moetier``. Exceptions of the program, such as SystemExit, are not caught.
    """
    words = list(argv)
    if not words or words[0] in COMMANDS or words[0] in ("-h", "--help", "--version"):
        return run_command(words)
    if "-m" not in words and not words[0].startswith("-"):
        return run_command(words)
    parser = CommandParser(
        prog="python -m moetier",
        usage="%(prog)s [options] -m MODULE [argument ...]",
        description="Run a Python program. The options apply to model directories that it loads with from_pretrained.",
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
            raise UsageError("The program chooses the device itself, so --device has no effect.", "Leave out --device.")
        from moetier.runtime.model.registration import register

        register(**budgets)
        module, *sys.argv[1:] = program
        _check_module(module)
    except MoetierError as error:
        return say(error)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def _check_module(name: str) -> None:
    """Check that the module ``name`` can be run as a program, without running it. Raises UsageError if it can't."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise UsageError(
            f"There is no module {name!r} that can be run as a program.",
            "Name an installed module that python -m MODULE can run.",
        )
