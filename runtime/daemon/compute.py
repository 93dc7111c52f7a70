"""The daemon's end of the call Compute: computes experts for hidden states that another host sends.

Clients compute with the same compiled code, whose results depend only on the hidden state and the record. So they get
the bits that they would compute themselves. The module imports compiled kernels, so it is imported with the first call.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from array import array
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import grpc
import numpy as np
import numpy.typing as npt

from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.kernels.experts.expert_code import FUNCTIONS, Activation
from moetier.runtime.kernels.experts.expert_products import BATCH_OUTPUTS, ExpertProducts
from moetier.runtime.kernels.jit.emitter import BF16, FP32
from moetier.runtime.kernels.jit.processor import refusal
from moetier.runtime.kernels.jit.team import Memory
from moetier.runtime.wire.channel import MAX_OUTPUTS, OUTPUT_BYTES
from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import SAME_VERSION, ConfigError, ExhaustedError, ProtocolError
from moetier.tiers.host.demands import Granted
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import SLOT_TIMEOUT
from moetier.tiers.store.checksum import crc32c
from moetier.tiers.threads import start_thread

from .leases import CallLeases, OpenCalls, no_caller, timeout_of

_TYPES = {"bfloat16": BF16, "float32": FP32}

# guards: ``_memory`` and the team of threads, which compute one call after the other
_computing = threading.Lock()
_memory = Memory()


class ExpertTokens(NamedTuple):
    """Tokens of one expert that are computed together."""

    first: int  # number of the first token's output
    tokens: npt.NDArray[Any]  # numbers of the tokens, [n]


@dataclass(frozen=True, slots=True)
class ComputeTask:
    """The checked request of one call."""

    keys: list[ExpertKey]
    products: ExpertProducts
    hidden_states: npt.NDArray[Any]  # as bytes, [tokens, bytes of a hidden state]
    parts: dict[int, list[ExpertTokens]]  # by expert
    outputs: int  # number of outputs


class ComputeCalls(Closeable):
    """Compute calls of other hosts on one host tier. A call waits at most ``timeout`` seconds for a slot.

    A call holds slots while it computes, and while it waits for other calls to compute or for its other records. While
    its client takes the answer, it holds none.
    """

    def __init__(self, host: HostTier, manifest: Manifest, *, timeout: float = SLOT_TIMEOUT) -> None:
        """Raises ConfigError if no code can be compiled here."""
        if why := refusal():
            raise ConfigError(f"This daemon can't compute experts ({why}).", "Fetch records instead.")
        self._host = host
        self._manifest = manifest
        self._timeout = timeout
        self._leases = CallLeases(host, timeout=timeout)
        self._calls = OpenCalls("computations")
        self._state = threading.Lock()  # guards: the fields below
        self._is_closed = False
        # by layout, variant of the activation and type: None while code is compiled; an error if it can't be compiled
        self._products: dict[tuple[str, Activation, str], ExpertProducts | ConfigError | None] = {}
        self._compilers: list[threading.Thread] = []
        self._computed = 0  # number of outputs that were computed

    def serve(self, request: pb.ComputeRequest, context: grpc.ServicerContext) -> Generator[bytes, None, None]:
        """Yield the outputs as serialised pieces, once all are computed.

        The last has a checksum of request and outputs, if the request has one.

        Raises MissingExpertError if the model has no such expert; ProtocolError if the call has no deadline or asks for
        what can't be computed; ExhaustedError if it asks for too much, too many calls are under way, or there is no
        slot; and the error of a failed load.
        """
        timeout = timeout_of(context, self._timeout, "A computation")
        deadline = time.monotonic() + timeout
        with self._calls.admit(context):
            task = self._check(request)
            outputs = np.empty((task.outputs, task.hidden_states.shape[1]), np.uint8)
            with closing(self._leases.batches(task.keys, context, deadline, waits_for_reads=False)) as batches:
                for batch in batches:
                    self._compute(task, batch, outputs, deadline)
            with self._state:
                self._computed += task.outputs
            data = outputs.reshape(-1).data
            # the client thereby knows that these are the outputs for what it has sent
            crc = crc32c(data, request.crc32c) if request.HasField("crc32c") else None
            yield from self._calls.pieces(context, data, crc)

    def counts(self) -> dict[str, int]:
        """Return the counts of the calls. They are fields of ModelStats."""
        with self._state:
            return {"computed": self._computed}

    def close(self) -> None:
        """Refuse new calls, end those under way, and wait for compilers. Idempotent."""
        with self._state:
            self._is_closed = True
            compilers = [*self._compilers]
        self._calls.cancel()
        self._leases.close()
        for compiler in compilers:
            compiler.join()

    def _check(self, request: pb.ComputeRequest) -> ComputeTask:
        """Check a request. Raises as ``serve`` does."""
        if (asked := max(len(request.experts), len(request.picked))) > MAX_OUTPUTS:  # before they become large lists
            raise _too_much(asked)
        experts = list(request.experts)
        keys = [ExpertKey(request.block, expert) for expert in experts]
        if not keys:
            raise ProtocolError("A computation names no expert.", SAME_VERSION)
        if len(set(keys)) < len(keys):
            raise ProtocolError(f"A computation names an expert twice: {experts}.", SAME_VERSION)
        self._manifest.check_keys(request.block, keys)
        products = self._products_for(request)
        row_bytes = products.width * _TYPES[request.dtype].itemsize
        count, rest = divmod(len(request.hidden_states), row_bytes)
        if rest or not count:
            raise ProtocolError(
                f"hidden_states has {len(request.hidden_states):,} bytes, not a positive multiple of {row_bytes:,}: "
                f"{products.width:,} numbers of {request.dtype} for each token.",
                SAME_VERSION,
            )
        if not request.counts:
            picked = [np.arange(count)] * len(keys)
        else:
            indices = np.array(request.picked, np.int64)
            if len(request.counts) != len(keys) or sum(request.counts) != len(indices):
                raise ProtocolError(
                    f"counts has {len(request.counts)} entries, which add up to {sum(request.counts):,}. There must be "
                    f"one for each of {len(keys)} experts, and they must add up to the {len(indices):,} picked tokens.",
                    SAME_VERSION,
                )
            picked = np.split(indices, np.cumsum(np.array(request.counts[:-1], np.int64)))
            if not all(request.counts):
                raise ProtocolError("counts has a 0: an expert would compute no token.", SAME_VERSION)
            if (last := indices.max()) >= count:
                raise ProtocolError(f"Picked token {last:,} is not among the {count:,} sent.", SAME_VERSION)
        total = sum(map(len, picked))
        if total > MAX_OUTPUTS or total * row_bytes > OUTPUT_BYTES:
            raise _too_much(total)
        firsts = itertools.accumulate(map(len, picked), initial=0)
        parts = {
            expert: [
                ExpertTokens(first + at, tokens[at : at + BATCH_OUTPUTS]) for at in range(0, len(tokens), BATCH_OUTPUTS)
            ]
            for expert, first, tokens in zip(experts, firsts, picked, strict=False)
        }
        hidden_states = np.frombuffer(request.hidden_states, np.uint8).reshape(count, row_bytes)
        return ComputeTask(keys, products, hidden_states, parts, total)

    def _products_for(self, request: pb.ComputeRequest) -> ExpertProducts:
        """Return compiled code for a request.

        Raises ProtocolError or ConfigError if it can't be compiled, ExhaustedError while it is being compiled, and
        ClosedError after ``close``.
        """
        array_name = self._manifest.blocks[request.block].array
        asked = request.activation
        if request.dtype not in _TYPES or asked.function not in FUNCTIONS:
            raise ProtocolError("The type of the hidden states or the activation is unknown.", SAME_VERSION)
        if not (math.isfinite(asked.alpha) and math.isfinite(asked.shift) and asked.limit > 0):
            raise ProtocolError(
                "The numbers of the activation are not finite, or its limit is not above 0.", SAME_VERSION
            )
        activation = Activation(asked.function, asked.interleaved, asked.alpha, asked.limit, asked.shift, asked.gated)
        variant = (array_name, activation.variant, request.dtype)
        with self._state:
            if self._is_closed:
                raise no_caller()
            if variant not in self._products:
                self._compile(variant)
            products = self._products[variant]
        if products is None:
            raise ExhaustedError("The daemon is still compiling code for these experts.", "Fetch records meanwhile.")
        if isinstance(products, ConfigError):
            raise products.fresh()
        return products.with_activation(activation)

    def _compile(self, variant: tuple[str, Activation, str]) -> None:
        """Begin to compile code in the background, as a client takes a daemon that does not answer for lost.

        The caller holds ``_state``. Raises ProtocolError if it can't be compiled, ExhaustedError if there is no thread
        for it.
        """
        array_name, activation, dtype = variant
        layout = self._manifest.layouts[array_name]
        if not ExpertProducts.can_compile(layout, activation):
            raise ProtocolError(f"No code can be compiled for experts in {array_name}.", "Fetch their records instead.")
        self._products[variant] = None

        def work() -> None:
            try:
                products: ExpertProducts | ConfigError = ExpertProducts(layout, activation, _TYPES[dtype])
            except Exception as error:  # as there is no memory that can be made executable
                products = ConfigError(
                    f"This daemon can't compile code for these experts ({error}).", "Fetch records instead."
                )
            with self._state:
                self._products[variant] = products

        try:
            self._compilers.append(start_thread("moetier-compiler", work, daemon=False))
        except ExhaustedError:  # the system gives no thread: the next call tries again
            del self._products[variant]
            raise

    def _compute(
        self, task: ComputeTask, leases: Sequence[Granted], outputs: npt.NDArray[Any], deadline: float
    ) -> None:
        """Compute experts whose records are leased. Raises ExhaustedError if other calls compute until ``deadline``."""
        if not _computing.acquire(timeout=max(deadline - time.monotonic(), 0.0)):
            raise ExhaustedError("Other computations did not end in time.", "Ask another daemon, or try again later.")
        try:
            batch: list[tuple[int, ExpertTokens]] = []
            left = BATCH_OUTPUTS
            # referenced while their addresses are used, so that the arena is not unmapped
            records = [np.frombuffer(self._host.record_and_checksum(granted.slot), np.uint8) for granted in leases]
            for granted, record in zip(leases, records, strict=True):
                for part in task.parts[granted.key.expert]:
                    if batch and len(part.tokens) > left:
                        _compute_batch(task, batch, outputs)
                        batch, left = [], BATCH_OUTPUTS
                    batch.append((record.ctypes.data, part))
                    left -= len(part.tokens)
            _compute_batch(task, batch, outputs)
        finally:
            _computing.release()


def _too_much(outputs: int) -> ExhaustedError:
    return ExhaustedError(
        f"{outputs:,} outputs are more than the {MAX_OUTPUTS:,} outputs or {OUTPUT_BYTES:,} bytes that are allowed.",
        "Ask for fewer outputs at a time, or fetch the records.",
    )


def _compute_batch(task: ComputeTask, batch: Sequence[tuple[int, ExpertTokens]], outputs: npt.NDArray[Any]) -> None:
    """Compute at most BATCH_OUTPUTS outputs; ``batch`` has the address of a record for each part."""
    jobs, places = array("q"), array("q")
    for address, part in batch:
        jobs.extend((address, len(places), len(part.tokens)))
        places.extend(range(part.first, part.first + len(part.tokens)))
    # all experts share the hidden state of one token, unless an expert computes it several times
    is_shared = len(task.hidden_states) == 1 and len(places) == len(batch)
    x = task.hidden_states if is_shared else task.hidden_states[np.concatenate([part.tokens for _, part in batch])]
    task.products.compute_at(x.ctypes.data, len(x), jobs, places, outputs.ctypes.data, _memory)
