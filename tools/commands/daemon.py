"""``moetier daemon DIR``: hold the experts of models in memory, for this machine's processes and for other hosts."""

from __future__ import annotations

import argparse
import importlib.util
import os
from dataclasses import replace

from moetier.runtime.daemon.daemon_config import DAEMON_OPTIONS, DaemonConfig
from moetier.tools.cli.arguments import add_options
from moetier.tools.cli.parser import checked, directory

EXAMPLES = (
    "moetier daemon ./mixtral-4bit --ram 12GiB",
    "moetier daemon ./mixtral-4bit ./qwen3-4bit --folder work --metrics 9090",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier daemon`."""
    parser.add_argument(
        "directories",
        type=directory,
        nargs="+",
        metavar="DIR",
        help="model directories, names that moetier list shows, folders of checkpoints, GGUF files, or addresses in "
        "an object store",
    )
    add_options(parser, DAEMON_OPTIONS.values())


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT, and return 0. Raises UsageError, or MoetierError if the daemon can't start."""
    from moetier.runtime.daemon.entry import serve
    from moetier.runtime.daemon.log import log_to_stderr
    from moetier.runtime.model.names import listed_name, note_use_of
    from moetier.tiers.errors import ConfigError

    if arguments.metrics and importlib.util.find_spec("prometheus_client") is None:
        raise ConfigError(
            "moetier daemon --metrics needs prometheus_client, which is not installed.",
            'In the repository of moetier, run: pip install ".[metrics]"',
        )
    if arguments.ready_fd is not None:
        try:
            os.set_inheritable(arguments.ready_fd, False)
        except (OSError, OverflowError):
            raise ConfigError(
                f"--ready-fd: the file descriptor {arguments.ready_fd} is not open.",
                "Give the number of a descriptor that the daemon inherits.",
            ) from None
    with checked():
        config = DaemonConfig.of(
            tuple(arguments.directories),
            **{field: getattr(arguments, option.name) for field, option in DAEMON_OPTIONS.items()},
        )
    for directory_of_model in arguments.directories:
        note_use_of(directory_of_model)
    log_to_stderr()
    return serve(replace(config, names=tuple(listed_name(model) or "" for model in config.directories)))
