"""The ``moetier`` command: finds the subcommand, runs it, and says errors in two lines."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from moetier.tiers.errors import ConfigError, MoetierError
from moetier.tools.cli.options import arguments_by_name, by_name, commands_of, settable
from moetier.tools.cli.parser import EXIT_USAGE, CommandParser, UsageError

if TYPE_CHECKING:
    from moetier.tools.cli.settings import Setting

COMMANDS = (
    *("plan", "pull", "list", "rm", "convert", "generate", "chat", "serve"),
    *("verify", "inspect", "quality", "synthetic"),
    *("trace", "replay", "plot", "daemon", "ps", "stats", "top", "bench"),
    *("doctor", "config", "completion"),
)

_log = logging.getLogger(__name__)

# docs/commands.md has the table; 2 is command_line.py's, 1 and 70 are failure.py's
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_PIPE_CLOSED = 128 + signal.SIGPIPE
LOG_LEVELS = ("debug", "info", "warning", "error")


def build_parser() -> argparse.ArgumentParser:
    """Every command's module is light: torch, transformers and zarr are imported when it runs."""
    parser = CommandParser(
        prog="moetier", description="Run Mixture-of-Experts language models on machines that are too small for them."
    )
    parser.add_argument("--version", action="version", version=f"moetier {version('moetier')}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f"moetier.tools.commands.{name}")
        subparser = subparsers.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run, configured={}, by_name=arguments_by_name(subparser))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    # gRPC's own messages are not for people who use this; it reads this when it is imported
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it was closed when the process began
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115 - for as long as that
    try:
        return _run(argv)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BrokenPipeError:  # nor is it tried again when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return EXIT_PIPE_CLOSED


def _run(argv: Sequence[str] | None) -> int:
    """Raises BrokenPipeError where nobody reads what is said."""
    settings: list[Setting] = []
    try:
        _set_up_log()
        arguments, settings = parse(argv)
        status: int = arguments.run(by_name(arguments))
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("moetier: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get("MOETIER_DEBUG") == "1":
            raise
        return say(error, settings)
    return status


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[Setting]]:
    """A command line, above what is set beforehand, and that. ``configured`` is its part that is not the default's, by
    name of the attribute. Raises ConfigError; SystemExit as argparse does."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    command = commands_of(parser)[arguments.command]
    options = settable(command)
    if not options:
        return arguments, []
    from moetier.tools.cli.settings import Settings

    settings = Settings.read(commands_of(parser))
    for said in settings.unknown_variables:
        _log.warning("%s", said)
    found = [setting for setting in settings.of(arguments.command) if not setting.is_default]
    if found:
        values = {options[setting.key].dest: setting.value for setting in found}
        command.set_defaults(**values, configured=values)
        arguments = parser.parse_args(argv)
    return arguments, found


def _set_up_log() -> None:
    """Nothing but warnings unless MOETIER_LOG asks for more; all in what can be read, as a daemon of another host may
    have said it. Raises ConfigError."""
    from moetier.tools.cli.plain import PlainFormatter

    level = os.environ.get("MOETIER_LOG", "")
    if level and level not in LOG_LEVELS:
        raise ConfigError(f"MOETIER_LOG is {level!r}.", f"Set it to one of {', '.join(LOG_LEVELS)}.")
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(PlainFormatter())
    if level:
        handler = logging.StreamHandler()
        handler.setFormatter(PlainFormatter("%(levelname)s %(name)s: %(message)s"))
        logging.basicConfig(level=level.upper(), handlers=[handler])


def say(error: Exception, settings: Sequence[Setting] = ()) -> int:
    """Print two lines, and return the exit code."""
    from moetier.tools.cli.failure import EXIT_ERROR, failure_of
    from moetier.tools.cli.plain import as_options, plain
    from moetier.tools.cli.settings import mentioned

    said, code = (error, EXIT_ERROR) if isinstance(error, MoetierError) else failure_of(error)
    code = EXIT_USAGE if isinstance(error, UsageError) else code
    said = MoetierError(as_options(said.cause), as_options(said.fix))
    print(f"moetier: {plain(said.cause)}\n  {plain(said.fix)}{mentioned(settings, said)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
