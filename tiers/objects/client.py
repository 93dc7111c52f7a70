"""Objects at one address: GETs of ranges with retries and a deadline, listing and uploads.

obstore speaks to Amazon S3 and what is like it, Google Cloud Storage, Azure, HTTP servers and local folders. It finds
credentials in the variables and files that the providers' own tools read. Its own retries are off but for uploads, so
that every request for a record is counted here.
"""

from __future__ import annotations

import configparser
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import ClosedError, ConfigError, MissingExpertError, StoreReadError, TargetError

CONNECT_SECONDS = 5.0  # longest time to connect
STALL_SECONDS = 15.0  # longest time without a byte
ATTEMPT_SECONDS = 60.0  # longest time of a request with its answer, which has at most 8 MiB
DEADLINE = 120.0  # seconds after which a read has failed, with all its retries
RETRIES = 3  # after errors that may pass
UPLOAD_RETRIES = 6  # of obstore, which waits 0.1 s and more before each
BACKOFF_SECONDS = 0.2  # before the first retry; doubled before each further one
MAX_OBJECTS = 100_000  # most objects that are listed; a model has a few for each of its layers
CHUNK_BYTES = 1 << 20  # least size of the chunks in which an answer arrives
# variables that name another endpoint than the provider's own
ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
# in the text of errors of listing, which have no types of their own
REFUSAL = re.compile(r"status code: (401|403|405|501)\b")
NO_BUCKET = re.compile(r"<Code>(NoSuchBucket|ContainerNotFound)</Code>")  # of Amazon and Google, and of Azure
FIX = "Check the address, the network and the server, then try again."

Result = TypeVar("Result")


class RefusedReadError(StoreReadError):
    """The server refuses a request: it does not permit it, or does not know it."""


class _BadAnswerError(Exception):
    """An answer has another length than the range that was asked for."""


class Objects(Closeable):
    """The objects below one address, by name. Thread-safe."""

    def __init__(self, address: str, *, uploads: bool = False) -> None:
        """``address`` is a URL, such as s3://bucket/model. No request is sent.

        ``uploads``: for ``put``. The folder of file:// is made, and obstore's own retries are on.

        Raises ConfigError if obstore is not installed, or can't use the address.
        """
        try:
            import obstore
            from obstore import exceptions
            from obstore.store import from_url
        except ImportError:
            raise ConfigError(
                f"{address} needs obstore, which is not installed.",
                'In the repository of moetier, run: pip install ".[objects]"',
            ) from None
        self.address = address.rstrip("/")
        scheme, endpoint = address.partition(":")[0], endpoint_of(address)
        self.where = f"{self.address} ({endpoint})" if endpoint else self.address  # for errors
        self.gets = 0  # number of GETs, without retries
        self.retries = 0
        self._lock = threading.Lock()  # guards the counters
        self._closing = threading.Event()
        self._obstore: Any = obstore
        self._errors = (exceptions.BaseError, _BadAnswerError, OSError)
        self._refusals = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
        options: dict[str, Any] = {"mkdir": uploads}
        if scheme != "file":
            client_options = {
                "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
                "read_timeout": timedelta(seconds=STALL_SECONDS),
                "timeout": timedelta(seconds=ATTEMPT_SECONDS),
                "allow_http": "http" in (scheme, endpoint.partition(":")[0]),
            }
            retries = {"max_retries": UPLOAD_RETRIES if uploads else 0}
            options = {"client_options": client_options, "retry_config": retries}
        if scheme == "s3":
            options |= _profile()
        try:
            self._store: Any = from_url(self.address, **options)
        except (exceptions.BaseError, ValueError) as error:
            raise ConfigError(f"{self.where} can't be used: {_said(error)}.", "Check the address.") from error

    def read(self, name: str, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of the object ``name`` from ``start`` on, by one GET with a range.

        Raises MissingExpertError if there is no such object, StoreReadError if it can't be read within DEADLINE, and
        ClosedError after ``close``.
        """

        def attempt() -> None:
            done = 0
            for chunk in self._answer(name, {"range": (start, start + len(view))}):
                if done + len(chunk) > len(view):
                    raise _BadAnswerError(f"the answer has more than the {len(view):,} bytes that were asked for")
                copy_bytes(view[done : done + len(chunk)], chunk)
                done += len(chunk)
            if done < len(view):
                raise _BadAnswerError(f"the answer ended after {done:,} of {len(view):,} bytes")

        self._try(name, attempt)

    def read_whole(self, name: str, most: int) -> bytes:
        """Return a whole object, which may have at most ``most`` bytes. Raises as ``read``."""

        def attempt() -> bytes:
            found = bytearray()
            for chunk in self._answer(name, {}):
                found += chunk
                if len(found) > most:
                    raise _BadAnswerError(f"the answer has more than {most:,} bytes")
            return bytes(found)

        return self._try(name, attempt)

    def _answer(self, name: str, options: dict[str, Any]) -> Iterator[memoryview]:
        answer = self._obstore.get(self._store, name, options=options)
        return map(memoryview, answer.stream(min_chunk_size=CHUNK_BYTES))

    def _try(self, name: str, attempt: Callable[[], Result]) -> Result:
        last, delay = time.monotonic() + DEADLINE - ATTEMPT_SECONDS, BACKOFF_SECONDS
        for tries in range(RETRIES + 1):
            if self._closing.is_set():
                break
            with self._lock:
                if tries:
                    self.retries += 1
                else:
                    self.gets += 1
            try:
                return attempt()
            except FileNotFoundError:
                raise MissingExpertError(f"There is no object {name} at {self.where}.", FIX) from None
            except self._errors as error:
                if isinstance(error, self._refusals) or REFUSAL.search(str(error)):
                    raise RefusedReadError(
                        f"{name} at {self.where} can't be read: {_said(error)}.",
                        "Check the credentials: they are found as by the provider's own tools.",
                    ) from error
                if NO_BUCKET.search(str(error)):
                    raise StoreReadError(
                        f"The bucket of {self.where} does not exist.", "Create it, or correct the address."
                    ) from error
                if tries == RETRIES or time.monotonic() + delay > last:
                    raise StoreReadError(f"{name} at {self.where} can't be read: {_said(error)}.", FIX) from error
            self._closing.wait(delay)
            delay *= 2
        raise ClosedError(f"{self.where} was closed.", "Open it again.")

    def sizes(self) -> dict[str, int] | None:
        """Return a dictionary from the name of each object to its size in bytes; None if they can't be listed.

        HTTP servers don't list, and credentials may not permit it. Other errors are raised as by ``read``, and
        StoreReadError if there are more than MAX_OBJECTS.
        """

        def attempt() -> dict[str, int]:
            found: dict[str, int] = {}
            for chunk in self._obstore.list(self._store):
                found |= {each["path"]: each["size"] for each in chunk}
                if len(found) > MAX_OBJECTS:
                    raise StoreReadError(
                        f"There are more than {MAX_OBJECTS:,} objects at {self.where}.", "Give the address of a model."
                    )
            return found

        if self.address.startswith("http"):
            return None
        try:
            return self._try("The list of objects", attempt)
        except RefusedReadError:
            return None

    def put(self, name: str, data: bytes | Iterable[bytes]) -> None:
        """Write a whole object: bytes, or pieces, which are uploaded as parts. Until the end the object does not exist.

        Raises TargetError if it can't be written.
        """
        try:
            self._obstore.put(self._store, name, data, chunk_size=8 << 20, max_concurrency=4)
        except self._errors as error:
            raise TargetError(f"{name} at {self.where} can't be written: {_said(error)}.", FIX) from error

    def delete(self, name: str) -> None:
        """Remove an object, if it exists. Raises TargetError if it can't be removed."""
        try:
            self._obstore.delete(self._store, name)
        except FileNotFoundError:
            pass
        except self._errors as error:
            raise TargetError(f"{name} at {self.where} can't be removed: {_said(error)}.", FIX) from error

    def close(self) -> None:
        """Let reads that wait for a retry, and later ones, end with ClosedError."""
        self._closing.set()


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy all bytes of ``source``, without the GIL, so that other threads run meanwhile."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def endpoint_of(address: str) -> str:
    """Return the endpoint that the environment names for an address; "" for the provider's own."""
    named = (os.environ.get(name) for name in ENDPOINTS.get(address.partition(":")[0], ()))
    return next(filter(None, named), "")


def _profile() -> dict[str, str]:
    """Return options for S3 from the files of Amazon's own tools, where the environment has no credentials.

    Only keys in a file are used: obstore finds the other kinds of credentials itself. Raises ConfigError if a file
    can't be read.
    """
    if any(name.startswith(("AWS_ACCESS_KEY", "AWS_WEB_IDENTITY", "AWS_CONTAINER")) for name in os.environ):
        return {}
    home, name = Path(os.path.expanduser("~/.aws")), os.environ.get("AWS_PROFILE", "default")  # noqa: PTH111
    found = configparser.ConfigParser(interpolation=None)
    try:
        found.read(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", home / "credentials"))
        config = configparser.ConfigParser(interpolation=None)
        config.read(os.environ.get("AWS_CONFIG_FILE", home / "config"))
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"A file of credentials can't be read: {_said(error)}.", "Correct the file.") from error
    if not found.has_section(name):
        return {}
    kept = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    options = {key: found[name][key] for key in kept if key in found[name]}
    section = name if name == "default" else f"profile {name}"
    region = config.get(section, "region", fallback="")
    if region and "AWS_REGION" not in os.environ and "AWS_DEFAULT_REGION" not in os.environ:
        options["region"] = region
    return options


def _said(error: BaseException) -> str:
    """Return an error of obstore in one line, without its Rust structures."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return text.strip().removesuffix(".")[:300]
