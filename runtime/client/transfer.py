"""Transfer: one record on its way from a daemon on another host into a slot."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc

from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.wire.address import Address
from moetier.runtime.wire.piece import PIECE_BYTES, decode_piece
from moetier.runtime.wire.status_codes import closed_channel, error_of
from moetier.tiers.errors import MoetierError, ProtocolError, UnavailableError
from moetier.tiers.layout import ExpertKey

from .lines import Lines

SPLIT_BYTES = 8 << 20  # a record that is larger comes over all channels at once
SLOWEST = 4_000_000  # bytes a second of one call: what comes slower is not waited for


class Transfer:
    """The calls that bring its parts end together. Each has a deadline: ``patience`` seconds, and what its bytes take
    at ``SLOWEST``."""

    def __init__(self, key: ExpertKey, view: memoryview, digest: str, address: Address, patience: float) -> None:
        self._key = key
        self._view = view
        self._digest = digest
        self._address = address
        self._patience = patience
        self._state = threading.Lock()
        self._calls: list[Any] = []
        self._error: MoetierError | None = None

    def run(self, lines: Lines, pool: ThreadPoolExecutor) -> None:
        """Returns when all of it is there; its parts come over all ``lines``, by the threads of ``pool`` and this one.
        Raises what the network or the daemon has failed at. Nobody writes to the view any more in either case."""
        parts = list(_parts(len(self._view), len(lines.fetches)))
        others: list[Future[None]] = []
        try:
            for part in parts[1:]:  # one by one: those that have begun are waited for, whatever comes
                others += [pool.submit(self._bring, lines.next(), *part)]
            self._bring(lines.next(), *parts[0])
            for other, part in zip(others, parts[1:], strict=True):
                if other.cancel():  # nobody has begun it
                    self._bring(lines.next(), *part)
                else:
                    other.result()
        except RuntimeError as error:  # the pool's: it was closed meanwhile, or there is no thread to be had
            self._end(UnavailableError(f"The record can't be read: {error}.", "Free what is short."))
        except BaseException:
            self._end(UnavailableError("It was given up.", "Ask again."))
            raise
        finally:
            for other in others:
                if not other.cancel():
                    other.exception()
        if self._error is not None:
            raise self._error

    def _bring(self, fetch: Any, start: int, end: int) -> None:
        """Brings the bytes ``start`` to ``end``; never raises what is the network's or the daemon's to fail at."""
        try:
            self._fetch(fetch, start, end)
        except MoetierError as error:
            self._end(error)
        except grpc.RpcError as error:
            self._end(error_of(error, self._address.target))
        except ValueError:
            self._end(closed_channel())

    def _fetch(self, fetch: Any, start: int, end: int) -> None:
        request = pb.FetchRequest(
            digest=self._digest, block=self._key.block, expert=self._key.expert, offset=start, length=end - start
        )
        call = fetch(request, timeout=self._patience + (end - start) / SLOWEST)
        with self._state:
            if self._error is not None:
                call.cancel()
            self._calls.append(call)
        at = start
        for message in call:
            piece = decode_piece(message)
            if len(piece) > min(PIECE_BYTES, end - at):
                raise ProtocolError(
                    f"A daemon sent more of {self._key} than it was asked for.", "Use moetier in one version."
                )
            self._view[at : at + len(piece)] = piece
            at += len(piece)
        if at != end:
            raise ProtocolError(
                f"A daemon sent {at - start:,} of {end - start:,} bytes of {self._key}.", "See the daemon's log."
            )

    def _end(self, error: MoetierError) -> None:
        """The first error is the transfer's; all of its calls end."""
        with self._state:
            if self._error is None:
                self._error = error
            for call in self._calls:
                call.cancel()


def _parts(size: int, channels: int) -> Iterator[tuple[int, int]]:
    """Of a record of ``size`` bytes: (start, end) for each call; whole pieces but the last."""
    if size <= SPLIT_BYTES:
        yield 0, size
        return
    pieces = -(-size // PIECE_BYTES)
    step = -(-pieces // channels) * PIECE_BYTES
    for start in range(0, size, step):
        yield start, min(start + step, size)
