"""Objects at one address: GETs of ranges with retries for a limited time, listing and uploads.

obstore speaks to Amazon S3 and what is like it, Google Cloud Storage, Azure, HTTP servers and local folders. It finds
credentials in the variables and files that the providers' own tools read; profiles of Amazon's tools need boto3. Its
own retries are off but for uploads, so that every request for a record is counted here.
"""

from __future__ import annotations

import logging
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, wait
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from moetier.tiers.addresses import HTTP_AUTHORIZATION, check_address, endpoint_of
from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import (
    ChecksumError,
    ClosedError,
    ConfigError,
    MissingExpertError,
    StoreFormatError,
    StoreReadError,
    TargetError,
)
from moetier.tiers.redaction import redacted, redacted_error

from .aws_profile import profile

CONNECT_SECONDS = 5.0  # longest time to connect
STALL_SECONDS = 15.0  # longest time without a byte of an answer
UPLOAD_SECONDS = 600.0  # longest time of the upload of a part, during which no byte of an answer comes
RETRY_SECONDS = 120.0  # time of failures after which a request has failed, with all its retries
RETRIES = 2  # number of retries after a wrong answer, such as one of another length
BACKOFF_SECONDS = 0.2  # longest pause before the first retry; doubled for each further one
MAX_BACKOFF_SECONDS = 10.0
MAX_OBJECTS = 100_000  # most objects that are listed; a model has a few for each of its layers
MIN_RATE = 1024  # bytes a second; an answer that is slower for STALL_SECONDS stands still
_DAY = timedelta(days=1)
# in the text of errors of obstore, most of which have no types of their own
REFUSAL = re.compile(r"status code: (401|403|405|501)\b")
NO_BUCKET = re.compile(r"<Code>(NoSuchBucket|ContainerNotFound)</Code>")  # of Amazon and Google, and of Azure
# what the server will answer in the same way soon: errors of the request, and answers to another request
WRONG = re.compile(r"status code: 4(?!08|25|29)\d\d\b|Requested \d+\.\.\d+, got|non-partial")
METADATA = re.compile(r"//(169\.254\.|metadata\.google)")  # services that give an instance its credentials
UNKNOWN_HOST = re.compile(r"Name or service not known|No address associated with hostname|InvalidDnsName")
NO_TLS = re.compile(r"InvalidCertificate\(\s*(\w+)|InvalidMessage\(\s*(InvalidContentType)")
PROVIDER_OUTAGE = re.compile(r"credential provider: (EndpointConnection|ConnectionClosed|HTTPClient|\w*Timeout)")
FIX = "Check the address, the network and the server, then try again."
CREDENTIALS_FIX = (
    "Check the credentials: they are found as by the provider's own tools (profiles of ~/.aws need boto3)."
)

Result = TypeVar("Result")

_log = logging.getLogger(__name__)


class RefusedReadError(StoreReadError):
    """The server refuses a request: it does not permit it, or does not know it."""


class _BadAnswerError(Exception):
    """An answer has another length than the range that was asked for."""


class Objects(Closeable):
    """The objects below one address, by name. Thread-safe."""

    def __init__(self, address: str, *, uploads: bool = False) -> None:
        """``address`` is a URL, such as s3://bucket/model. No request is sent.

        ``uploads``: for ``put``. The folder of file:// is made.

        Raises ConfigError if obstore is not installed, or can't use the address.
        """
        check_address(address)
        try:
            import obstore
            from obstore import exceptions
        except ImportError:
            raise ConfigError(
                f"{address} needs obstore, which is not installed.",
                'In the repository of moetier, run: pip install ".[objects]"',
            ) from None
        self.address = address.rstrip("/")
        endpoint = endpoint_of(address)
        self.where = f"{self.address} ({endpoint})" if endpoint else self.address  # for errors
        self.gets = 0  # number of GETs, without retries
        self.retries = 0
        self._lock = threading.Lock()  # guards: ``gets``, ``retries``, ``_silent_until``
        self._silent_until = 0.0  # time before which failures are not logged
        self._closing = threading.Event()
        self._obstore: Any = obstore
        self._errors = (exceptions.BaseError, _BadAnswerError, OSError)
        self._refusals = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
        self._uploads = uploads
        self._options = profile(self.address) if self.address.startswith("s3:") else {}
        self._store: Any = self._opened()

    def _opened(self, *, fresh: bool = False, uploads: bool = False) -> Any:
        """Return obstore's store of the address. ``fresh``: requests ask caches on the way for nothing.

        ``uploads``: an upload has UPLOAD_SECONDS, and obstore's own retries.
        """
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        scheme = self.address.partition(":")[0]
        headers = {"cache-control": "no-cache", "pragma": "no-cache"} if fresh else {}
        if scheme == "https" and (authorization := os.environ.get(HTTP_AUTHORIZATION)):
            headers["authorization"] = authorization
        options: dict[str, Any] = {"mkdir": self._uploads}
        if scheme != "file":
            client_options = {
                "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
                "read_timeout": timedelta(seconds=UPLOAD_SECONDS if uploads else STALL_SECONDS),
                "timeout": _DAY,  # an answer that moves may take long
                "allow_http": "http" in (scheme, endpoint_of(self.address).partition(":")[0]),
                "default_headers": headers,
            }
            retries = {
                "max_retries": 1000 if uploads else 0,
                "retry_timeout": timedelta(seconds=RETRY_SECONDS),
                "backoff": {"max_backoff": timedelta(seconds=MAX_BACKOFF_SECONDS)},
            }
            options = {"client_options": client_options, "retry_config": retries, **self._options}
        try:
            return from_url(self.address, **options)
        except (BaseError, ValueError) as error:
            cause = f"{self.where} can't be used: {_one_line(error)}."
            raise ConfigError(cause, "Check the address.") from redacted_error(error)

    @cached_property
    def _fresh(self) -> Any:
        return self._opened(fresh=True)

    @cached_property
    def _uploading(self) -> Any:
        return self._opened(uploads=True)

    def read(self, name: str, start: int, view: memoryview, *, fresh: bool = False) -> None:
        """Fill ``view`` with the bytes of the object ``name`` from ``start`` on, by one GET with a range.

        ``fresh``: not from a cache on the way, as bytes that have come before were wrong. It counts as a retry.

        Raises MissingExpertError if there is no such object, StoreReadError if it can't be read within RETRY_SECONDS,
        and ClosedError after ``close``.
        """

        def attempt(fresh: bool) -> None:
            done = 0
            for chunk in self._answer(name, {"range": (start, start + len(view))}, fresh=fresh):
                if done + len(chunk) > len(view):
                    raise _BadAnswerError(f"the answer has more than the {len(view):,} bytes that were asked for")
                copy_bytes(view[done : done + len(chunk)], chunk)
                done += len(chunk)
            if done < len(view):
                raise _BadAnswerError(f"the answer ended after {done:,} of {len(view):,} bytes")

        self._try(name, attempt, fresh=fresh)

    def read_whole(self, name: str, most: int, *, fresh: bool = False) -> bytes:
        """Return a whole object, which may have at most ``most`` bytes. Raises as ``read``."""

        def attempt(fresh: bool) -> bytes:
            data = bytearray()
            for chunk in self._answer(name, {}, fresh=fresh):
                data += chunk
                if len(data) > most:
                    raise _BadAnswerError(f"the answer has more than {most:,} bytes")
            return bytes(data)

        return self._try(name, attempt, fresh=fresh)

    def _answer(self, name: str, options: dict[str, Any], *, fresh: bool) -> Iterator[memoryview]:
        """Yield the answer's bytes as they arrive, so that ``close`` ends a slow answer.

        Raises TimeoutError if they arrive more slowly than MIN_RATE.
        """
        answer = self._obstore.get(self._fresh if fresh else self._store, name, options=options)
        since, count = time.monotonic(), 0
        for chunk in answer.stream(min_chunk_size=1):
            if self._closing.is_set():
                raise self._closed()
            yield (view := memoryview(chunk))
            count += len(view)
            if (seconds := time.monotonic() - since) > STALL_SECONDS:
                if count < MIN_RATE * seconds:
                    raise TimeoutError(f"only {count:,} bytes have come in {seconds:.0f} s")
                since, count = since + seconds, 0

    def _try(self, name: str, attempt: Callable[[bool], Result], *, fresh: bool = False, act: str = "read") -> Result:
        """Call ``attempt`` until it succeeds, and return its result.

        Failures that may pass are retried for RETRY_SECONDS; others, such as wrong answers, at most RETRIES times.

        Args:
            name: the object, for errors.
            attempt: makes one request. Its argument is True if caches on the way must be bypassed, as after a wrong
                answer.
            fresh: bypass caches from the first call on, and count that call as a retry.
            act: the participle of what is done with the object, for errors.

        Raises StoreReadError with the last failure, and ClosedError after ``close``.
        """
        end, delay, wrong, retry = math.inf, BACKOFF_SECONDS, 0, fresh
        while not self._closing.is_set():
            with self._lock:
                if retry:
                    self.retries += 1
                else:
                    self.gets += 1
            try:
                return attempt(fresh)
            except FileNotFoundError:
                raise MissingExpertError(f"There is no object {name} at {self.where}.", FIX) from None
            except self._errors as error:
                fault, most = self._fault(f"{name} at {self.where} can't be {act}", error)
                wrong += most < math.inf
                fresh = fresh or wrong > 0
                now = time.monotonic()
                end = min(end, now + RETRY_SECONDS)
                if wrong > most or now + delay > end:
                    raise fault from redacted_error(error)
                if most == math.inf:
                    self._say(fault)
            # obstore does not tell the header Retry-After: longer and longer pauses serve its purpose
            self._closing.wait(delay * random.uniform(0.5, 1.0))
            delay, retry = min(2 * delay, MAX_BACKOFF_SECONDS), True
        raise self._closed()

    def _closed(self) -> ClosedError:
        return ClosedError(f"The connection to {self.where} was closed.", "Open the store again.")

    def _fault(self, failure: str, error: BaseException) -> tuple[StoreReadError, float]:
        """Return the error to raise for an error of obstore, and the number of retries; inf: those in RETRY_SECONDS."""
        text, said = str(error), f"{failure}: {_one_line(error)}."
        if METADATA.search(text):
            return StoreReadError(
                f"No credentials were found for {self.where}: {_one_line(error)}.", CREDENTIALS_FIX
            ), RETRIES
        if PROVIDER_OUTAGE.search(text):
            return StoreReadError(said, FIX), math.inf
        if isinstance(error, self._refusals) or REFUSAL.search(text):
            return RefusedReadError(said, CREDENTIALS_FIX), 0
        if NO_BUCKET.search(text):
            cause = f"The bucket of {self.where} does not exist."
            return StoreReadError(cause, "Create it, or correct the address."), 0
        if UNKNOWN_HOST.search(text):
            return StoreReadError(f"The host of {self.where} is not known.", "Correct the address."), RETRIES
        if fault := NO_TLS.search(text):
            cause = f"{self.where} has no TLS with a certificate that is trusted ({fault[1] or fault[2]})."
            return StoreReadError(cause, "Name the certificate of its authority with SSL_CERT_FILE."), RETRIES
        is_wrong = isinstance(error, _BadAnswerError) or WRONG.search(text.partition("\n")[0])
        passes = not self.address.startswith("file:")  # what a local disk says, it says again
        return StoreReadError(said, FIX), RETRIES if is_wrong else math.inf if passes else 0

    def _say(self, fault: StoreReadError) -> None:
        """Log that a request fails and is tried again, at most once within RETRY_SECONDS."""
        now = time.monotonic()
        with self._lock:
            is_due = now >= self._silent_until
            self._silent_until = now + RETRY_SECONDS if is_due else self._silent_until
        if is_due:
            _log.warning("%s It is tried again, for up to %.0f s.", fault.cause, RETRY_SECONDS)

    def sizes(self) -> dict[str, int] | None:
        """Return a dictionary from the name of each object to its size in bytes; None if they can't be listed.

        HTTP servers don't list, and credentials may not permit it. Other errors are raised as by ``read``, and
        StoreReadError if there are more than MAX_OBJECTS.
        """

        def attempt(fresh: bool) -> dict[str, int]:
            sizes: dict[str, int] = {}
            for chunk in self._obstore.list(self._fresh if fresh else self._store):
                sizes |= {entry["path"]: entry["size"] for entry in chunk}
                if len(sizes) > MAX_OBJECTS:
                    raise StoreReadError(
                        f"There are more than {MAX_OBJECTS:,} objects at {self.where}.", "Give the address of a model."
                    )
            return sizes

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
            self._obstore.put(self._uploading, name, data, chunk_size=8 << 20, max_concurrency=4)
        except self._errors as error:
            raise TargetError(f"{name} at {self.where} can't be written: {_one_line(error)}.", FIX) from redacted_error(
                error
            )

    def delete(self, name: str) -> None:
        """Remove an object, if it exists. Raises TargetError if it can't be removed."""
        try:
            self._try(name, lambda fresh: self._obstore.delete(self._store, name), act="removed")
        except MissingExpertError:
            pass
        except StoreReadError as error:
            raise TargetError(error.cause, error.fix) from error

    def close(self) -> None:
        """Let reads that wait for a retry or for bytes, and later ones, end with ClosedError."""
        self._closing.set()


def until_right(read: Callable[[bool], Result]) -> Result:
    """Call ``read(False)``. If its data is damaged, call ``read(True)``, which bypasses caches, up to RETRIES times.

    Raises as ``read``: ChecksumError or StoreFormatError at the last time.
    """
    for attempt in range(RETRIES):
        try:
            return read(attempt > 0)
        except (ChecksumError, StoreFormatError) as error:
            _log.info("%s It is fetched again.", error.cause)
    return read(True)


def wait_for_all(objects: Objects, tasks: Collection[Future[Result]], advance: Callable[[Result], object]) -> None:
    """Wait for tasks that read ``objects``, and call ``advance`` with the result of each, in order.

    The error of a task is raised once no task runs any more. So that none of them waits for a retry, ``objects`` is
    closed then, unless data is damaged and is to be read again.
    """
    try:
        for task in tasks:
            advance(task.result())
    except (ChecksumError, StoreFormatError):
        raise
    except BaseException:
        objects.close()
        raise
    finally:
        for task in tasks:
            task.cancel()
        wait(tasks)


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy all bytes of ``source``, without the GIL, so that other threads run meanwhile."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def _one_line(error: BaseException) -> str:
    """Return the message of obstore's error in one line, without its Rust structures and without secrets."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return redacted(text).strip().removesuffix(".")[:300]
