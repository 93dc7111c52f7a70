"""RemoteCompute: has absent experts computed by the daemons that hold them, where that is faster than a fetch.

This process sends hidden states to the daemons and gets outputs. A hidden state has 4 to 16 KB, a record 2 to 90 MB.
The daemons compute with the same code, so the outputs have the same bits as if this process had computed them.

A record is fetched instead if the fetch takes less time: for many tokens, or for an expert that is used so often that
keeping its record in a slot saves time. Both times are measured (``costs.py``).
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.wire.channel import INPUT_BYTES, MAX_OUTPUTS, OUTPUT_BYTES
from moetier.runtime.wire.piece import decode_piece
from moetier.runtime.wire.status_codes import CALL_ERRORS, error_of
from moetier.tiers.closeable import Closeable, closed_on_error
from moetier.tiers.errors import (
    SAME_VERSION,
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

from .costs import OutputSeconds, RecentUses, earns_slot
from .peers import Peer
from .spread import SpreadStore

if TYPE_CHECKING:
    from moetier.runtime.kernels.experts.expert_products import ExpertProducts
    from moetier.runtime.moe.block import TokensOfExperts

MAX_WAITING = 4 * MAX_OUTPUTS  # most outputs that a process waits for at a time
ATTEMPTS = 2  # calls to one daemon for a block, as a request or an answer may be changed on its way
LOOKUP_DEMANDS = 64  # demands of a block after which the uses of its least used cached expert are looked up again
_TYPES = {2: "bfloat16", 4: "float32"}  # by the size of a number
_AWAY = (UnavailableError, RefusedError, UnknownModelError, ClosedError)

_log = logging.getLogger(__name__)


class RemoteCompute:
    """Has experts that are absent in the tier ``host`` computed by the daemons of ``store``. Thread-safe.

    The measured times and recent uses change without a lock: if two threads compute at the same time, a measurement or
    a use may be lost, which changes only where an expert is computed.
    """

    def __init__(self, store: SpreadStore, host: HostTier) -> None:
        self.store = store
        self._host = host
        self._manifest = store.manifest
        self._uses = [RecentUses(block.experts) for block in self._manifest.blocks]
        self._least: dict[int, tuple[int, float]] = {}  # by block: demands left until it is looked up again, and uses
        self.seconds = OutputSeconds()
        self._lock = threading.Lock()  # guards: ``_waiting``, and the outputs of each call
        self._waiting: set[_PeerCall] = set()  # calls with outputs that are waited for

    @property
    def is_possible(self) -> bool:
        """Whether a daemon serves computations now."""
        return any(peer.away is None and peer.store.computes for peer in self.store.peers)

    def note_local(self, block: int, experts: Iterable[int]) -> None:
        """Count uses of ``experts`` by one token. All of them are cached."""
        self._uses[block].add([(expert, 1) for expert in experts], 1)

    def send(
        self, products: ExpertProducts, block: int, x: int, tokens: int, tokens_of: TokensOfExperts
    ) -> RemoteOutputs:
        """Choose experts that daemons compute, and send the hidden states of their tokens to these daemons.

        Args:
            products: compiled code for the block's experts.
            block: number of the block.
            x: address of the hidden states [tokens, hidden].
            tokens: number of tokens of x.
            tokens_of: all experts that are used, and the tokens of each.

        Close the result when it is no longer needed.
        """
        self._uses[block].add([(expert, len(own)) for expert, (own, _) in tokens_of.items()], tokens)
        sent = RemoteOutputs(self, products, block, x, tokens_of)
        absent = self._host.absent([ExpertKey(block, expert) for expert in tokens_of])
        row_bytes = products.row_bytes
        chosen = [key.expert for key in absent if not self._fetches(key, len(tokens_of[key.expert][0]), row_bytes)]
        if chosen:
            with closed_on_error(sent):
                sent.send(chosen)
            sent.is_timed = len(sent.experts) == len(absent)
        elif absent:
            self.seconds.fade()
        return sent

    def _fetches(self, key: ExpertKey, tokens: int, row_bytes: int) -> bool:
        """Return whether to fetch a record instead of sending ``tokens`` hidden states of ``row_bytes`` each."""
        rate = self.store.rate.value
        fetch = self._manifest.layout(key.block).slot_bytes / rate
        one = self.seconds.value + 2 * row_bytes / rate
        uses = self._uses[key.block].of(key.expert)
        price = fetch / one
        if tokens >= price:
            return True
        # the first call is cheaper, and true wherever the second is
        return earns_slot(uses, 0.0, price) and earns_slot(uses, self._least_uses(key.block), price)

    def _least_uses(self, block: int) -> float:
        """Return the uses of the cached expert of a block that is used least; 0 if there are empty slots."""
        left, least = self._least.get(block, (0, 0.0))
        if not left:
            stats, ready = self._host.stats(), self._host.ready_experts(block)
            least = min(map(self._uses[block].of, ready), default=0.0) if stats.ready >= stats.slots else 0.0
            left = LOOKUP_DEMANDS
        self._least[block] = (left - 1, least)
        return least

    def reserve(self, call: _PeerCall, outputs: int) -> bool:
        """Add outputs to a call, which is waited for, and return True; False if there would be too many in all."""
        with self._lock:
            if sum(waiting.outputs for waiting in self._waiting) + outputs > MAX_WAITING:
                return False
            self._waiting.add(call)
            call.outputs += outputs
            return True

    def free(self, calls: Iterable[_PeerCall]) -> None:
        """Note that the outputs of ``calls`` are not needed any more."""
        with self._lock:
            self._waiting.difference_update(calls)


@dataclass(slots=True, eq=False)
class _PeerCall:
    """A call that sends a part of a block's computation to one daemon."""

    peer: Peer
    failures: int  # of the peer, before the call
    experts: list[int]
    picked: dict[int, None]  # numbers of the tokens whose hidden states are sent
    outputs: int = 0  # number of outputs
    rpc: Any = None  # gRPC's call, or the MoetierError with which it could not begin
    crc: int = 0  # checksum of the request
    began: float = 0.0

    @property
    def is_late(self) -> bool:
        """Whether less than half of the call's time is left. It may then run out while its answer is read."""
        return not isinstance(self.rpc, MoetierError) and self.rpc.time_remaining() < self.peer.store.timeout / 2


class RemoteOutputs(Closeable):
    """Outputs of one block that daemons are computing. Only one thread uses the object, and closes it at the end."""

    def __init__(
        self, owner: RemoteCompute, products: ExpertProducts, block: int, x: int, tokens_of: TokensOfExperts
    ) -> None:
        self._owner = owner
        self._store = owner.store
        self._products = products
        self._block = block
        self._x = x
        self._tokens_of = tokens_of
        self._failures = Counter[str]()  # by name of a daemon: how many of its calls have failed
        self._calls: list[_PeerCall] = []
        self.experts: Collection[int] = ()  # experts that were sent
        self.is_timed = False  # false if records are fetched meanwhile, for which this thread waits first

    def send(self, experts: Sequence[int]) -> None:
        """Send experts to their daemons, in one call to each. Experts beyond the limits of a call are left out."""
        calls: dict[str, _PeerCall] = {}
        row_bytes = self._products.row_bytes
        for expert in experts:
            peer = next(
                (
                    peer
                    for peer in self._store.peers.order(ExpertKey(self._block, expert))
                    if peer.away is None and peer.store.computes and self._failures[peer.name] < ATTEMPTS
                ),
                None,
            )
            if peer is None:
                continue
            if (call := calls.get(peer.name)) is None:
                call = calls[peer.name] = _PeerCall(peer, peer.failures, [], {})
                self._calls.append(call)  # before anything is reserved for it
            own, _ = self._tokens_of[expert]
            picked = call.picked | dict.fromkeys(own)
            outputs = call.outputs + len(own)
            if len(picked) * row_bytes > INPUT_BYTES or outputs > MAX_OUTPUTS or outputs * row_bytes > OUTPUT_BYTES:
                continue
            if not self._owner.reserve(call, len(own)):
                break
            call.experts.append(expert)
            call.picked = picked
        self._calls = [call for call in self._calls if call.experts]
        for call in self._calls:
            self._begin(call)
        self.experts = {expert for call in self._calls for expert in call.experts}

    def collect(self, outputs: int) -> list[int]:
        """Wait for all outputs, and write them to their places from ``outputs`` on, an address.

        What a daemon fails to compute is sent to it once more, unless it is busy or away, and then to the next one. A
        call that has ended because this process read it too late is sent again. Return the experts that no daemon has
        computed.
        """
        left: list[int] = []
        while self._calls:
            calls, failed = self._calls, list[int]()
            for call in calls:
                is_late = call.is_late
                data = self._read(call)
                if isinstance(data, MoetierError):
                    if not (is_late and isinstance(data, UnavailableError)):
                        self._note_failure(call, data)
                    failed += call.experts
                else:
                    self._copy_outputs(call, data, outputs)
            if not failed and self.is_timed:  # the daemons compute at the same time
                self._owner.seconds.add(time.monotonic() - calls[0].began, sum(call.outputs for call in calls))
            self.close()
            if failed:
                self.send(failed)
                left += [expert for expert in failed if expert not in self.experts]
        return left

    def close(self) -> None:
        """Cancel all calls. Idempotent."""
        calls, self._calls = self._calls, []
        self._owner.free(calls)
        for call in calls:
            if call.rpc is not None and not isinstance(call.rpc, MoetierError):
                call.rpc.cancel()

    def _begin(self, call: _PeerCall) -> None:
        """Send the hidden states of a call to its daemon. If that fails, ``_read`` returns the error."""
        numbers = {token: number for number, token in enumerate(sorted(call.picked))}
        size = self._products.row_bytes
        activation = self._products.activation
        request = pb.ComputeRequest(
            digest=self._store.manifest.digest,
            block=self._block,
            experts=call.experts,
            hidden_states=b"".join([ctypes.string_at(self._x + token * size, size) for token in numbers]),
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
        if len(numbers) > 1 or call.outputs > len(call.experts):  # a token may name an expert twice
            for expert in call.experts:
                own, _ = self._tokens_of[expert]
                request.counts.append(len(own))
                request.picked.extend([numbers[token] for token in own])
        call.began = time.monotonic()
        try:
            call.rpc, call.crc = call.peer.store.compute(request, call.outputs * size)
        except MoetierError as error:
            call.rpc = error.with_traceback(None)

    def _read(self, call: _PeerCall) -> bytearray | MoetierError:
        """Return the outputs of a call, or the error of the daemon or the network."""
        if isinstance(call.rpc, MoetierError):
            return call.rpc
        size = call.outputs * self._products.row_bytes
        data, crc = bytearray(), None
        try:
            for message in call.rpc:
                piece, crc = decode_piece(message)
                data += piece
                if len(data) > size:
                    break
        except CALL_ERRORS as error:
            # without the traceback: gRPC's error is the call itself, and its frames hold the tier
            return error_of(error.with_traceback(None), call.peer.store.address.target)
        except ProtocolError as error:
            return error.with_traceback(None)
        if len(data) != size or crc is None:
            return ProtocolError(
                f"The daemon {call.peer.name} did not send outputs of {size:,} bytes with a checksum.", SAME_VERSION
            )
        if crc != crc32c(memoryview(data), call.crc):
            return ChecksumError(
                f"Checksum mismatch in a computation by the daemon {call.peer.name}.", "Check the network, or use TLS."
            )
        self._store.peers.count_computed(call.peer, call.outputs, len(call.picked) * self._products.row_bytes + size)
        return data

    def _copy_outputs(self, call: _PeerCall, data: bytearray, outputs: int) -> None:
        size = self._products.row_bytes
        source = ctypes.addressof(ctypes.c_char.from_buffer(data))
        for number, output in enumerate(output for expert in call.experts for output in self._tokens_of[expert][1]):
            ctypes.memmove(outputs + output * size, source + number * size, size)

    def _note_failure(self, call: _PeerCall, error: MoetierError) -> None:
        """Note that a call has failed. After ATTEMPTS the daemon is skipped for this block, or until its next check."""
        name = call.peer.name
        if isinstance(error, _AWAY):
            self._failures[name] = ATTEMPTS
            self._store.peers.lose(call.peer, error, call.failures)
        elif isinstance(error, ExhaustedError | BudgetError):
            # it has no time or no memory, or is compiling code: it is asked again for the next block
            self._failures[name] = ATTEMPTS
            _log.info("%s: %s", name, error.cause)
        else:
            self._failures[name] += 1
            _log.warning("%s: %s", name, error.cause)
            if isinstance(error, StoreError):
                return
            if self._failures[name] < ATTEMPTS:
                call.peer.store.renew()
            else:
                call.peer.store.stop_computing()
                _log.warning("The daemon %s is not asked to compute any more.", name)
