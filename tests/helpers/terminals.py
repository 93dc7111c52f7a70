"""A process in a terminal of its own, and a person who types."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from codecs import getincrementaldecoder
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from prepared import Prepared, Process

CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
PATIENCE = 120.0  # seconds, for a machine that has other work

_TAKE = (  # the terminal becomes the one whose Ctrl-C it gets, which who started us may have been told to ignore
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
)

# the same in a fork of a process that has done its imports
_TAKE_IN_A_FORK = """
import fcntl, os, signal, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)
"""


def _plain(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what says another size than the terminal itself, as where tests run side by side."""
    return {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")}


class Terminal:
    """Runs Python with ``arguments``, or a script with them in a fork of ``scripts``. A context manager, which ends
    what still runs. A terminal of ``size`` (columns, lines) has it before the process looks."""

    def __init__(
        self,
        *arguments: str,
        size: tuple[int, int] | None = None,
        scripts: Prepared | None = None,
        **environment: str,
    ) -> None:
        self._master, slave = pty.openpty()
        if size is not None:
            termios.tcsetwinsize(self._master, size[::-1])
        environment = {"TERM": "xterm", "INPUTRC": os.devnull} | environment
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        self._process: subprocess.Popen[bytes] | Process
        try:
            if scripts is not None:
                script, *words = arguments
                script = _TAKE_IN_A_FORK + script
                self._process = scripts.start(script, *words, environment=environment, **streams)
            else:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _TAKE, sys.executable, *arguments],
                    start_new_session=True,
                    env=_plain(os.environ) | environment,
                    **streams,
                )
        finally:
            os.close(slave)
        self.screen = ""  # all that was written, without carriage returns
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._seen = 0

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def send(self, number: int) -> None:
        """A signal, to the process."""
        self._process.send_signal(number)

    def interrupt(self) -> None:
        """Ctrl-C at a prompt: typed when the process waits for keys, for Python misses a signal that comes just before
        it does, until the next key."""
        while Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0] not in "SZ":
            os.sched_yield()
        self.type(CTRL_C)

    def wait_for(self, pattern: str) -> str:
        """Wait for a match, and return the output since the last wait, up to the end of the match."""
        deadline = time.monotonic() + PATIENCE
        while not (match := re.compile(pattern, re.DOTALL).search(self.screen, self._seen)):
            ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            piece = self._read() if ready else b""
            assert piece, f"no {pattern!r} in {self.screen!r}"
            self.screen += self._decoder.decode(piece).replace("\r", "")
        start, self._seen = self._seen, match.end()
        return self.screen[start : self._seen]

    def _read(self) -> bytes:
        try:
            return os.read(self._master, 4096)
        except OSError:  # nobody has the terminal open any more
            return b""

    def status(self) -> int:
        """Wait for the end of the process, and return its status."""
        while self._read():
            pass
        return self._process.wait(PATIENCE)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._master)
