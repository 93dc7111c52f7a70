"""Processes whose imports are done: forks of one that has imported what they need, without the seconds of imports."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from moetier.tools.main import COMMANDS as NAMES

ALL = tuple(f"moetier.tools.commands.{name.replace('-', '_')}" for name in NAMES)  # which each command line imports
# what converting a mixtral imports
COMMANDS = (
    *ALL,
    "moetier.tools.convert.api",
    "transformers.models.mixtral.modeling_mixtral",
)
# what loading a model imports, and generating with it
LOADS = (
    "moetier.runtime.devices.cpu",
    "moetier.runtime.engine.engine",
    "moetier.runtime.generation.streamer",
    "moetier.runtime.kernels.ahead",
    "moetier.runtime.model.load",
    "moetier.runtime.model.quantizer",
    "moetier.runtime.stores.checkpoint_store",
    "transformers.models.auto.tokenization_auto",
)
SERVES = ("moetier.tools.serve.app", "uvicorn")
DAEMONS = (
    *ALL,
    "moetier.runtime.daemon.compute",
    "moetier.runtime.daemon.metrics",
    "moetier.runtime.daemon.process",
    "moetier.runtime.client.tier",
)
MAIN = "import sys; from moetier.tools.main import main; sys.exit(main())"  # the arguments are the command line

SHARED = "PREPARED_PROCESSES_OF_TESTS"  # a variable of the environment: the folder of their sockets

# Each script runs in one fork of the server, which reports how it ended: to fork a process with so much memory takes
# longer than most scripts. The server ends, with all scripts, when the last process that keeps it alive has ended.
# After a script, its process waits for threads, calls what is registered for the end and flushes its streams as an
# interpreter does, and leaves the rest to the system: an interpreter would clear each module, and so copy the memory
# that it has from the server. After an exception, and if a stream can't be flushed, it ends as any interpreter does.
SERVER = """
import atexit, ctypes, fcntl, gc, json, os, select, signal, socket, sys, threading, weakref
scripts = socket.socket(fileno=int(sys.argv[1]))
alive = int(sys.argv[3])
HUGE, MADV_COLLAPSE = 2 << 20, 25
gc.disable()
def collapse_memory():
    # huge pages, if the kernel can make them: a fork then copies the entries of 200 pages, not of 90,000
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for first, last, *words in [line.replace("-", " ", 1).split() for line in open("/proc/self/maps")]:
        if words[0] == "rw-p" and words[4:] in ([], ["[heap]"]):
            for address in range(-(-int(first, 16) // HUGE) * HUGE, int(last, 16) - HUGE + 1, HUGE):
                madvise(address, HUGE, MADV_COLLAPSE)
exec(sys.argv[2])
if mapping := sys.modules.get("transformers.conversion_mapping"):
    mapping.get_checkpoint_conversion_mapping("")  # else each load of a model compiles its 1,000 patterns
for finalizer in [*weakref.finalize._registry]:  # torch's: it would delete each of its operators
    finalizer.atexit = False
gc.collect()
gc.freeze()
gc.enable()
collapse_memory()
def tell(report, number):
    try:
        os.write(report, b"%d\\n" % number)
    except BrokenPipeError:  # the test's process has ended
        pass
running = {}  # by a descriptor of its process: its number, and where to report how it ended
while True:
    ready = select.select([scripts, alive, *running], [], [])[0]
    if alive in ready:
        os.killpg(0, signal.SIGKILL)
    for ended in {*ready} & {*running}:
        child, report = running.pop(ended)
        tell(report, os.waitpid(child, 0)[1])
        os.close(report)
        os.close(ended)
    if scripts not in ready:
        continue
    with scripts.accept()[0] as connection:
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 32)
    if not message:
        continue
    report, *descriptors = descriptors
    child = os.fork()
    if not child:
        break
    for descriptor in descriptors:
        os.close(descriptor)
    tell(report, child)
    running[os.pidfd_open(child)] = child, report
for descriptor in (scripts.detach(), alive, report, *running, *(report for _, report in running.values())):
    os.close(descriptor)
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
status = 0
try:
    exec(compile(job["script"], "script", "exec"), {"__name__": "__main__"})
except SystemExit as end:
    status = end.code or 0
    if not isinstance(status, int):
        raise
threading._shutdown()
atexit._run_exitfuncs()
try:
    for stream in (sys.stdout, sys.stderr):
        if not (stream is None or stream.closed):
            stream.flush()
except Exception:
    sys.exit(status)
os._exit(status & 255)
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


def serve(address: Path, alive: int, modules: Iterable[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a process that imports ``modules``, and then runs the scripts that come to the socket ``address``. It ends
    when the other end of the pipe ``alive`` is closed."""
    imports = "\n".join(f"import {name}" for name in modules)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(address))
        listening.listen()
        numbers = (listening.fileno(), alive)
        words = [str(numbers[0]), imports, str(numbers[1])]
        return subprocess.Popen(
            [sys.executable, "-c", SERVER, *words],
            stdin=subprocess.DEVNULL,
            env=os.environ | environment,
            pass_fds=numbers,
            process_group=0,
        )


class Prepared:
    """``run`` or ``start`` a script: a process of its own, whose signals, descriptors and exit status are real."""

    def __init__(self, address: Path, environment: dict[str, str], before: str = "") -> None:
        self._address = address
        self._environment = environment
        self._before = before

    def extended(self, before: str, **environment: str) -> Prepared:
        """Return the same with more variables of the environment, where ``before`` begins each script."""
        return Prepared(self._address, self._environment | environment, self._before + before)

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
        job = {"script": self._before + script, "arguments": words, "environment": variables, "numbers": numbers}
        reading, writing = os.pipe()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as scripts:
                scripts.connect(str(self._address))
                socket.send_fds(scripts, [json.dumps(job).encode()], [writing, stdin, stdout, stderr, *pass_fds])
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


@contextlib.contextmanager
def prepared(*modules: str, commands: Iterable[str] = COMMANDS, **environment: str) -> Iterator[Prepared]:
    """Start a process that has imported ``commands`` and ``modules``, none of which begins a thread.

    ``environment`` is what they read when they are imported.
    """
    with tempfile.TemporaryDirectory() as folder:
        alive, writing = os.pipe()
        try:
            process = serve(Path(folder, "scripts"), alive, (*commands, *modules), environment)
            os.close(alive)
            yield Prepared(Path(folder, "scripts"), environment)
        finally:
            os.close(writing)
            process.wait()


def share_prepared() -> Callable[[], None]:
    """Make the folder of the processes that all of pytest's processes share. Return what ends them."""
    folder = tempfile.mkdtemp()
    os.mkfifo(f"{folder}/alive")
    alive = os.open(f"{folder}/alive", os.O_RDWR)
    os.environ[SHARED] = folder

    def end() -> None:
        os.close(alive)
        shutil.rmtree(folder)

    return end


STARTED: list[subprocess.Popen[bytes]] = []  # they end by themselves


def shared(name: str, *modules: str, **environment: str) -> Prepared:
    """Return the process of this name, which has imported ``modules``. The first that asks for it starts it."""
    if SHARED not in os.environ:
        atexit.register(share_prepared())
    folder = Path(os.environ[SHARED])
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / name).exists():
            alive = os.open(folder / "alive", os.O_RDONLY)
            STARTED.append(serve(folder / name, alive, modules, environment))
            os.close(alive)
    return Prepared(folder / name, environment)


def for_commands() -> Prepared:
    """Return a process that has imported what commands with a model need."""
    return shared("commands", *COMMANDS, *LOADS, *SERVES)


def for_daemons() -> Prepared:
    """Return a process that has imported what daemons and their clients need."""
    return shared("daemons", "google_crc32c", "prometheus_client", *DAEMONS, GRPC_VERBOSITY="NONE")


# runs a module with the arguments after it, until the process of the id before it has ended
MODULE = """import os, runpy, select, sys, threading
caller = os.pidfd_open(int(sys.argv.pop(1)))
threading.Thread(target=lambda: (select.select([caller], [], []), os._exit(1)), daemon=True).start()
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""

# in a control group of its own, which a fork of another process would not be in, it is an interpreter as any other
PYTHON = """#!{python}
import os, sys
from pathlib import Path
_, option, *words = sys.argv
assert option == "-m", sys.argv
if ":/moetier-" in Path("/proc/self/cgroup").read_text():
    os.execv({python!r}, [{python!r}, option, *words])
sys.path.append({helpers!r})
from prepared import MODULE, for_commands
sys.exit(for_commands().start(MODULE, str(os.getpid()), *words, stdin=0, stdout=1).wait())
"""


def as_python(folder: Path) -> Path:
    """Make a program for ``python -m MODULE WORDS`` that runs the module in a process that has done its imports."""
    for_commands()  # else the first program would start it, and its output would not end
    program = folder / "python"
    program.write_text(PYTHON.format(python=sys.executable, helpers=str(Path(__file__).parent)))
    program.chmod(0o755)
    return program
