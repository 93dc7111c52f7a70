"""Tiers of one model in this process, opened and closed together."""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from moetier.runtime.config import SpeculationMode, TierConfig
from moetier.runtime.devices.device import ComputeDevice, MemoryDevice
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.machine.memory import memory_for_model
from moetier.runtime.moe.block import refuse_copy
from moetier.runtime.moe.gates import Observation
from moetier.runtime.speculation.speculation import Speculation
from moetier.tiers.closeable import Closeable
from moetier.tiers.device.tier import DeviceTier
from moetier.tiers.device.views import HostViews
from moetier.tiers.errors import ConfigError
from moetier.tiers.manifest import Manifest
from moetier.tiers.stats import TierStats
from moetier.tiers.threads import start_thread

from .budgets import ModelMemory, Needs
from .kv_budget import NO_KV, KVBudget
from .prefill_memory import Prefill
from .sources import Origin, open_origin
from .trunk_files import TrunkFiles

NO_NEEDS = Needs()  # all memory is for experts

_log = logging.getLogger(__name__)
_closers: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # those that have not ended


class Tiers(Closeable):
    """Tiers of one model, kept as ``model.tiers``. A context manager, which closes them."""

    @classmethod
    def open(
        cls,
        location: Path,
        manifest: Manifest,
        config: TierConfig,
        device: ComputeDevice,
        *,
        needs: Needs = NO_NEEDS,
        kernels: Kernels | None = None,
        trunk_files: TrunkFiles | None = None,
    ) -> Tiers:
        """Open the tiers of a model directory, to compute on ``device``.

        Args:
            location: the model directory, checkpoint folder or GGUF file.
            manifest: the manifest of its store.
            config: the options of the tiers.
            device: the device that computes.
            needs: memory to leave besides that of experts. If it is short, fewer tokens will be computed together.
            kernels: the kernels that compute with the experts; by default those of ``device``.
            trunk_files: the files of the trunk, which ``close`` closes.

        Raises StoreError if the store can't be opened, BudgetError if no memory budget is possible, DaemonError if
        ``config`` names a daemon that can't be used, and ConfigError for ``device_memory`` if ``device`` has none.
        """
        if config.device_memory is not None and not device.has_memory:
            raise ConfigError(
                "On a CPU there is no device memory: experts stay in host memory.",
                "Leave out `device_memory`; `ram` is the memory for experts.",
            )
        kernels = kernels or device.kernels(exact=config.exact)
        memory = ModelMemory(manifest, config, device, needs)
        with contextlib.ExitStack() as undo:
            origin = open_origin(
                location,
                manifest,
                config,
                lambda: memory.host_slots(memory_for_model()),
                computes=kernels.processor is not None,
            )
            undo.callback(origin.close)
            tier: HostViews | DeviceTier = HostViews(origin.host)
            if isinstance(device, MemoryDevice):
                tier = DeviceTier(
                    origin.host,
                    manifest,
                    slots=memory.device_slots(device.free_memory()),
                    device=device.streams(),
                    promotes=config.speculate is not SpeculationMode.OFF,
                    policy=config.policy,
                    arrange=kernels.arrange,
                )
                undo.callback(tier.close)
                kernels.on_out_of_memory(tier.shrink)
            elif origin.daemon is not None:
                memory.beside_daemon(memory_for_model())
            tiers = cls(manifest, origin, tier, kernels, memory.prefill, needs.kv, trunk_files)
            undo.pop_all()
        is_wanted = config.prefill_chunk is not None or not needs.prefill.resumes
        if is_wanted and tiers.prefill_chunk < (tokens := needs.prefill.tokens):
            room = f"{tiers.prefill_chunk:,} tokens"
            what = f"to compute {room} of a prompt together" if needs.prefill.resumes else f"for a prompt of {room}"
            _log.warning("Memory leaves room %s, not %s.", what, f"{tokens:,}")
        return tiers

    def __init__(
        self,
        manifest: Manifest,
        origin: Origin,
        source: HostViews | DeviceTier,
        kernels: Kernels,
        prefill: Prefill,
        kv: KVBudget = NO_KV,
        trunk_files: TrunkFiles | None = None,
    ) -> None:
        self.manifest = manifest
        self.origin = origin
        self.prefill = prefill  # memory for the tokens of a prompt that are computed together
        self.kv = kv  # memory for keys and values, and the context
        self.host = origin.host
        self.where = origin.where  # text for a user: where the experts come from
        self.source = source
        self.kernels = kernels
        self.speculation: Speculation | None = None  # set by ``speculate``
        self.hooks = Observation()  # hooks on the model, besides those of the speculation
        self._trunk_files = trunk_files
        self.close_sources = partial(_close_sources, source, origin)  # without a reference to the model

    @property
    def prefill_chunk(self) -> int:
        """Most tokens of a prompt that memory leaves room to compute together."""
        return self.prefill.tokens

    def speculate(self, speculation: Speculation) -> None:
        """Predict experts with ``speculation`` until ``close``."""
        self.speculation = speculation
        speculation.attach()

    def stats(self) -> list[TierStats]:
        """Return the counters of the host tier and, on a GPU, of the device tier."""
        return [self.host.stats(), *([self.source.stats()] if isinstance(self.source, DeviceTier) else [])]

    def describe_context(self, context: int | None = None) -> str:
        """Return the length of a context, and what its keys and values cost, for a user. None: the model's context."""
        return self.kv.describe(self.kv.context if context is None else context)

    def snapshot(self) -> dict[str, Any]:
        """Return a dictionary from the tiers' names ("host" or "daemon", and "device") to their counters, for JSON."""
        return {stats.name: stats.to_json() for stats in self.stats()}

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_copy()

    def close(self) -> None:
        """Detach from the model, and close the tiers. Idempotent; waits for loads that have begun."""
        with contextlib.ExitStack() as closing:
            closing.callback(self.close_sources)
            if self._trunk_files is not None:
                closing.callback(self._trunk_files.close)
            closing.callback(self.hooks.close)
            if self.speculation is not None:
                self.speculation.detach()


def _close_sources(source: HostViews | DeviceTier, origin: Origin) -> None:
    with contextlib.closing(origin):
        source.close()


def close_later(close_sources: Callable[[], None], tiers: weakref.ref[Tiers]) -> None:
    """Close the tiers of a model that was garbage-collected, in a thread of its own.

    The garbage collector may call this in any thread, even in a loader or in a thread that holds a tier's lock. Closing
    waits for both, so another thread has to do it. It is a daemon thread, because starting one takes no lock that the
    calling thread may hold. At the interpreter's end, a new thread would not finish. This call then interrupts no other
    work, so it closes the tiers itself.

    The reference to ``tiers`` must be weak, because its speculation refers to the model.
    """
    if (referent := tiers()) is not None and referent.speculation is not None:
        referent.speculation.detach()
    if threading.current_thread() is threading.main_thread() and not threading.main_thread().is_alive():
        close_sources()
        return

    _closers.add(start_thread("moetier-closer", close_sources))


@atexit.register
def _wait_for_closers() -> None:
    """At the interpreter's end, wait for threads that close tiers.

    A thread inside torch's C++ code can't be unwound, and may crash the ending process.
    """
    for closer in list(_closers):
        closer.join()
