"""The ``moetier`` command: find the subcommand, run it, and print an error as two lines, its cause and its fix."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence

from moetier.tiers.errors import ConfigError, MoetierError
from moetier.tiers.redaction import redacted
from moetier.tools.cli.failure import DEBUG
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
from moetier.tools.cli.settings import LOG, Setting, Settings, is_anything_set, mentioned

GROUPS = {  # titles in --help -> names of commands -> their lines in --help; the first group has what most people need
    "": {
        "doctor": "check this machine and, optionally, a model directory",
        "plan": "estimate whether a model will run on this machine, and how fast, before downloading it",
        "pull": "download a model, converting it file by file",
        "list": "list the models that were pulled, converted and linked",
        "convert": "turn a Hugging Face checkpoint into a model directory with quantised experts",
        "generate": "generate text from a prompt",
        "chat": "chat with a model",
        "serve": "serve models over HTTP, with OpenAI's and Anthropic's APIs",
        "daemon": "hold the experts of models in memory for all processes of this machine",
    },
    "look": {
        "demo": "convert the bundled model, and generate with memory for a quarter of its experts",
        "inspect": "show what a model directory holds",
        "ps": "list your running daemons on this machine",
        "stats": "show the counters of a daemon",
        "top": "watch a daemon on a full screen",
        "config": "show the settings from the settings file and the environment",
    },
    "measure": {
        "bench": "measure the disk, the kernels, decoding, prefill and conversion, each with its upper bound",
        "quality": "measure the size, the error and the perplexity of quantised weights",
        "trace": "record which experts the routers choose and predict",
        "replay": "simulate tiers on traces: hit ratios of policies, recall of predictions, bytes and speed",
        "plot": "draw a trace, or the experts that a daemon holds",
        "synthetic": "make a model with the shapes of a large model and random weights",
    },
    "maintain": {
        "rm": "remove models",
        "verify": "check all weights against their checksums",
        "link": "make checksums of a checkpoint that is used as it is, without a conversion",
        "mirror": "copy the experts to another disk, so that both disks are read at once",
        "cache": "list or remove keys and values that servers keep on disk",
        "completion": "print a script for tab completion in a shell",
    },
    "other programs and machines": {
        "launch": "configure a program for coding, such as opencode, for a server, and start it",
        "push": "copy a model directory to an object store, from which it can be used",
        "ray": "serve a model on a Ray cluster, with Ray Serve",
    },
}
COMMANDS = {name: line for commands in GROUPS.values() for name, line in commands.items()}

OF_OTHERS = {  # advice about Ollama's commands
    "run": "For a conversation: moetier chat NAME. ",
    "show": "What a model is: moetier inspect NAME. ",
    "stop": "Ctrl-C ends a server or a daemon; moetier ps shows daemons. ",
    "create": "To make a model: moetier convert SRC DST. ",
}

_log = logging.getLogger(__name__)
_is_whole = threading.Event()  # set if nothing but ``command`` runs in this process

# docs/commands.md lists all exit codes; parser.py defines 2, failure.py 1 and 70
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_PIPE_CLOSED = 128 + signal.SIGPIPE
LOG_LEVELS = ("debug", "info", "warning", "error")
FIRST = """\
Run Mixture-of-Experts models on machines that are too small for them.

first steps:
  moetier demo             # see a small model run, with a quarter of its experts in memory
  moetier doctor           # check this machine
  moetier plan ORG/NAME    # will this model from the Hugging Face hub run here, and how fast?
  moetier pull ORG/NAME    # download and convert it
  moetier chat ORG/NAME

moetier COMMAND --help shows the options of a command."""


class _Version(argparse.Action):
    """Print the version. The slow import of importlib.metadata happens only if ``--version`` is given."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"moetier {version('moetier')}")
        parser.exit()


def build_parser() -> CommandParser:
    """Return the parser of the whole command line.

    The module of a command is imported only if the command line names the command. torch, transformers and zarr are
    imported only when a command runs.
    """
    parser = CommandParser(
        prog="moetier",
        description=FIRST,
    )
    parser.of_others = OF_OTHERS
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    add_commands(parser, GROUPS, "moetier.tools.commands", "COMMAND")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``, which defaults to ``sys.argv[1:]``, and return the exit code.

    An error is printed as two lines; with MOETIER_DEBUG=1 in the environment it is raised instead. Raises SystemExit
    for --help, --version and a wrong command line, as argparse does.
    """
    # turns off gRPC's own messages; gRPC reads this variable when it is imported
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the stream was closed when the process began
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115 - open until the process ends
    if not faulthandler.is_enabled():
        # a fault, such as a SIGBUS of a mapped file that was cut, prints the line of code at which the process ends
        # it may be a stream of another program, with no descriptor
        with contextlib.suppress(OSError, ValueError, AttributeError):
            faulthandler.enable()
    try:
        return _run(argv)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BrokenPipeError:  # Python flushes the stream again when it exits: let it write to /dev/null
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return EXIT_PIPE_CLOSED


def command() -> int:
    """Run the command line as the whole work of this process, and return the exit code.

    When the work has ended, Ctrl-C ends the process at once: Python still ends threads then, and would print a
    traceback.
    """
    _is_whole.set()
    try:
        return main()
    finally:
        _let_interrupts_end()


def _let_interrupts_end() -> None:
    if _is_whole.is_set() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _run(argv: Sequence[str] | None) -> int:
    """Run the command line and return the exit code. Raises BrokenPipeError if the reader of the output is gone."""
    settings: list[Setting] = []
    try:
        _set_up_log()
        arguments, settings = parse(argv)
        status: int = arguments.run(by_name(arguments)) or 0
        sys.stdout.flush()
    except SystemExit:  # raised by --help, for example
        sys.stdout.flush()
        raise
    except KeyboardInterrupt:
        _let_interrupts_end()
        print("moetier: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get(DEBUG) == "1":
            raise
        return say(error, settings)
    return status


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[Setting]]:
    """Return the parsed arguments, and the settings that the file or the environment gives for the command.

    The command line overrides the settings. ``arguments.configured`` is a dictionary from the names of attributes to
    their values in the settings. Raises ConfigError for an invalid setting, and SystemExit as argparse does.
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
    changed = [setting for setting in settings.of(arguments.command) if not setting.is_default]
    settings.check()
    if changed:
        values = {options[setting.key].dest: setting.value for setting in changed}
        command.set_defaults(**values, configured=values)
        arguments = parser.parse_args(argv)
    return arguments, changed


def _set_up_log() -> None:
    """Log warnings, or messages from the level in MOETIER_LOG up, in printable characters only.

    A message may quote a daemon on another host, which could send characters that control the terminal. Raises
    ConfigError if MOETIER_LOG is not one of LOG_LEVELS.
    """
    from moetier.tools.cli.failure import PlainFormatter

    if (level := os.environ.get(LOG, "")) and level not in LOG_LEVELS:
        raise ConfigError(
            f"{LOG} is {level!r}, which is not a log level.", f"Set it to one of {', '.join(LOG_LEVELS)}."
        )
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(PlainFormatter())
    if level:
        handler = logging.StreamHandler()
        handler.setFormatter(PlainFormatter("%(levelname)s %(name)s: %(message)s"))
        logging.basicConfig(level=level.upper(), handlers=[handler])


def say(error: Exception, settings: Sequence[Setting] = ()) -> int:
    """Print an error as two lines, and return the exit code.

    ``settings`` are those of the command. If the error names some of them, the message says where they are set.
    """
    from moetier.tools.cli.failure import EXIT_ERROR, as_options, failure_of, plain

    said, code = (error, EXIT_ERROR) if isinstance(error, MoetierError) else failure_of(error)
    code = EXIT_USAGE if isinstance(error, UsageError) else code
    said = MoetierError(redacted(as_options(said.cause)), redacted(as_options(said.fix)))
    print(f"moetier: {plain(said.cause)}\n  {plain(said.fix)}{mentioned(settings, said)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(command())
