"""Options of a server that do not depend on how its requests arrive."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
from pathlib import Path

from moetier.runtime.config import Size
from moetier.runtime.engine.page_folder import PageOptions, open_folder
from moetier.runtime.model import names as models
from moetier.tiers.errors import ConfigError
from moetier.tiers.options import COUNT, MAX_COUNT, TINY, Number
from moetier.tools.cli.arguments import add_prefill_argument, add_speculation_arguments, size

from .keys import KEY

QUEUE = Number(int, 0, MAX_COUNT, "Give 0 or more; with 0, a request that can't be computed at once is refused.")
DAY = 86_400.0  # seconds
DAYS = Number(float, TINY, 36_500)
DURATION = re.compile(r"(-?\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h|)")
SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
NEEDED = ("starlette", "uvicorn", "pydantic", "prometheus_client", "llguidance")


def add_serving_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a server that do not depend on how its requests arrive."""
    parser.add_argument(
        "--name", metavar="NAME", help="name of the model in requests (default: the folder's, or the pulled model's)"
    )
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"file that holds, in one line, the key that requests must send (default: the key in ${KEY}). Without a "
        "key, the server answers only programs on this machine",
    )
    parser.add_argument(
        "--api-keys",
        type=Path,
        metavar="FILE",
        help="TOML file with several keys, each with a name, and limits of requests and tokens a minute if you like; "
        "in place of --api-key-file",
    )
    parser.add_argument(
        "--leave-out",
        type=pattern,
        metavar="REGEX",
        help="regular expression of what is left out of system prompts, because a client changes it in every request "
        "(default: nothing)",
    )
    parser.add_argument(
        "--parallel",
        type=COUNT,
        default=8,
        metavar="N",
        help="most requests to compute together, so that they share loaded experts. Their keys and values share "
        "--kv-cache: those for which it has no room wait (default: %(default)s)",
    )
    parser.add_argument(
        "--queue",
        type=QUEUE,
        default=64,
        metavar="N",
        help="number of requests that may wait; further ones are refused with status 429 (default: %(default)s)",
    )
    add_disk_arguments(parser)
    add_prefill_argument(parser)
    add_speculation_arguments(parser)


def add_models_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a server that may have several models."""
    parser.add_argument(
        "--alias",
        type=alias,
        action="append",
        default=[],
        metavar="NAME=MODEL",
        help="another name of a model in requests; give it several times for several (default: none)",
    )
    parser.add_argument(
        "--keep-alive",
        type=duration,
        default="-1",
        metavar="TIME",
        help="how long a model stays loaded after its last request: 5m, 1h, a number of seconds, 0, or -1, until "
        "another model needs its memory (default: %(default)s)",
    )


def alias(text: str) -> tuple[str, str]:
    """Parse ``NAME=MODEL``. Raises ConfigError for any other text."""
    name, _, model = text.partition("=")
    if not (name and model and name.isprintable()):
        raise ConfigError(f"{text!r} is no alias.", "Give NAME=MODEL, such as gpt-4o=mixtral-4bit.")
    return name, model


def duration(text: str) -> float | None:
    """Parse a time, such as "5m", as seconds; None for a negative one. Raises ConfigError for any other text."""
    parts = DURATION.fullmatch(text.strip())
    if parts is None:
        raise ConfigError(f"{text!r} is not a time.", "Give a time such as 90s, 5m or 1h, a number of seconds, or -1.")
    seconds = float(parts[1]) * SECONDS[parts[2]]
    return seconds if seconds >= 0 else None


def add_disk_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of keys and values on disk."""
    parser.add_argument(
        "--kv-cache-dir",
        type=lambda text: Path(text).absolute(),
        metavar="FOLDER",
        help="folder in which keys and values of answered requests are kept: for prompts that begin alike after a "
        "restart, or when memory has no room for all. They reveal what was said. Only this user may have access to the "
        "folder (default: they are kept in memory only)",
    )
    parser.add_argument(
        "--kv-cache-disk",
        type=size,
        default="32GiB",
        metavar="SIZE",
        help="most bytes in that folder, for all models; or a share of its disk, such as 10%% (default: %(default)s)",
    )
    parser.add_argument(
        "--kv-cache-ttl",
        type=DAYS,
        default=7.0,
        metavar="DAYS",
        help="remove keys and values there that were not used for so many days (default: %(default)g)",
    )


def disk_of(arguments: argparse.Namespace) -> PageOptions | None:
    """Return where keys and values are kept on disk; None: nowhere. Raises ConfigError if there can be no folder."""
    if (folder := arguments.kv_cache_dir) is None:
        return None
    open_folder(folder)
    total = shutil.disk_usage(folder).total
    return PageOptions(folder, Size.parse(arguments.kv_cache_disk).of(total), DAY * arguments.kv_cache_ttl)


def pattern(text: str) -> str:
    """Return ``text`` unchanged if it is a regular expression. Raises ConfigError if it is not."""
    try:
        re.compile(text)
    except re.error as error:
        raise ConfigError(f"{text!r} is not a regular expression: {error}.", "See Python's module re.") from None
    return text


def check_packages(command: str) -> None:
    """Raise ConfigError, which names ``command``, if packages that a server needs are not installed."""
    if missing := [package for package in NEEDED if importlib.util.find_spec(package) is None]:
        raise ConfigError(
            f"{command} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed.",
            'In the repository of moetier, run: pip install ".[serve]"',
        )


def served_name(directory: Path, name: str | None) -> str:
    """Return the name of the model in requests: ``name`` if it is given. Raises ConfigError if it is not printable."""
    found = models.name_of(directory) if name is None else name
    if not found or not found.isprintable():
        raise ConfigError(f"{found!r} can't be the name of a model.", "Give a printable name: --name NAME.")
    return found
