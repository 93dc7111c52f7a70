"""What other processes take of the CPUs is measured, and said if it matters."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from readers import PATIENCE

from moetier.tools.commands.doctor import findings
from moetier.tools.doctor.machine import State
from moetier.tools.rates.hardware import FREE, CpuTimes, busy

CPUS = len(os.sched_getaffinity(0))
FOREVER = "while True: pass"
A_SECOND = "import time\nwhile time.process_time() < 1: pass"


@contextlib.contextmanager
def others() -> Iterator[None]:
    """Keep all CPUs busy, with processes that have not ended."""
    running = [subprocess.Popen([sys.executable, "-c", FOREVER]) for _ in range(2 * CPUS)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_the_work_of_others_counts() -> None:
    with others():
        times, end = CpuTimes.read(), time.monotonic() + PATIENCE
        while not (said := busy(times.used_by_others())):
            assert time.monotonic() < end
    assert said.startswith("other processes used ")
    assert said.endswith(f" of {CPUS} CPUs")


def test_that_of_this_process_and_its_ended_children_does_not() -> None:
    """However much others do: together it is no more than there is."""
    times = CpuTimes.read()
    for process in [subprocess.Popen([sys.executable, "-c", A_SECOND]) for _ in range(CPUS)]:
        assert process.wait(PATIENCE) == 0
    found, end = times.used_by_others(), CpuTimes.read()
    own = (end.own - times.own) / (end.now - times.now)
    assert own > 0
    assert found <= CPUS - own + 0.1 * CPUS


@pytest.mark.parametrize(("used", "is_told"), [(0.0, False), (0.9 * (1 - FREE) * CPUS, False), (CPUS / 2, True)])
def test_a_little_is_not_told(used: float, is_told: bool) -> None:
    assert bool(busy(used)) == is_told


def test_doctor_warns(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
    with others():
        *_, last = findings(None, seconds=0.01)
    assert (last.name, last.state) == ("load", State.WARN)
    assert "plan and bench" in last.found
