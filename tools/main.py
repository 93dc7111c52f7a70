"""The ``moetier`` command: finds the subcommand, runs it, and says errors in two lines."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from moetier.tiers.errors import MoetierError

COMMANDS = (
    *("plan", "convert", "generate", "verify", "inspect", "quality", "synthetic"),
    *("trace", "replay", "plot", "daemon", "ps", "stats", "bench"),
)

EXIT_ERROR = 1  # 2 is argparse's own
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_PIPE_CLOSED = 128 + signal.SIGPIPE


class IntermixedParser(argparse.ArgumentParser):
    """Takes positional arguments on both sides of options: ``generate DIR --ram 6GiB PROMPT``."""

    _inside = False

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]  # as argparse declares it
        if self._inside or self._subparsers is not None:  # argparse's own passes; who has commands has no arguments
            return super().parse_known_args(args, namespace)
        self._inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False


def build_parser() -> argparse.ArgumentParser:
    """Every command's module is light: torch, transformers and zarr are imported when it runs."""
    parser = argparse.ArgumentParser(
        prog="moetier", description="Run Mixture-of-Experts language models on machines that are too small for them."
    )
    parser.add_argument("--version", action="version", version=f"moetier {version('moetier')}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=IntermixedParser)
    for name in COMMANDS:
        module = import_module(f"moetier.tools.{name}")
        subparser = subparsers.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    # gRPC's own messages are not for people who use this; it reads this when it is imported
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except MoetierError as error:
        if os.environ.get("MOETIER_DEBUG") == "1":
            raise
        print(f"moetier: {error.cause}\n  {error.fix}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("moetier: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE_CLOSED
    return status


if __name__ == "__main__":
    sys.exit(main())
