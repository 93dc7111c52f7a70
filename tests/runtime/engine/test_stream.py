"""A caller that waits for tokens is asked whether it still wants them, whatever signals come meanwhile."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import threading
import time
from queue import Queue

from readers import PATIENCE

from moetier.runtime.engine.sequence import Finish, Request, TokenSequence
from moetier.runtime.engine.stream import Stream

SIGNALS = 60
HELD_SECONDS = 0.01  # for which another thread keeps the GIL: Python handles signals a fifth of POLL_SECONDS late


def test_signals_while_another_thread_computes() -> None:
    handled = 0

    def handle(*_: object) -> None:
        nonlocal handled
        handled += 1

    tokens = Queue[int | None]()
    sequence = TokenSequence(Request((1,), 1), on_end=lambda _: tokens.put(None))
    give_up = time.monotonic() + PATIENCE
    asked_in_time = True

    def compute() -> None:
        nonlocal asked_in_time
        keep_gil = ctypes.PyDLL(None).usleep
        while not sequence.is_cancelled and (asked_in_time := time.monotonic() < give_up):
            keep_gil(int(HELD_SECONDS * 1e6))
        sequence.end(Finish.CANCELLED)

    def send() -> None:
        for _ in range(SIGNALS):
            time.sleep(random.uniform(0.01, 0.05))
            os.kill(os.getpid(), signal.SIGUSR1)

    former = signal.signal(signal.SIGUSR1, handle)
    threads = [threading.Thread(target=work) for work in (compute, send)]
    try:
        for thread in threads:
            thread.start()
        assert not [*Stream(sequence, tokens).tokens(lambda: not threads[1].is_alive())]
    finally:
        for thread in threads:
            thread.join()
        signal.signal(signal.SIGUSR1, former)
    assert asked_in_time
    assert handled
