"""Processes whose imports are done: forks of one that has imported what they need, without the seconds of imports."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

# what converting a mixtral imports
COMMANDS = (
    "moetier.tools.commands.convert",
    "moetier.tools.convert.convert",
    "transformers.models.mixtral.modeling_mixtral",
)
DAEMONS = (
    "moetier.tools.commands.daemon",
    "moetier.runtime.daemon.compute",
    "moetier.runtime.daemon.metrics",
    "moetier.runtime.daemon.process",
    "moetier.runtime.client.tier",
)
MAIN = "import sys; from moetier.tools.main import main; sys.exit(main())"  # the arguments are the command line

# For each script there are two processes: one runs the script, and the other, its parent, reports how it ended. The
# first ends as any interpreter does: soon, as what was imported is frozen, and no collection at the end touches, and
# so copies, its pages.
SERVER = """
import fcntl, gc, json, os, signal, socket, sys
scripts = socket.socket(fileno=int(sys.argv[1]))
exec(sys.argv[2])
if "moetier.runtime.kernels.jit.processor" in sys.modules:
    sys.path.append(sys.argv[3])
    from compiled import share_compiled
    share_compiled()
    sys.path.pop()
gc.collect()
gc.freeze()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    message, descriptors, _, _ = socket.recv_fds(scripts, 1 << 20, 32)
    if not message:
        sys.exit()
    if not os.fork():
        break
    for descriptor in descriptors:
        os.close(descriptor)
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
scripts.close()
report, *descriptors = descriptors
if child := os.fork():
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for descriptor in descriptors:
        os.close(descriptor)
    os.write(report, b"%d\\n" % child)
    os.write(report, b"%d\\n" % os.waitpid(child, 0)[1])
    os._exit(0)
os.close(report)
job = json.loads(message)
above = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 1 + max(job["numbers"])) for descriptor in descriptors]
for descriptor in descriptors:
    os.close(descriptor)
for number, descriptor in zip(job["numbers"], above):
    os.dup2(descriptor, number)
    os.close(descriptor)
os.environ.clear()
os.environ.update(job["environment"])
sys.argv[1:] = job["arguments"]
exec(compile(job["script"], "script", "exec"), {"__name__": "__main__"})
"""


class Process:
    """A process that runs a script. It is used as ``subprocess.Popen`` is, and must be waited for."""

    def __init__(self, arguments: Sequence[str], report: int) -> None:
        self.args = arguments
        self.returncode: int | None = None
        self._report = os.fdopen(report, "rb", buffering=0)
        self.pid = int(self._report.readline())

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(int(self._report.readline()))
            self._report.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Prepared:
    """``run`` or ``start`` a script: a process of its own, whose signals, descriptors and exit status are real."""

    def __init__(
        self, modules: Iterable[str], environment: dict[str, str], python: str | Path = sys.executable
    ) -> None:
        self._environment = environment
        imports = "\n".join(f"import {name}" for name in modules)
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [python, "-c", SERVER, str(theirs.fileno()), imports, Path(__file__).parent],
                stdin=subprocess.DEVNULL,
                env=os.environ | environment,
                pass_fds=[theirs.fileno()],
                process_group=0,
            )

    def start(
        self,
        script: str,
        *arguments: object,
        stdin: int,
        stdout: int,
        stderr: int = 2,
        environment: dict[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Process:
        """Run a script beside this process, with these descriptors and, by the same numbers, ``pass_fds``."""
        words = [str(argument) for argument in arguments]
        variables = os.environ | self._environment | (environment or {})
        numbers = [0, 1, 2, *pass_fds]
        job = {"script": script, "arguments": words, "environment": variables, "numbers": numbers}
        reading, writing = os.pipe()
        try:
            socket.send_fds(self.socket, [json.dumps(job).encode()], [writing, stdin, stdout, stderr, *pass_fds])
        finally:
            os.close(writing)
        return Process(words, reading)

    def run(
        self,
        script: str,
        *arguments: object,
        input: str = "",
        environment: dict[str, str] | None = None,
        timeout: float = 250,
    ) -> subprocess.CompletedProcess[str]:
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3)]
            streams[0].write(input)
            streams[0].seek(0)
            stdin, stdout, stderr = (stream.fileno() for stream in streams)
            process = self.start(script, *arguments, stdin=stdin, stdout=stdout, stderr=stderr, environment=environment)
            try:
                status = process.wait(timeout)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            for stream in streams:
                stream.seek(0)
            _, out, err = (stream.read() for stream in streams)
        return subprocess.CompletedProcess(process.args, status, out, err)

    def close(self) -> None:
        self.socket.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with scripts that hang
        self._process.wait()


@contextlib.contextmanager
def prepared(
    *modules: str, commands: Iterable[str] = COMMANDS, python: str | Path = sys.executable, **environment: str
) -> Iterator[Prepared]:
    """Start a process that has imported ``commands`` and ``modules``, none of which begins a thread.

    ``environment`` is what they read when they are imported; ``python`` the interpreter, where it is not that of the
    tests.
    """
    process = Prepared((*commands, *modules), environment, python)
    try:
        yield process
    finally:
        process.close()


@functools.cache
def for_daemons() -> Prepared:
    """Return a process that has imported what daemons and their clients need. It ends with this process."""
    process = Prepared(("google_crc32c", "prometheus_client", *DAEMONS), {"GRPC_VERBOSITY": "NONE"})
    atexit.register(process.close)
    return process
