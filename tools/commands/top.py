"""``moetier top``: show a working daemon's counters and experts on the full screen."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys

from moetier.tiers.errors import ConfigError
from moetier.tools.cli.arguments import add_credentials, credentials

from .stats import INTERVAL, address_of

EXAMPLES = ("moetier top", "moetier top work --interval 0.5")

EVERY = 1.0  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description and the options of `moetier top`."""
    parser.description = (
        "Watch a daemon on a full screen: slots, hits and reads, clients, outcomes of prefetches, and which experts "
        "are there and used. The key ? lists the keys. For programs, and where there is no terminal, moetier stats has "
        "the same counters (--json, --watch)."
    )
    parser.add_argument(
        "address",
        nargs="?",
        metavar="ADDRESS",
        help="a name, a folder or HOST:PORT (default: the daemon that runs here, or a list to choose from)",
    )
    parser.add_argument(
        "--interval",
        type=INTERVAL,
        default=EVERY,
        metavar="SECONDS",
        help="time between two looks (default: %(default)g)",
    )
    add_credentials(parser)


def run(arguments: argparse.Namespace) -> int:
    """Show the daemon until the user ends it, and return 0.

    Raises ConfigError without a terminal or without textual, DaemonError where no daemon answers.
    """
    if not all(os.isatty(number) for number in (0, 1, 2)) or os.environ.get("TERM", "dumb") == "dumb":
        raise ConfigError(
            "moetier top needs a terminal that it can draw on, and there is none here.",
            "Use moetier stats. It prints the counters once. --watch prints what changes, --json is for programs.",
        )
    if importlib.util.find_spec("textual") is None:
        raise ConfigError(
            "moetier top needs textual, which is not installed.", 'Install it: pip install ".[tui]" in the repository.'
        )
    from moetier.runtime.wire.probe import running_daemons
    from moetier.tools.top.watch import Watch, look

    found = running_daemons() if arguments.address is None else []
    shown = credentials(arguments)
    address = None
    if len(found) < 2:  # with several, the user chooses one on the screen
        address = address_of(arguments.address)
        look(address, shown)  # raises before anything is drawn

    from moetier.tools.top.app import Top

    logging.disable()  # log lines would be written over the picture
    app = Top(found, address, Watch(shown, arguments.interval))
    app.run()
    sys.stdout.flush()
    return app.return_code or 0
