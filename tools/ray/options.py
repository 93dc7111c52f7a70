"""Options of the application: those of its replicas, and those of the daemons of its nodes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from moetier.runtime.config import CACHE, DEFAULT_SHARE, OF_HOST_TIER, TIER_OPTIONS
from moetier.runtime.model.names import is_address
from moetier.tiers.addresses import check_address
from moetier.tiers.errors import ConfigError
from moetier.tiers.options import COUNT, command_words
from moetier.tools.cli.arguments import SPECULATION, add_options
from moetier.tools.cli.parser import DIRECTORY, CommandParser, add_cache_arguments
from moetier.tools.cli.settings import SWITCH
from moetier.tools.serve.options import OF_REPLICA, add_serving_arguments

# options of TierConfig that the replicas get, while the daemons get those of the host tier
REPLICA = ("context", "kv_cache", "kv_bits", "device", "device_memory", "exact", "same_bits")
# what differs from the options of TierConfig: a node has other CPUs and memory than this machine
CHANGED: dict[str, dict[str, Any]] = {
    "threads": {
        "help": "number of threads that a replica computes with, and of CPUs that Ray reserves for it (default: the "
        "CPUs of the machine on which the application is built)",
        "numbers": COUNT,
        "short": "",
    },
    "ram": {
        "help": 'host memory of each node for experts: "64GiB", which Ray then counts as used, or "50%" of what is '
        f"free (default: {DEFAULT_SHARE:.0%})"
    },
    "context": {"help": "maximum length of a prompt with its answer, in tokens"},
}


def add_application_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model and the options of the application."""
    parser.add_argument("model", type=model, metavar="DIR", help=f"{DIRECTORY}. Each node must have the model there")
    parser.add_argument(
        "--min-replicas",
        type=COUNT,
        default=1,
        metavar="N",
        help="number of replicas that run even if there are no requests (default: %(default)s)",
    )
    parser.add_argument(
        "--max-replicas",
        type=COUNT,
        metavar="N",
        help="maximum number of replicas; they are started as requests wait (default: --min-replicas)",
    )
    add_serving_arguments(parser, OF_REPLICA)
    names = ("threads", *OF_HOST_TIER, *REPLICA)
    add_options(parser, [replace(TIER_OPTIONS[name], **CHANGED.get(name, {})) for name in names])
    add_cache_arguments(parser)


def model(text: str) -> str:
    """Return ``text``, as an absolute path if there is such a path here. This is the argparse type of the model.

    Raises ConfigError for an address with secrets: it becomes an argument of daemons.
    """
    if is_address(text):
        check_address(text)
    return str(Path(text).absolute()) if Path(text).exists() else text


class OptionsParser(CommandParser):
    """Parser that raises ConfigError where a command would print a message and exit."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Raise ConfigError with the two lines of ``message``."""
        cause, _, fix = (message or "").removeprefix("moetier: ").strip().partition("\n")
        raise ConfigError(cause, fix.strip())


def parsed(options: Mapping[str, Any]) -> argparse.Namespace:
    """Return the options of an application, which are given by name, as the command line returns them.

    Values may be texts, as `serve run` gives them; None stands for the default. Raises ConfigError for an unknown
    option and an invalid value.
    """
    parser = OptionsParser(prog="moetier ray")
    add_application_arguments(parser)
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if name == "model":
            words.append(str(value))
        elif value is None:
            continue
        elif name in TIER_OPTIONS and TIER_OPTIONS[name].value_type is bool:
            if (chosen := SWITCH.get(str(value).lower())) is None:
                raise ConfigError(f"{name} can't be {value!r}.", "Give true or false.")
            words.append(f"--{flag}" if chosen else f"--no-{flag}")
        else:
            words.append(f"--{flag}={value}")
    return parser.parse_args(words)


def daemon_words(arguments: argparse.Namespace) -> list[str]:
    """Return the words after `moetier daemon`, without the daemon's folder."""
    return [arguments.model, *command_words((name, getattr(arguments, name)) for name in (*OF_HOST_TIER, *CACHE))]


def replica_resources(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return keyword arguments of ``load`` for a replica, which uses the daemon in ``folder``."""
    values = {name: getattr(arguments, name) for name in ("threads", "prefill_chunk", *REPLICA, *SPECULATION)}
    return values | {"ram": None, "sequences": arguments.parallel, "daemon": str(folder)}
