"""Loaders: the threads of a host tier that read records into slots, each one record at a time."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from functools import partial

from moetier.tiers.closeable import Closeable
from moetier.tiers.locks import Monitor, transition, waiting
from moetier.tiers.store.base import Pause
from moetier.tiers.threads import start_thread

from .demands import Load
from .loads import Loads
from .waiting import Notifier


class Loaders(Closeable):
    """A few threads, which take loads in transitions, and read the records outside of them.

    Args:
        monitor: the tier's monitor.
        loads: the tier's loads.
        notifier: wakes a loader for each load that can be read.
        read: reads the record of a load into its slot. It calls the function, if there is one, between two pieces.
        run_or_condemn: runs a thread; if the thread fails, it condemns the tier.
    """

    def __init__(
        self,
        monitor: Monitor,
        loads: Loads,
        notifier: Notifier,
        read: Callable[[Load, Pause | None], None],
        run_or_condemn: Callable[[Callable[[], None]], None],
    ) -> None:
        self._monitor = monitor
        self._loads = loads
        self._notifier = notifier
        self._read_record = read
        self._run_or_condemn = run_or_condemn
        self._threads: list[threading.Thread] = []

    def start(self, count: int) -> None:
        """Start ``count`` threads."""
        for number in range(count):
            # daemon threads, so that a tier that is never closed does not keep the interpreter from ending
            self._threads.append(start_thread(f"moetier-loader-{number}", self._run_or_condemn, self._run))

    def close(self) -> None:
        """End the threads, once the reads in progress have ended. The loads have been closed before. Idempotent."""
        for _ in self._threads:
            self._notifier.wake_loader()
        for loader in self._threads:
            loader.join()

    def _run(self) -> None:
        while self._loads.closed_by is None:
            self._notifier.loaders.get()
            while (load := self._take()) is not None:
                self._read(load)

    def _read(self, load: Load) -> None:
        """Read the record of a load. If the read fails, all demands that wait for the record get the error."""
        # a read may pause only if there is a second loader, which reads for demands during the pause
        pause = partial(self._pause, load) if load.is_prefetch and len(self._threads) > 1 else None
        began = time.monotonic()
        try:
            self._read_record(load, pause)
            self._complete(load, time.monotonic() - began)
        except _CancelledError:
            pass
        except BaseException as error:  # any exception, because the demands that wait for the record must get it
            traceback.clear_frames(error.__traceback__)  # the frames would keep the slot's memory
            self._fail(load, error)

    def _pause(self, load: Load) -> bool:
        """Sleep while the read of a prefetch has to yield to demands. Return whether it may have to yield again.

        Once a demand waits for the prefetched record, the read need not yield any more. Raises _CancelledError if the
        load was cancelled.
        """
        if not self._continue_or_cancel(load):
            raise _CancelledError
        return not load.waiters

    @transition
    def _take(self) -> Load | None:
        return self._loads.take()

    @transition
    def _complete(self, load: Load, seconds: float) -> None:
        self._loads.complete(load, seconds)

    @transition
    def _fail(self, load: Load, error: BaseException) -> None:
        self._loads.fail(load, error)

    @waiting
    def _continue_or_cancel(self, load: Load) -> bool | None:
        return self._loads.continue_or_cancel(load)


class _CancelledError(Exception):
    """Ends the read of a load that was cancelled."""
