"""``moetier top``: show the counters and experts of a running daemon on a full screen."""

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
        "are in memory and how often they are used. The key ? lists the keys. Without a terminal, and for programs, "
        "moetier stats prints the same counters (--watch, --json)."
    )
    parser.add_argument(
        "address",
        nargs="?",
        metavar="ADDRESS",
        help="the daemon's name, folder or HOST:PORT (default: the daemon that runs here, or a list to choose from)",
    )
    parser.add_argument(
        "--interval",
        type=INTERVAL,
        default=EVERY,
        metavar="SECONDS",
        help="time between two queries (default: %(default)g)",
    )
    add_credentials(parser)


def run(arguments: argparse.Namespace) -> int:
    """Show the daemon until the user ends it, and return 0.

    Raises ConfigError without a terminal or without textual, DaemonError if no daemon answers.
    """
    if not all(os.isatty(number) for number in (0, 1, 2)) or os.environ.get("TERM", "dumb") == "dumb":
        raise ConfigError(
            "moetier top needs an interactive terminal, and there is none here.",
            "Use moetier stats, which prints the counters once. With --watch it prints what changes; with --json it "
            "prints JSON for programs.",
        )
    if importlib.util.find_spec("textual") is None:
        raise ConfigError(
            "moetier top needs textual, which is not installed.",
            'In the repository of moetier, run: pip install ".[tui]"',
        )
    from moetier.runtime.wire.probe import running_daemons
    from moetier.tools.top.watch import Watch, look

    daemons = running_daemons() if arguments.address is None else []
    shown = credentials(arguments)
    address = None
    if len(daemons) < 2:  # with several, the user chooses one on the screen
        address = address_of(arguments.address)
        look(address, shown)  # raises here, before anything is drawn, if the daemon can't be reached

    from moetier.tools.top.app import Top

    logging.disable()  # log lines would be written over the picture
    app = Top(daemons, address, Watch(shown, arguments.interval))
    app.run()
    sys.stdout.flush()
    return app.return_code or 0
