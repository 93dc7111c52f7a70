"""Children by a real fork, without what a new program would bring."""

from __future__ import annotations

import os
import select
import signal
import warnings
from collections.abc import Callable

from threads import wait_until


def in_fork(work: Callable[[], object]) -> str:
    """What ``work`` says of itself in a forked child; the error that it raises, if it does. A hang fails."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks of a process with threads
        child = os.fork()
    if not child:
        try:
            said = f"returned {work()}"
        except BaseException as error:
            said = f"{type(error).__name__}: {' '.join(str(error).splitlines())}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    try:
        wait_until(lambda: bool(select.select([reading], [], [], 0.05)[0]))
        return os.read(reading, 4096).decode()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
