"""Programs that have the terminal while they run, as an editor has it."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence


def run_in_foreground(command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run a program until it ends, and return its status. Meanwhile Ctrl-C is for the program alone.

    ``environment`` has its variables; None: those of this process. Must be called on the main thread.
    """
    with subprocess.Popen(command, env=environment) as program:  # before: a program inherits what is ignored
        former = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return program.wait()
        finally:
            signal.signal(signal.SIGINT, former)
