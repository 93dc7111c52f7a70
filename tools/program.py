"""``python -m moetier [options] -m MODULE [argument ...]``: run a Python program whose models get budgets.

The program loads models by transformers' ``from_pretrained`` and knows nothing of moetier. Without ``-m``, or with the
name of a command first, this is the command line.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

from moetier.tiers.errors import MoetierError
from moetier.tools.cli.parser import CommandParser, UsageError
from moetier.tools.cli.resources import add_resource_arguments, add_speculation_arguments, resources_of

from .main import COMMANDS, say
from .main import main as run_command

EPILOG = "What follows -m MODULE is the program's. Example: python -m moetier --ram 6GiB -m lm_eval --model hf ..."


def main(argv: Sequence[str]) -> int:
    """Return the exit status; that of a program is the program's own."""
    words = list(argv)
    if "-m" not in words or words[0] in COMMANDS:
        return run_command(words)
    at = words.index("-m")
    parser = CommandParser(
        prog="python -m moetier",
        usage="%(prog)s [options] -m MODULE [argument ...]",
        description="Run a Python program. The model directories that it loads with from_pretrained get these budgets.",
        epilog=EPILOG,
    )
    add_resource_arguments(parser)
    add_speculation_arguments(parser)
    if not words[at + 1 :]:
        parser.error("-m needs the name of a module")
    arguments = parser.parse_args(words[:at])
    try:
        options = resources_of(arguments)
        if options.pop("device") != "auto":
            raise UsageError("The program itself says on which device it computes.", "Leave out --device.")
        from moetier.runtime.model.registration import register

        register(**options)
    except MoetierError as error:
        return say(error)
    _, module, *sys.argv[1:] = words[at:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0
