"""Elsewhere: computes experts that are absent here at the daemons that hold them, where that is faster than a fetch.

Rows of hidden states go to the daemons, and outputs come back. A hidden state has 4 to 16 KB, a record 2 to 90 MB. The
daemons compute with the same code, so the outputs have the bits of those computed here.

A record is fetched in place of that if the fetch takes less time: for many rows, or for an expert that is used so often
that its slot pays. Estimates of both times are measured (``costs.py``).
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.wire.channel import INPUT_BYTES, OUTPUT_BYTES, OUTPUT_ROWS
from moetier.runtime.wire.piece import decode_piece
from moetier.runtime.wire.status_codes import CALL_ERRORS, error_of
from moetier.tiers.errors import (
    BudgetError,
    ChecksumError,
    ClosedError,
    ExhaustedError,
    MoetierError,
    ProtocolError,
    RefusedError,
    StoreError,
    UnavailableError,
    UnknownModelError,
)
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.store.checksum import crc32c

from .costs import RowSeconds, Uses, earns_slot
from .peers import Peer
from .spread import SpreadReader

if TYPE_CHECKING:
    from moetier.runtime.kernels.experts.expert_products import ExpertProducts

ROWS = 4 * OUTPUT_ROWS  # most rows of outputs that a process waits for at a time
ATTEMPTS = 2  # calls to one daemon for a block, as a request or an answer may have been changed on its way
STEPS = 64  # steps of a block for which the use of its least used cached expert is not looked up again
_TYPES = {2: "bfloat16", 4: "float32"}  # by the size of a number
_AWAY = (UnavailableError, RefusedError, UnknownModelError, ClosedError)

_log = logging.getLogger(__name__)

# for each expert: the numbers of the rows of x that it computes, and the row of the outputs for each
Rows = Mapping[int, tuple[Sequence[int], Sequence[int]]]


class Elsewhere:
    """Computes absent experts at the daemons of ``reader``, for the host tier ``host`` of this process. Thread-safe."""

    def __init__(self, reader: SpreadReader, host: HostTier) -> None:
        self._reader = reader
        self._host = host
        self._manifest = reader.manifest
        self._uses = [Uses(block.experts) for block in self._manifest.blocks]
        self._least: dict[int, tuple[int, float]] = {}  # by block: steps left until it is looked up again, and uses
        self._seconds = RowSeconds()
        self._lock = threading.Lock()
        self._rows = 0  # rows of outputs that are waited for

    @property
    def is_possible(self) -> bool:
        """Whether a daemon computes now."""
        return any(peer.away is None and peer.reader.computes for peer in self._reader.peers)

    def note(self, block: int, experts: Iterable[int]) -> None:
        """Count uses of experts by one token, which are all cached."""
        self._uses[block].add([(expert, 1) for expert in experts], 1)

    def send(self, products: ExpertProducts, block: int, x: int, tokens: int, rows: Rows) -> Sent:
        """Choose experts that daemons compute, and send the rows to all of these daemons.

        Args:
            products: compiled code for the block's experts.
            block: number of the block.
            x: address of the hidden states [tokens, hidden].
            tokens: number of rows of x.
            rows: all experts that are used, and what each computes.

        Close the result when it is no longer needed.
        """
        self._uses[block].add([(expert, len(own)) for expert, (own, _) in rows.items()], tokens)
        sent = Sent(self, products, block, x, rows)
        absent = self._host.absent([ExpertKey(block, expert) for expert in rows])
        row_bytes = products.row_bytes
        chosen = [key.expert for key in absent if not self._fetches(key, len(rows[key.expert][0]), row_bytes)]
        if chosen:
            try:
                sent.send(chosen)
            except BaseException:
                sent.close()
                raise
            sent.is_timed = len(sent.experts) == len(absent)
        elif absent:
            self._seconds.fade()
        return sent

    def _fetches(self, key: ExpertKey, rows: int, row_bytes: int) -> bool:
        """Return whether to fetch a record in place of sending ``rows`` rows."""
        rate = self._reader.rate.value
        fetch = self._manifest.layout(key.block).slot_bytes / rate
        one = self._seconds.value + 2 * row_bytes / rate
        uses = self._uses[key.block].of(key.expert)
        price = fetch / one
        if rows >= price:
            return True
        # the first is quicker, and true wherever the second is
        return earns_slot(uses, 0.0, price) and earns_slot(uses, self._least_uses(key.block), price)

    def _least_uses(self, block: int) -> float:
        """Return the uses of the cached expert of a block that is used least; 0 if there are empty slots."""
        left, least = self._least.get(block, (0, 0.0))
        if not left:
            stats, ready = self._host.stats(), self._host.ready(block)
            least = min(map(self._uses[block].of, ready), default=0.0) if stats.ready >= stats.slots else 0.0
            left = STEPS
        self._least[block] = (left - 1, least)
        return least

    def _take(self, rows: int) -> bool:
        """Count rows that are waited for, unless there would be too many."""
        with self._lock:
            if self._rows + rows > ROWS:
                return False
            self._rows += rows
            return True

    def _give_back(self, rows: int) -> None:
        with self._lock:
            self._rows -= rows


@dataclass(slots=True, eq=False)
class _Part:
    """The part of a block's computation that is sent to one daemon."""

    peer: Peer
    failures: int  # of the peer, before the call
    experts: list[int]
    picked: dict[int, None]  # numbers of rows of x
    count: int  # of rows of outputs
    call: Any = None  # gRPC's, or the MoetierError with which it could not begin
    crc: int = 0  # checksum of the request
    began: float = 0.0

    @property
    def is_late(self) -> bool:
        """Whether the call has so little time left that it may end though the daemon has answered."""
        return not isinstance(self.call, MoetierError) and self.call.time_remaining() < self.peer.reader.patience / 2


class Sent:
    """Computations of one block that daemons do. One thread uses it. Close it at the end."""

    def __init__(self, elsewhere: Elsewhere, products: ExpertProducts, block: int, x: int, rows: Rows) -> None:
        self._elsewhere = elsewhere
        self._reader = elsewhere._reader
        self._products = products
        self._block = block
        self._x = x
        self._rows = rows
        self._failures = Counter[str]()  # by name of a daemon: how many of its calls have failed
        self._parts: list[_Part] = []
        self.experts: Collection[int] = ()  # experts that were sent
        self.is_timed = False  # false if records are fetched meanwhile, for which this thread waits first

    def send(self, experts: Sequence[int]) -> None:
        """Send experts to their daemons, in one call to each, unless a call or the rows in flight would be too many."""
        parts: dict[str, _Part] = {}
        row_bytes = self._products.row_bytes
        for expert in experts:
            peer = next(
                (
                    peer
                    for peer in self._reader.peers.order(ExpertKey(self._block, expert))
                    if peer.away is None and peer.reader.computes and self._failures[peer.name] < ATTEMPTS
                ),
                None,
            )
            if peer is None:
                continue
            part = parts.get(peer.name) or _Part(peer, peer.failures, [], {}, 0)
            own, _ = self._rows[expert]
            picked = part.picked | dict.fromkeys(own)
            count = part.count + len(own)
            if len(picked) * row_bytes > INPUT_BYTES or count > OUTPUT_ROWS or count * row_bytes > OUTPUT_BYTES:
                continue
            if not self._elsewhere._take(len(own)):
                break
            part.experts.append(expert)
            part.picked, part.count = picked, count
            parts[peer.name] = part
        self._parts = list(parts.values())
        for part in self._parts:
            self._begin(part)
        self.experts = {expert for part in self._parts for expert in part.experts}

    def collect(self, outputs: int) -> list[int]:
        """Wait for all outputs, and write them to the rows of ``outputs``, an address.

        What a daemon fails to compute is sent to it once more, unless it is busy or away, and then to the next one. If
        a call has ended because this process came late, it is sent again. Return the experts that no daemon has
        computed.
        """
        left: list[int] = []
        while self._parts:
            parts, failed = self._parts, list[int]()
            for part in parts:
                is_late = part.is_late
                data = self._read(part)
                if isinstance(data, MoetierError):
                    if not (is_late and isinstance(data, UnavailableError)):
                        self._note_failure(part, data)
                    failed += part.experts
                else:
                    self._place(part, data, outputs)
            if not failed and self.is_timed:  # the daemons compute at the same time
                seconds = time.monotonic() - parts[0].began
                self._elsewhere._seconds.add(seconds, sum(part.count for part in parts))
            self.close()
            if failed:
                self.send(failed)
                left += [expert for expert in failed if expert not in self.experts]
        return left

    def close(self) -> None:
        """Cancel all calls. Idempotent."""
        parts, self._parts = self._parts, []
        for part in parts:
            if part.call is not None and not isinstance(part.call, MoetierError):
                part.call.cancel()
            self._elsewhere._give_back(part.count)

    def _begin(self, part: _Part) -> None:
        """Send the rows of a part. An error is raised when the answer is read."""
        numbers = {row: number for number, row in enumerate(sorted(part.picked))}
        size = self._products.row_bytes
        activation = self._products.activation
        request = pb.ComputeRequest(
            digest=self._reader.manifest.digest,
            block=self._block,
            experts=part.experts,
            hidden_states=b"".join([ctypes.string_at(self._x + row * size, size) for row in numbers]),
            dtype=_TYPES[self._products.floats.itemsize],
            activation=pb.Activation(
                function=activation.function,
                interleaved=activation.interleaved,
                alpha=activation.alpha,
                limit=activation.limit,
                shift=activation.shift,
                gated=activation.gated,
            ),
        )
        if len(numbers) > 1 or part.count > len(part.experts):  # a token may name an expert twice
            for expert in part.experts:
                own, _ = self._rows[expert]
                request.counts.append(len(own))
                request.picked.extend([numbers[row] for row in own])
        part.began = time.monotonic()
        try:
            part.call, part.crc = part.peer.reader.compute(request, part.count * size)
        except MoetierError as error:
            part.call = error.with_traceback(None)

    def _read(self, part: _Part) -> bytearray | MoetierError:
        """Return the outputs of a part, or the error of the daemon or the network."""
        if isinstance(part.call, MoetierError):
            return part.call
        size = part.count * self._products.row_bytes
        data, crc = bytearray(), None
        try:
            for message in part.call:
                piece, crc = decode_piece(message)
                data += piece
                if len(data) > size:
                    break
        except CALL_ERRORS as error:
            # without the traceback: gRPC's error is the call itself, and its frames hold the tier
            return error_of(error.with_traceback(None), part.peer.reader.address.target)
        except ProtocolError as error:
            return error.with_traceback(None)
        if len(data) != size or crc is None:
            return ProtocolError(
                f"The daemon {part.peer.name} did not send outputs of {size:,} bytes with a checksum.",
                "Use the same version of moetier on both sides.",
            )
        if crc != crc32c(memoryview(data), part.crc):
            return ChecksumError(
                f"Checksum mismatch in a computation by the daemon {part.peer.name}.", "Check the network, or use TLS."
            )
        self._reader.peers.count_computed(part.peer, part.count, len(part.picked) * self._products.row_bytes + size)
        return data

    def _place(self, part: _Part, data: bytearray, outputs: int) -> None:
        size = self._products.row_bytes
        source = ctypes.addressof(ctypes.c_char.from_buffer(data))
        places = (place for expert in part.experts for place in self._rows[expert][1])
        for number, place in enumerate(places):
            ctypes.memmove(outputs + place * size, source + number * size, size)

    def _note_failure(self, part: _Part, error: MoetierError) -> None:
        """Note that a call has failed. After ATTEMPTS the daemon is skipped for this block, or until its next check."""
        name = part.peer.name
        if isinstance(error, _AWAY):
            self._failures[name] = ATTEMPTS
            self._reader.peers.lose(part.peer, error, part.failures)
        elif isinstance(error, ExhaustedError | BudgetError):
            # it has no time or no memory, or compiles: it is asked again for the next block
            self._failures[name] = ATTEMPTS
            _log.info("%s: %s", name, error.cause)
        else:
            self._failures[name] += 1
            _log.warning("%s: %s", name, error.cause)
            if isinstance(error, StoreError):
                return
            if self._failures[name] < ATTEMPTS:
                part.peer.reader.renew()
            else:
                part.peer.reader.computes = False  # until it is checked again
                _log.warning("The daemon %s is not asked to compute any more.", name)
