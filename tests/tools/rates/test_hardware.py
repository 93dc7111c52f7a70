"""The CPU time of other processes is measured. It is reported if it slows this one down."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cgroups import group_below, run_in, version_2, write
from readers import PATIENCE

from moetier.runtime.machine.threads import usable_cpus
from moetier.tools.commands.doctor import findings
from moetier.tools.doctor.machine import State
from moetier.tools.rates import hardware
from moetier.tools.rates.hardware import FREE, CpuTimes, busy

CPUS = usable_cpus()
FOREVER = "while True: pass"
HALF_A_SECOND = "import time\nwhile time.process_time() < 0.5: pass"
seen = pytest.mark.skipif(
    not CpuTimes.read().work, reason="what the control group with this process's quota uses can't be read"
)


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


@seen
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
    for process in [subprocess.Popen([sys.executable, "-c", HALF_A_SECOND]) for _ in range(CPUS)]:
        assert process.wait(PATIENCE) == 0
    found, end = times.used_by_others(), CpuTimes.read()
    own = (end.own - times.own) / (end.now - times.now)
    assert own > 0
    assert found <= CPUS - own + 0.1 * CPUS


@pytest.mark.parametrize(("used", "is_told"), [(0.0, False), (0.9 * (1 - FREE) * CPUS, False), (CPUS / 2, True)])
def test_a_little_is_not_told(used: float, is_told: bool) -> None:
    assert bool(busy(used)) == is_told


def test_time_that_other_machines_took_is_no_work_of_processes_here(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    work = []
    for stolen in (0, 1000):
        lines = [f"cpu{number} 100 20 3 5000 60 7 8 {stolen} 0 0" for number in os.sched_getaffinity(0)]
        (tmp_path / "proc/stat").write_text("\n".join(["cpu 1 2 3 4 5 6 7 8 0 0", *lines, "ctxt 9"]))
        work.append(CpuTimes.read(tmp_path).work)
    ticks = len(os.sched_getaffinity(0)) * (100 + 20 + 3 + 7 + 8)
    assert work == [ticks / os.sysconf("SC_CLK_TCK")] * 2


def test_with_a_quota_the_work_is_that_of_its_group(tmp_path: Path) -> None:
    """The quota is that of the group above this process's own."""
    root = version_2(tmp_path / "2", at_1="50000 100000")
    assert CpuTimes.read(root).work == 0, "can't be read"
    write(root, "docker", cpu__stat="usage_usec 2500000\nuser_usec 1\nsystem_usec 1")
    write(root, "docker/1", cpu__stat="usage_usec 1000000\nuser_usec 1\nsystem_usec 1")
    assert CpuTimes.read(root).work == 2.5
    root = tmp_path / "1"
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("4:cpu,cpuacct:/job\n0::/\n")
    write(root, "cpu/job", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000", cpuacct__usage="1500000000")
    assert CpuTimes.read(root).work == 1.5


@pytest.mark.parametrize("content", [None, "cpu0", "cpu0 a b c d e f g"])
def test_without_the_times_of_the_machine_no_work_is_known(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "proc").mkdir()
        lines = [content.replace("cpu0", f"cpu{number}") for number in os.sched_getaffinity(0)]
        (tmp_path / "proc/stat").write_text("\n".join(lines))
    assert CpuTimes.read(tmp_path).work == 0


def test_cores_that_are_not_computed_on_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "usable_cpus", lambda: 64)
    assert busy(20) == "other processes used 20.0 of 64 CPUs"
    assert not busy(20, 8)
    assert busy(60, 8)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU")
def test_what_is_much_depends_on_the_quota() -> None:
    code = "from moetier.tools.rates.hardware import busy; print(busy(0.2)); print(busy(0.5))"
    with group_below(Path("/sys/fs/cgroup/cpu"), cpu__cfs_period_us="100000", cpu__cfs_quota_us="100000") as group:
        assert run_in(group, code) == ["", "other processes used 0.5 of 1 CPUs"]


def test_doctor_warns(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
    monkeypatch.setattr(CpuTimes, "used_by_others", lambda _: 1.0 * CPUS)
    *_, last = findings(None, seconds=0.01)
    assert (last.name, last.state) == ("load", State.WARN)
    assert "plan and bench" in last.found
