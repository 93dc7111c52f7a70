"""The team of threads that runs kernels. Jobs here are functions of Python, which any of its threads may call."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moetier.runtime.kernels.jit.team import Kernel, KernelTask, Team, run_all, the_team

SECONDS = 20  # for what must not take so long
Job = Callable[[int], None]


def kernel(job: Job) -> tuple[Kernel, object]:
    """A kernel that calls a function of Python, and what must live as long as it."""
    called = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(job)
    return Kernel(ctypes.cast(called, ctypes.c_void_p).value or 0, called, called), called


@pytest.fixture
def team() -> Iterator[Team]:
    found = Team()
    yield found
    found.stop()


def run(team: Team, job: Job, threads: int, times: int = 1) -> None:
    made, called = kernel(job)
    context = array("q", [0])
    words = array("q", [made.address, context.buffer_info()[0], threads - 1] * times)
    team.prepare(threads - 1)
    team.run(team.address, words.buffer_info()[0], times)
    del called


def test_all_threads_take_part_and_the_caller_waits_for_them(team: Team) -> None:
    """Each thread waits in the job for the others, so that all must have joined."""
    together, done = threading.Barrier(3), []

    def job(_: int) -> None:
        together.wait(SECONDS)
        done.append(threading.get_ident())

    run(team, job, 3, times=5)
    assert len(done) == 15
    assert len(set(done)) == 3
    assert threading.get_ident() in done


def test_the_caller_waits_for_a_slow_worker_that_has_joined(team: Team) -> None:
    caller, joined, done = threading.get_ident(), threading.Event(), []

    def job(_: int) -> None:
        if threading.get_ident() == caller:
            assert joined.wait(SECONDS)
        else:
            joined.set()
            threading.Event().wait(0.3)  # longer than the caller spins
            done.append(True)

    run(team, job, 2)
    assert done == [True]


def test_a_worker_that_is_late_is_left_out(team: Team) -> None:
    """The worker is kept busy by one job; the caller of others computes alone, without waiting."""
    busy, free, found = threading.Event(), threading.Event(), []

    def blocks(_: int) -> None:
        busy.set()
        assert free.wait(SECONDS)

    first = threading.Thread(target=run, args=(team, blocks, 2))
    first.start()
    assert busy.wait(SECONDS)
    run(team, lambda _: found.append(threading.get_ident()), 2, times=3)
    assert found == [threading.get_ident()] * 3
    free.set()
    first.join(SECONDS)
    assert not first.is_alive()


def test_many_callers_and_short_jobs(team: Team) -> None:
    """Each caller runs every one of its tasks itself, whether or not workers run it too."""
    counts = [0] * 4

    def call(number: int) -> None:
        me = threading.get_ident()

        def job(_: int) -> None:
            if threading.get_ident() == me:
                counts[number] += 1

        run(team, job, 3, times=500)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert counts == [500] * 4


def test_tasks_run_in_order() -> None:
    found: list[int] = []
    made = [kernel(lambda _, number=number: found.append(number)) for number in range(4)]  # type: ignore[misc]
    run_all([KernelTask(one, array("q", [0]), 1, called) for one, called in made])
    assert found == [0, 1, 2, 3]


def test_after_stop_the_caller_computes_alone(team: Team) -> None:
    run(team, lambda _: None, 3)
    team.stop()
    found = []
    run(team, lambda _: found.append(threading.get_ident()), 3)
    assert found == [threading.get_ident()]


def test_workers_block_all_signals(team: Team) -> None:
    run(team, lambda _: None, 3)
    blocked = []
    for thread in threading.enumerate():
        if thread.name.startswith("moetier-kernels"):
            status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
            blocked += [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigBlk")]
    assert len(blocked) >= 2
    assert all(mask & (1 << 1) for mask in blocked)  # SIGINT is signal 2


FORKS = """
import os, sys, threading
from array import array
sys.path.insert(0, sys.argv[1])
from test_team import SECONDS, kernel
from moetier.runtime.kernels.jit.team import KernelTask, run_all, the_team

def compute():
    together, found = threading.Barrier(2), []
    def job(_):
        together.wait(SECONDS)
        found.append(threading.get_ident())
    made, called = kernel(job)
    run_all([KernelTask(made, array("q", [0]), 2, called)])
    return len(found)

assert compute() == 2
mine = the_team()
child = os.fork()
if child == 0:
    ok = compute() == 2 and the_team() is not mine
    os._exit(0 if ok else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert compute() == 2
print("done")
"""


def test_a_forked_child_makes_a_team_of_its_own_and_the_process_ends() -> None:
    folder = Path(__file__).parent
    found = subprocess.run([sys.executable, "-c", FORKS, folder], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "done\n"


def test_there_is_one_team_in_a_process() -> None:
    assert the_team() is the_team()
