"""API keys: who may send requests, and how many requests and tokens a minute."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetier.tiers.errors import ConfigError
from moetier.tools.cli.settings import API_KEY_VARIABLE

MAKE_KEY = "Make a key: openssl rand -hex 32"
MAX_NAME = 64  # letters of a key's name
MINUTE = 60.0


@dataclass(frozen=True, slots=True)
class Key:
    """An API key.

    Attributes:
        name: name of the key in metrics; "" if it is the only one.
        digest: of the key. As all digests have the same length, the time of a comparison reveals nothing.
        requests: most requests a minute; None: any number.
        tokens: most tokens of prompts and answers a minute; None: any number.
    """

    name: str
    digest: bytes
    requests: int | None = None
    tokens: int | None = None


def digest_of(key: bytes) -> bytes:
    """Return the digest of a key."""
    return hashlib.sha256(key).digest()


class Keys:
    """The keys of a server."""

    def __init__(self, keys: Mapping[str, Key]) -> None:
        """``keys`` are by their names."""
        self._keys = [*keys.values()]

    @classmethod
    def only(cls, key: str) -> Keys:
        """Return the key set of a server with one key."""
        return cls({"": Key("", digest_of(key.encode()))})

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    @property
    def names(self) -> list[str]:
        """Names of all keys."""
        return [key.name for key in self._keys]

    def shown_by(self, headers: Mapping[bytes, bytes]) -> Key | None:
        """Return the key that a request shows as its bearer token or as ``x-api-key``; None if it shows none.

        A client may send another value in one of the two headers, as Anthropic's do.
        """
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        shown = [headers.get(b"x-api-key", b""), *([token] if scheme.lower() == b"bearer" else [])]
        digests = [digest_of(each.strip()) for each in shown]
        return next((key for key in self._keys for one in digests if hmac.compare_digest(one, key.digest)), None)


def keys_of(file: Path | None, several: Path | None) -> Keys | None:
    """Return the keys of a server; None if it has none.

    Args:
        file: file with the only key, in one line; None: the environment variable API_KEY_VARIABLE may have it.
        several: TOML file with several keys. It may not be given beside ``file``.

    Raises ConfigError if a file can't be read, or does not hold keys.
    """
    from moetier.runtime.wire.channel import read_secret, read_token  # imports grpc

    if several is not None:
        if file is not None:
            raise ConfigError("There are a file of one key and a file of several.", "Give one of the two.")
        return Keys(_parsed(several, read_secret(several, "API key")))
    if file is not None:
        return Keys.only(read_token(file, "API key"))
    key = os.environ.get(API_KEY_VARIABLE)
    if key and not _is_word(key):
        raise ConfigError(f"{API_KEY_VARIABLE} is not one word of printable ASCII characters.", MAKE_KEY)
    return Keys.only(key) if key else None


def _is_word(key: Any) -> bool:
    return isinstance(key, str) and bool(key) and key.isascii() and key.isprintable() and " " not in key


def _parsed(path: Path, content: bytes) -> dict[str, Key]:
    """Return the keys of a TOML file by name. Raises ConfigError if there is none, or one is not valid."""
    form = 'Write a table for each key: [NAME] with key = "...", and requests_a_minute and tokens_a_minute if you like.'
    try:
        tables = tomllib.loads(content.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"The file of API keys {path} is not TOML: {error}.", form) from None
    keys = dict[str, Key]()
    for name, table in tables.items():
        where = f"The key {name!r} in {path}"
        if not isinstance(table, dict) or not name.isprintable() or not 0 < len(name) <= MAX_NAME:
            raise ConfigError(f"{where} is not a table with a printable name of at most {MAX_NAME} letters.", form)
        limits = [table.get("requests_a_minute"), table.get("tokens_a_minute")]
        if unknown := table.keys() - {"key", "requests_a_minute", "tokens_a_minute"}:
            raise ConfigError(f"{where} has the unknown field {min(unknown)!r}.", form)
        if not _is_word(table.get("key")):
            raise ConfigError(f"{where} is not one word of printable ASCII characters.", MAKE_KEY)
        if not all(limit is None or (type(limit) is int and limit > 0) for limit in limits):
            raise ConfigError(f"{where} has a limit that is not a whole number above 0.", form)
        keys[name] = Key(name, digest_of(table["key"].encode()), *limits)
    if not keys or len({key.digest for key in keys.values()}) < len(keys):
        raise ConfigError(f"The file {path} has no key, or the same key twice.", form)
    return keys


class Bucket:
    """The amount that a key may still use. It grows to ``most`` within a minute."""

    def __init__(self, most: int, now: float) -> None:
        self._most = most
        self._level = float(most)
        self._since = now

    def refill(self, now: float) -> None:
        """Add what has come since the last time."""
        self._level = min(self._most, self._level + (now - self._since) * self._most / MINUTE)
        self._since = now

    def take(self, count: float) -> None:
        """Remove ``count``. The level may fall below 0."""
        self._level -= count

    @property
    def seconds(self) -> int:
        """Whole seconds until there is at least 1; 0 if there is."""
        return max(0, math.ceil((1 - self._level) * MINUTE / self._most))


class RateLimits:
    """Limits of requests and tokens a minute, by key. Thread-safe.

    A key may send a request while it has a token left: how many tokens a request takes is known only at its end.
    """

    def __init__(self, used: Callable[[str], int], clock: Callable[[], float] = time.monotonic) -> None:
        """``used`` returns how many tokens have been used with the key of a name; ``clock`` returns seconds."""
        self._used = used
        self._clock = clock
        self._lock = threading.Lock()  # guards: ``_requests``, ``_tokens``, ``_counted``
        self._requests: dict[str, Bucket] = {}
        self._tokens: dict[str, Bucket] = {}
        self._counted: dict[str, int] = {}  # tokens that were removed from a bucket

    def admit(self, key: Key) -> tuple[str, int] | None:
        """Count a request with ``key``. If there are too many, return which of the limits, and seconds to wait."""
        now = self._clock()
        with self._lock:
            if key.tokens is not None:
                tokens = self._tokens.setdefault(key.name, Bucket(key.tokens, now))
                tokens.refill(now)
                used = self._used(key.name)
                tokens.take(used - self._counted.get(key.name, 0))
                self._counted[key.name] = used
                if tokens.seconds:
                    return f"{key.tokens:,} tokens", tokens.seconds
            if key.requests is not None:
                requests = self._requests.setdefault(key.name, Bucket(key.requests, now))
                requests.refill(now)
                if requests.seconds:
                    return f"{key.requests:,} requests", requests.seconds
                requests.take(1)
        return None
