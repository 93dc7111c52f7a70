"""Programs that have the terminal while they run, as an editor has it."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence


def run_in_foreground(command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run a program until it ends, and return its status. Meanwhile Ctrl-C is for the program alone.

    ``environment`` has its variables; None: those of this process. Must be called on the main thread.
    """
    # a handler, as the program would inherit that the signal is ignored
    former = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return subprocess.run(command, env=environment, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, former)
