"""Daemons as real processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from prepared import MAIN, Process, for_daemons
from readers import PATIENCE

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreStub
from moetier.runtime.wire.address import Address, Credentials, DaemonCard
from moetier.runtime.wire.channel import open_channel
from moetier.runtime.wire.control import ControlConnection

PROGRAM = [sys.executable, "-m", "moetier.tools.main"]


class DaemonProcess:
    """``moetier daemon``; ``log`` is what it wrote to stderr so far."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        log: Path,
        environment: dict[str, str],
        descriptors: Sequence[int] = (),
    ) -> None:
        self.command = list(command)
        self._environment = environment
        self._descriptors = descriptors
        self.folder = folder
        self._log = log
        self.address = Address.of(folder)
        self.start()

    def start(self) -> None:
        """Until it is ready; fails if it ends instead."""
        reading, low = os.pipe()
        writing = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 100)  # a command before it may want the lowest
        os.close(low)
        try:
            with self._log.open("ab") as log:
                self.process = self._started(writing, log.fileno())
            os.close(writing)
            writing = -1
            assert select.select([reading], [], [], PATIENCE)[0], f"it does not get ready:\n{self.log}"
            said = os.read(reading, 16)
            if said != b"ready\n":
                status = self.process.wait(PATIENCE)
                raise AssertionError(f"it ended with {status}:\n{self.log}")
        except BaseException:
            self.end()
            raise
        finally:
            os.close(reading)
            if writing >= 0:
                os.close(writing)

    def _started(self, ready: int, log: int) -> subprocess.Popen[bytes] | Process:
        """The process, which has ``ready`` open, and writes to ``log``. In tests, a fork of a prepared one where it is
        to have our environment."""
        command = [*self.command, "--ready-fd", str(ready)]
        kept = [ready, *self._descriptors]
        with Path(os.devnull).open() as nothing:
            is_ours = command[: len(PROGRAM)] == PROGRAM and self._environment == os.environ
            if is_ours and "PYTEST_CURRENT_TEST" in os.environ:
                words = command[len(PROGRAM) :]
                streams = {"stdin": nothing.fileno(), "stdout": log, "stderr": log}
                return for_daemons().start(MAIN, *words, **streams, pass_fds=kept)
            return subprocess.Popen(
                command, stdin=nothing, stdout=log, stderr=log, pass_fds=kept, env=self._environment
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def card(self) -> DaemonCard:
        card = DaemonCard.read(self.folder)
        assert card is not None
        return card

    def kill(self) -> None:
        """Kill the process (SIGKILL)."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def restart(self) -> None:
        """Starts it again, where it has been killed or stopped; else kills it first."""
        if self.process.poll() is None:
            self.kill()
        self.start()

    @contextlib.contextmanager
    def stub(self) -> Iterator[ExpertStoreStub]:
        """Yield a stub whose credential permits only Describe and Stats."""
        with (
            ControlConnection.open(self.folder, None, timeout=PATIENCE) as control,
            open_channel(self.address, Credentials(), bearer=control.session_id) as channel,
        ):
            yield ExpertStoreStub(channel)

    def stats(self, digest: str | None = None) -> pb.ModelStats:
        """Return the counters of one model; by default of the only one."""
        with self.stub() as stub:
            return _stats(stub, digest)

    def wait_for(self, condition: str) -> pb.ModelStats:
        """Until a statement about its statistics (``"leases == 0"``) is true."""
        deadline, pause = time.monotonic() + PATIENCE, 0.005
        with self.stub() as stub:
            while True:
                stats = _stats(stub)
                names = {field.name: getattr(stats, field.name) for field in stats.DESCRIPTOR.fields}
                if eval(condition, names):
                    return stats
                assert time.monotonic() < deadline, f"never {condition}:\n{stats}\n{self.log}"
                time.sleep(pause)
                pause = min(1.1 * pause, 0.1)

    def end(self) -> None:
        """Whatever state it is in."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(PATIENCE)


def _stats(stub: ExpertStoreStub, digest: str | None = None) -> pb.ModelStats:
    models = stub.Stats(pb.StatsRequest(), timeout=PATIENCE).models
    return next(model for model in models if digest in (None, model.digest))


def daemon_command(directories: Path | Sequence[Path], *options: str | Path) -> list[str]:
    names = [directories] if isinstance(directories, Path) else directories
    return [*PROGRAM, "daemon", *map(str, [*names, *options])]


@contextlib.contextmanager
def running_daemon(
    directory: Path | Sequence[Path],
    *,
    ram: str | int | None = None,
    folder: Path,
    extra: Sequence[str | Path] = (),
    prefix: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    descriptors: Sequence[int] = (),
) -> Iterator[DaemonProcess]:
    """A daemon of a model directory, or of several. ``folder`` is made where it is missing; its log is beside it.
    ``prefix`` is a command that execs what follows; ``descriptors`` stay open in it."""
    options = ["--folder", folder, *(["--ram", str(ram)] if ram is not None else []), *extra]
    command = [*prefix, *daemon_command(directory, *options)]
    log = folder.parent / f"{folder.name}.log"
    daemon = DaemonProcess(command, folder, log, os.environ | (environment or {}), descriptors)
    try:
        yield daemon
    finally:
        daemon.end()
