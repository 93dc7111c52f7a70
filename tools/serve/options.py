"""ServeConfig: the options of a server, and checks of what it needs."""

# ruff: noqa: RUF009 - each call of option returns a new field

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetier.runtime.config import Size
from moetier.runtime.engine.pages.page_folder import PageOptions, opened
from moetier.tiers.errors import ConfigError
from moetier.tiers.options import COUNT, MAX_COUNT, TINY, Number, file_option, option, options_of, read_all
from moetier.tools.cli.arguments import add_options, add_prefill_argument, add_speculation_arguments
from moetier.tools.cli.settings import API_KEY_VARIABLE

PORT = Number(int, 0, 65535, "Give 1 to 65535, or 0 for any free port.")
QUEUE = Number(int, 0, MAX_COUNT, "Give 0 or more; with 0, a request that can't be computed at once is refused.")
DAY = 86_400.0  # seconds
DAYS = Number(float, TINY, 36_500)
KEPT_DAYS = 7.0
DURATION = re.compile(r"(-?\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h|)")
SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
NEEDED = ("starlette", "uvicorn", "pydantic", "prometheus_client", "llguidance")


def duration(text: str) -> float | None:
    """Parse a time, such as "5m", as seconds; None for a negative one. Raises ConfigError for any other text."""
    parts = DURATION.fullmatch(text.strip())
    if parts is None:
        raise ConfigError(f"{text!r} is not a time.", "Give a time such as 90s, 5m or 1h, a number of seconds, or -1.")
    seconds = float(parts[1]) * SECONDS[parts[2]]
    return seconds if seconds >= 0 else None


def _pattern(text: str | None) -> str | None:
    """Return ``text`` unchanged if it is a regular expression, or None. Raises ConfigError if it is not."""
    try:
        re.compile(text or "")
    except re.error as error:
        raise ConfigError(f"{text!r} is not a regular expression: {error}.", "See Python's module re.") from None
    return text


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Options of a server: of ``moetier serve``, and those in OF_REPLICA of a replica of ``moetier ray``.

    They are declared here only, without those of TierConfig. ``of`` makes a checked ServeConfig.
    """

    host: str = option("127.0.0.1", "the address to listen on", metavar="HOST")
    port: int = option(8000, "the port to listen on; 0: any free port", metavar="PORT", numbers=PORT)
    keep_alive: float | None = option(
        "-1",
        "how long a model stays loaded after its last request: 5m, 1h, a number of seconds, 0, or -1, until another "
        "model needs its memory",
        metavar="TIME",
        parse=duration,
    )
    name: str | None = option(
        None,
        "name of the model in requests (default: the one that moetier list shows, or else the folder's)",
        types=str | None,
        metavar="NAME",
    )
    api_key_file: Path | None = file_option(
        f"file that holds, in one line, the key that requests must send (default: the key in ${API_KEY_VARIABLE}). "
        "Without a key, the server answers only programs on this machine"
    )
    api_keys: Path | None = file_option(
        "TOML file with several keys, each with a name, and limits of requests and tokens a minute if you like; in "
        "place of --api-key-file"
    )
    leave_out: str | None = option(
        None,
        "regular expression of what is left out of system prompts, because a client changes it in every request "
        "(default: nothing)",
        types=str | None,
        metavar="REGEX",
        parse=_pattern,
    )
    parallel: int = option(
        8,
        "most requests to compute together, so that they share loaded experts. Their keys and values share --kv-cache: "
        "those for which it has no room wait",
        metavar="N",
        numbers=COUNT,
    )
    queue: int = option(
        64,
        "number of requests that may wait; further ones are refused with status 429",
        metavar="N",
        numbers=QUEUE,
    )
    kv_cache_dir: Path | None = option(
        None,
        "folder in which keys and values of answered requests are kept: for prompts that begin alike after a restart, "
        "or when memory has no room for all. They reveal what was said. Only this user may have access to the folder "
        "(default: they are kept in memory only)",
        types=Path | None,
        metavar="FOLDER",
    )
    kv_cache_disk: Size = option(
        "32GiB",
        "most bytes in that folder, for all models; or a share of its disk, such as 10%",
        metavar="SIZE",
        parse=Size.parse,
    )
    kv_cache_ttl: float = option(
        KEPT_DAYS,
        f"remove keys and values there that were not used for so many days (default: {KEPT_DAYS:g})",
        metavar="DAYS",
        numbers=DAYS,
    )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> ServeConfig:
        """Check and convert those of ``options`` that are declared here. Raises ConfigError for a wrong value."""
        values = read_all(SERVE_OPTIONS, {name: options[name] for name in SERVE_OPTIONS if name in options})
        if (folder := values.get("kv_cache_dir")) is not None:
            values["kv_cache_dir"] = folder.absolute()
        return cls(**values)

    @property
    def most_requests(self) -> int:
        """Most requests at a time: those that are computed, and those that wait."""
        return self.parallel + self.queue

    def open_disk(self) -> PageOptions | None:
        """Return where keys and values are kept on disk, in a folder that this makes if it is missing; None: nowhere.

        Raises ConfigError if there can be no such folder.
        """
        if (folder := self.kv_cache_dir) is None:
            return None
        with opened(folder) as place:
            total = shutil.disk_usage(place).total
        return PageOptions(folder, self.kv_cache_disk.of(total), DAY * self.kv_cache_ttl)


SERVE_OPTIONS = options_of(ServeConfig)
# options that do not depend on how requests arrive
OF_REPLICA = tuple(name for name in SERVE_OPTIONS if name not in ("host", "port", "keep_alive"))


def add_serving_arguments(parser: argparse.ArgumentParser, names: Iterable[str] = SERVE_OPTIONS) -> None:
    """Add options of ServeConfig, by default all, and those of a process that computes prompts and answers."""
    add_options(parser, [SERVE_OPTIONS[name] for name in names])
    add_prefill_argument(parser)
    add_speculation_arguments(parser)


def alias(text: str) -> tuple[str, str]:
    """Parse ``NAME=MODEL``. Raises ConfigError for any other text."""
    name, _, model = text.partition("=")
    if not (name and model and name.isprintable()):
        raise ConfigError(f"{text!r} is no alias.", "Give NAME=MODEL, such as gpt-4o=mixtral-4bit.")
    return name, model


def check_packages(command: str) -> None:
    """Raise ConfigError, which names ``command``, if packages that a server needs are not installed."""
    if missing := [package for package in NEEDED if importlib.util.find_spec(package) is None]:
        raise ConfigError(
            f"{command} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed.",
            'In the repository of moetier, run: pip install ".[serve]"',
        )
