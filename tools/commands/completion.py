"""``moetier completion SHELL``: print a script that completes commands and options in a shell."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = ("moetier completion bash > ~/.local/share/bash-completion/completions/moetier",)

SHELLS = ("bash", "zsh")
FOLDERS = ("DIR", "DST", "FOLDER")  # metavars of arguments that are folders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier completion`."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=f"the shell: {' or '.join(SHELLS)}")


def run(arguments: argparse.Namespace) -> None:
    """Print the script."""
    print(script(arguments.shell))


def script(shell: str) -> str:
    """Return a script with which ``shell`` completes commands, options, and the names of files and folders."""
    import shtab

    from moetier.tools.cli.parser import commands_of, directory, file_or_address, settable, walk
    from moetier.tools.main import build_parser

    parser = build_parser()
    with_settings = [name for name, command in commands_of(parser).items() if settable(command)]
    for _, subparser in walk(parser):
        for action in subparser._actions:
            if action.metavar == "COMMAND" and not action.choices:  # the argument of moetier config show
                action.choices = with_settings
            if action.type in (Path, directory, file_or_address):
                folder = isinstance(action.metavar, str) and action.metavar in FOLDERS
                action.complete = shtab.DIRECTORY if folder else shtab.FILE  # type: ignore[attr-defined]  # for shtab
    return shtab.complete(parser, shell=shell)
