"""Six clients that come, work and die, and a daemon that is restarted twice: at the end everything is as it was.

``SOAK_SECONDS=60 pytest -m slow tests/scenarios/test_soak.py`` for another length of the long form.
"""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest
from daemons import DaemonProcess
from mapped_store import MappedStore
from threads import Task, wait_until
from workers import Crew, WorkerError

SEATS = 6
SHORT = 5.0  # seconds
LONG = float(os.environ.get("SOAK_SECONDS", "600"))


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(SHORT, id="short"),
        pytest.param(LONG, id="long", marks=[pytest.mark.slow, pytest.mark.timeout(2 * LONG + 300)]),
    ],
)
def test_soak(tmp_path: Path, seconds: float) -> None:
    store = MappedStore.make(tmp_path)
    with store.daemon(7, tmp_path / "daemon", ["--wait", "20"]) as daemon, store.crew(daemon) as crew:
        (visitor,) = crew.start()
        visitor.do("work", 0.2)
        assert visitor.finish() == 0
        visitor.end()
        daemon.wait_for("clients == 0")
        descriptors, threads = census(daemon)
        files = listing(tmp_path)

        end = time.monotonic() + seconds
        seats = [Seat(crew, number, end) for number in range(SEATS)]
        tasks = [Task(seat.live, f"seat {seat.number}") for seat in seats]
        for restart in (1, 2):
            wait_until_time(end - seconds * (3 - restart) / 3)
            for seat, task in zip(seats, tasks, strict=True):
                if seat.failed.is_set():
                    task.result()  # raises
            daemon.kill() if restart == 1 else daemon.stop()
            time.sleep(0.3)  # somebody notices
            daemon.start()
        for task in tasks:
            task.result(timeout=max(end - time.monotonic(), 0) + 120)

        lives, used, wrong = (sum(getattr(seat, name) for seat in seats) for name in ("lives", "used", "wrong"))
        print(f"{lives} lives, {used} records used, {sum(seat.thrown for seat in seats)} thrown away, {wrong} wrong")
        assert not wrong
        assert lives >= SEATS // 2, "a slow machine takes seconds to start a process"
        assert used > 5 * seconds
        assert all(seat.ends >= {"closed", "killed"} for seat in seats if seat.lives > 20)

        stats = daemon.wait_for("leases == 0 and clients == 0 and sessions == 0")
        assert stats.host.ready <= stats.host.slots == 7
        wait_until(lambda: census(daemon)[0] <= descriptors)
        assert census(daemon)[1] <= threads + 2 * SEATS, "threads of gRPC's pool, which stay"
        assert listing(tmp_path) == files
        (last,) = crew.start(fallback=False)
        for block in range(3):
            assert sorted(last.do("take", block, *range(6))) == list(range(6))
        assert last.do("stats")["wrong"] == 0
        assert last.do("census")["maps"] == 1
        assert last.finish() == 0
        assert daemon.stop() == 0
        assert "level=error" not in daemon.log
        assert not list(daemon.folder.iterdir())


class Seat:
    """One client at a time, until the end."""

    def __init__(self, crew: Crew, number: int, end: float) -> None:
        self.number = number
        self.lives = self.used = self.thrown = self.wrong = 0
        self.ends: set[str] = set()
        self.failed = threading.Event()
        self._crew = crew
        self._random = random.Random(number)
        self._end = end

    def live(self) -> None:
        try:
            while time.monotonic() < self._end:
                self._life()
        except BaseException:
            self.failed.set()
            raise

    def _life(self) -> None:
        (worker,) = self._crew.start(fallback=self._random.random() < 0.5, timeout=60.0)
        try:
            worker.do("open")
        except WorkerError as error:
            worker.end()
            if error.kind not in ("UnavailableError", "NoDaemonError"):
                raise
            return  # the daemon is being restarted
        for _ in range(self._random.randint(1, 3)):
            worker.do("work", self._random.uniform(0.1, 1.0), self._random.choice([0.0, 0.0005]))
        if self._random.random() < 0.3:  # still where the daemon finds it, and where others have to do without it
            worker.stop()
            time.sleep(self._random.uniform(0.05, 0.3))
            worker.go_on()
        stats = worker.do("stats")
        self.lives += 1
        self.used += stats["used"]
        self.thrown += stats["thrown"]
        self.wrong += stats["wrong"]
        how = self._random.choice(["closed", "killed", "killed with leases", "killed at work"])
        self.ends.add(how)
        match how:
            case "closed":
                assert worker.finish() == 0
            case "killed":
                worker.kill()
            case "killed with leases":
                worker.do("hold", 0, *self._random.sample(range(6), 3))
                worker.kill()
            case "killed at work":
                worker.tell("work", 60.0)
                time.sleep(self._random.uniform(0.01, 0.2))
                worker.kill()
        worker.end()


def census(daemon: DaemonProcess) -> tuple[int, int]:
    """Descriptors and threads of the daemon."""
    process = Path(f"/proc/{daemon.pid}")
    return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def wait_until_time(moment: float) -> None:
    time.sleep(max(moment - time.monotonic(), 0.0))
