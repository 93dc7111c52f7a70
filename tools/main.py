"""The ``moetier`` command: find the subcommand, run it, and print errors in two lines."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence

from moetier.tiers.errors import ConfigError, MoetierError
from moetier.tools.cli.parser import (
    EXIT_USAGE,
    CommandParser,
    UsageError,
    add_commands,
    by_name,
    commands_of,
    parsers_of,
    settable,
)
from moetier.tools.cli.settings import Setting, Settings, is_anything_set, mentioned

COMMANDS = {  # name -> its line in --help
    "plan": "say whether a model will run here, and how fast, before it is downloaded",
    "pull": "download a model and convert it on the way, file by file",
    "list": "list the models that were pulled",
    "rm": "remove pulled models",
    "convert": "turn a Hugging Face checkpoint into a model directory with quantised experts",
    "mirror": "copy the experts to another disk, and read from both disks at once",
    "generate": "generate text from a prompt",
    "chat": "talk with a model",
    "serve": "serve a model over HTTP, with the OpenAI API",
    "verify": "check all weights against their checksums",
    "inspect": "show what a model directory holds",
    "quality": "measure what quantised weights cost: bytes, error, perplexity",
    "synthetic": "make a model of a large geometry with random weights",
    "trace": "record which experts the routers choose and predict",
    "replay": "simulate tiers on traces: hit ratios by policy, recall of predictions, bytes and speed",
    "plot": "draw a trace, or which experts a daemon holds",
    "daemon": "hold the experts of models in memory for all processes of this machine",
    "ps": "list the daemons that run on this machine",
    "stats": "show the counters of a daemon",
    "top": "watch a daemon on a full screen",
    "bench": "measure the disk, the kernels, decoding, prefill and conversion, each beside its bound",
    "doctor": "check this machine and, if one is named, a model directory",
    "config": "show what is set for commands, by a file or in the environment",
    "completion": "print a script that completes commands in a shell",
}

_log = logging.getLogger(__name__)

# docs/commands.md lists all exit codes; parser.py defines 2, failure.py 1 and 70
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_PIPE_CLOSED = 128 + signal.SIGPIPE
LOG_LEVELS = ("debug", "info", "warning", "error")
FIRST = """\
first steps:
  moetier doctor           # check this machine
  moetier plan ORG/NAME    # will this model of the Hugging Face hub run here, and how fast?
  moetier pull ORG/NAME    # download and convert it
  moetier generate ORG/NAME "To be, or not to be"

moetier COMMAND --help shows the options of a command."""


class _Version(argparse.Action):
    """Print the version. Only this imports importlib.metadata, as that takes a while."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"moetier {version('moetier')}")
        parser.exit()


def build_parser() -> CommandParser:
    """Return the parser of the whole command line.

    A command's module is imported when the command is named; torch, transformers and zarr only when it runs.
    """
    parser = CommandParser(
        prog="moetier",
        description="Run Mixture-of-Experts language models on machines that are too small for them.",
        epilog=FIRST,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    add_commands(parser, COMMANDS, "moetier.tools.commands", "COMMAND")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``, by default sys.argv's, and return the exit code.

    Errors are printed in two lines, or raised with MOETIER_DEBUG=1. Raises SystemExit as argparse does.
    """
    # turns off gRPC's own messages; it reads this variable when it is imported
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the stream was closed when the process began
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115 - open until the process ends
    try:
        return _run(argv)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BrokenPipeError:  # Python flushes again when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return EXIT_PIPE_CLOSED


def _run(argv: Sequence[str] | None) -> int:
    """Run the command line and return the exit code. Raises BrokenPipeError if the reader of the output is gone."""
    settings: list[Setting] = []
    try:
        _set_up_log()
        arguments, settings = parse(argv)
        status: int = arguments.run(by_name(arguments))
        sys.stdout.flush()
    except SystemExit:  # raised by --help
        sys.stdout.flush()
        raise
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
    """Return the parsed arguments, in which the command line overrides the settings, and the settings of the command.

    ``arguments.configured`` has the values from the settings, by name of the attribute. Raises ConfigError, and
    SystemExit as argparse does.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    command = parsers_of(parser)[arguments.command]
    options = settable(command)
    if not options or not is_anything_set():  # reading settings imports the module of every command
        return arguments, []
    settings = Settings(commands_of(parser))
    for said in settings.unknown_variables:
        _log.warning("%s", said)
    found = [setting for setting in settings.of(arguments.command) if not setting.is_default]
    settings.check()
    if found:
        values = {options[setting.key].dest: setting.value for setting in found}
        command.set_defaults(**values, configured=values)
        arguments = parser.parse_args(argv)
    return arguments, found


def _set_up_log() -> None:
    """Set up the log: warnings, or from the level of MOETIER_LOG on, in printable characters. Raises ConfigError.

    Messages may quote a daemon of another host, which could send characters that control the terminal.
    """
    from moetier.tools.cli.failure import PlainFormatter

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
    """Print an error in two lines, and return the exit code."""
    from moetier.tools.cli.failure import EXIT_ERROR, as_options, failure_of, plain

    said, code = (error, EXIT_ERROR) if isinstance(error, MoetierError) else failure_of(error)
    code = EXIT_USAGE if isinstance(error, UsageError) else code
    said = MoetierError(as_options(said.cause), as_options(said.fix))
    print(f"moetier: {plain(said.cause)}\n  {plain(said.fix)}{mentioned(settings, said)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
