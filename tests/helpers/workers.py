"""Clients of a daemon as processes of their own, told what to do (mapped_worker.py)."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
from prepared import for_daemons
from readers import PATIENCE

from moetier.tiers.layout import ExpertKey

PROGRAM = Path(__file__).with_name("mapped_worker.py")


class WorkerError(Exception):
    """A MoetierError in the process: ``kind`` is its class's name."""

    def __init__(self, error_class: str, cause: str) -> None:
        super().__init__(f"{error_class}: {cause}")
        self.kind = error_class


class WorkerProcess:
    """``tell`` and ``hear`` apart, or ``do``; by name, the commands of mapped_worker.Worker."""

    def __init__(self, folder: Path, directory: Path, truth: Path, fallback: Path, timeout: float) -> None:
        arguments = [folder, directory, truth, fallback, timeout]
        stdin, writing = os.pipe()
        reading, stdout = os.pipe()
        try:
            self.process = for_daemons().start(PROGRAM.read_text(), *arguments, stdin=stdin, stdout=stdout)
        finally:
            os.close(stdin)
            os.close(stdout)
        self._stdin, self._stdout = os.fdopen(writing, "wb"), os.fdopen(reading, "rb")

    def wait_started(self) -> None:
        self._line()

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, name: str, *arguments: object) -> None:
        self._stdin.write(json.dumps([name, *arguments]).encode() + b"\n")
        self._stdin.flush()

    def hear(self, timeout: float = PATIENCE) -> Any:
        answer = self._line(timeout)
        if "error" in answer:
            raise WorkerError(answer["error"], answer["cause"])
        return answer["value"]

    def do(self, name: str, *arguments: object, timeout: float = PATIENCE) -> Any:
        self.tell(name, *arguments)
        return self.hear(timeout)

    def kill(self) -> None:
        """Kill the process (SIGKILL)."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def stop(self) -> None:
        """SIGSTOP: it holds what it holds."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def finish(self) -> int:
        """Lets it close and end by itself; its exit status."""
        self._stdin.close()
        return self.process.wait(PATIENCE)

    def end(self) -> None:
        """Whatever state it is in."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        for stream in (self._stdin, self._stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def _line(self, timeout: float = PATIENCE) -> Any:
        # lines come one for each command: nothing is left in the buffer
        assert select.select([self._stdout], [], [], timeout)[0], "the client does not answer"
        line = self._stdout.readline()
        assert line, f"the client ended with {self.process.wait(PATIENCE)}"
        return json.loads(line)


class Crew:
    """Starts workers on one daemon's folder."""

    def __init__(self, folder: Path, directory: Path, records: dict[ExpertKey, bytes], scratch: Path) -> None:
        self._folder = folder
        self._directory = directory
        self._truth = scratch / f"truth-{os.getpid()}"
        self._truth.write_text(" ".join(str(google_crc32c.value(records[key])) for key in sorted(records)))
        self._nowhere = scratch / "no-store"
        self.workers: list[WorkerProcess] = []

    def start(self, count: int = 1, *, fallback: bool = True, timeout: float = 30.0) -> list[WorkerProcess]:
        """``fallback``: with the local store to fall back on."""
        directory = self._directory if fallback else self._nowhere
        new = [WorkerProcess(self._folder, self._directory, self._truth, directory, timeout) for _ in range(count)]
        self.workers += new
        for worker in new:
            worker.wait_started()
        return new

    def end(self) -> None:
        for worker in self.workers:
            worker.end()


@contextlib.contextmanager
def crew(folder: Path, directory: Path, records: dict[ExpertKey, bytes], scratch: Path) -> Iterator[Crew]:
    made = Crew(folder, directory, records, scratch)
    try:
        yield made
    finally:
        made.end()
