"""The protocol of the team, in all interleavings of small cases: emitted code, and plain Python."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import team_reference
from interleavings import Add, Clock, Load, Store, Thread, Wake, calling, explore, together
from interpreted import CLOCK as CLOCK_ADDRESS
from interpreted import SYSCALL as SYSCALL_ADDRESS
from interpreted import interpret
from llvmlite import ir

from moetier.runtime.kernels.jit.team_code import (
    BUSY,
    CALLER_SLEEPS,
    CLOCK,
    CONTEXT,
    FINISHED,
    FIRST_SPIN,
    JOB,
    OPENED,
    RUN,
    SLEEPERS,
    SPIN,
    STATE,
    STOPPED,
    SYSCALL,
    WORK,
    WORKERS,
    team_module,
)

FUNCTION = 100  # address of the function of all jobs
ITEMS = 1  # of each job
OVER = -100  # number of begun items after a job
Start = Callable[..., Thread]


def items(context: int) -> Thread:
    """The work of a job: threads take its items one by one. No thread may do so after the caller has returned."""
    while True:
        item = yield Add(f"begun {context}", 1)
        assert item >= 0, "a worker runs a job that is over"
        if item >= ITEMS:
            return
        yield Add(f"done {context}", 1)


def timed(thread: Thread, constants: dict[int, int]) -> Thread:
    """Run a thread in fewer states: some words are constant, and of its clock only the ends of deadlines are explored.

    A deadline begins at time 0. Its end is looked at after a load of STOPPED or FINISHED.
    """
    operation, result = None, None
    while True:
        before = operation
        try:
            operation = thread.send(result)
        except StopIteration:
            return
        if operation[:1] and operation[0] in constants:
            result = constants[operation[0]]
        elif operation == Clock() and before not in (Load(STOPPED), Load(FINISHED)):
            result = 0
        else:
            result = yield operation


class TeamOf:
    """A team of ``workers``, and callers that run so many ``jobs`` each and want ``wanted`` workers for each job."""

    def __init__(self, jobs: list[int], workers: int, wanted: int, *, stops: bool = False) -> None:
        self._jobs, self._workers, self._wanted, self._stops = jobs, workers, wanted, stops
        self._constants = {SPIN: FIRST_SPIN, WORKERS: workers} | ({} if stops else {STOPPED: 0})

    def explore(self, run: Start, work: Start) -> None:
        """Raises AssertionError if a job is run wrongly, or if a caller can't return any more."""
        words = [STATE, OPENED, FINISHED, SLEEPERS, BUSY, CALLER_SLEEPS, JOB, CONTEXT, STOPPED, "ended"]
        contexts = [range(sum(self._jobs[:n]), sum(self._jobs[: n + 1])) for n in range(len(self._jobs))]
        counts = [f"{name} {context}" for own in contexts for context in own for name in ("begun", "done")]
        callers = [partial(self._call, run, own) for own in contexts]
        workers = [partial(self._serve, work)] * self._workers
        explore([*callers, *workers], dict.fromkeys([*words, *counts], 0), range(len(callers), len(callers + workers)))

    def _call(self, run: Start, contexts: range) -> Thread:
        for context in contexts:
            yield from timed(calling(run(FUNCTION, context, self._wanted), {FUNCTION: items}), self._constants)
            yield Store(f"begun {context}", OVER)
            done = yield Load(f"done {context}")
            assert done == ITEMS, "a job has returned before its items were done"
        if self._stops:
            yield Store(STOPPED, 1)
            ended = 0
            while ended < self._workers:
                yield Wake(OPENED, self._workers)
                ended = yield Load("ended")

    def _serve(self, work: Start) -> Thread:
        yield from timed(calling(work(), {FUNCTION: items}), self._constants)
        yield Add("ended", 1)


TEAMS = {
    "two jobs, one worker": TeamOf([2], 1, 1),
    "a job that wants a worker, two workers": TeamOf([1], 2, 1),
    "a job that wants two workers": TeamOf([1], 2, 2),
    "two callers, one worker": TeamOf([1, 1], 1, 1),
    "a team that is stopped": TeamOf([1], 1, 1, stops=True),
}
BROKEN = {
    "a worker joins without a compare-and-swap": (
        "if (yield Swap(STATE, state, state + 1)):",
        "if not (yield Store(STATE, state + 1)):",
        "two jobs, one worker",
    ),
    "a caller opens a job before it is there": (
        "    yield Store(CONTEXT, context)\n    yield Store(STATE, state)\n",
        "    yield Store(STATE, state)\n    yield Store(CONTEXT, context)\n",
        "two jobs, one worker",
    ),
    "a worker looks whether the caller sleeps before it has finished": (
        "    yield Add(FINISHED, 1)\n    if (yield Load(CALLER_SLEEPS)):\n        yield",
        "    sleeps = yield Load(CALLER_SLEEPS)\n    yield Add(FINISHED, 1)\n    if sleeps:\n        yield",
        "two jobs, one worker",
    ),
    "a caller does not close the job": (
        "(yield And(STATE, ~OPEN)) & JOINED",
        "(yield Load(STATE)) & JOINED",
        "two jobs, one worker",
    ),
    "a caller lets others in before all workers have finished": (
        "    yield from wait_for(joined)\n",
        "    yield Store(BUSY, 0)\n    yield from wait_for(joined)\n",
        "two callers, one worker",
    ),
    "a caller does not reset the number of those that have finished": (
        "    yield Store(FINISHED, 0)\n",
        "",
        "two jobs, one worker",
    ),
    "a worker does not look whether the team is stopped while it spins": (
        "            if (yield Load(STOPPED)):\n                return\n",
        "            yield Load(STOPPED)\n",
        "a team that is stopped",
    ),
}


@pytest.fixture(scope="module")
def functions() -> dict[str, ir.Function]:
    return {function.name: function for function in team_module().functions}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * ("two workers" in name)) for name in TEAMS]
)
def test_the_emitted_code_and_the_reference_do_the_same_and_every_job_is_done(
    name: str, functions: dict[str, ir.Function]
) -> None:
    """In all interleavings they do the same operation at every step, and no job returns early, late or twice."""

    def both(reference: Thread, function: str, *arguments: int) -> Thread:
        addresses = {8 * SYSCALL: SYSCALL_ADDRESS, 8 * CLOCK: CLOCK_ADDRESS}
        return together(reference, interpret(functions[function], (0, *arguments), addresses))

    TEAMS[name].explore(
        lambda *arguments: both(team_reference.run(*arguments), RUN, *arguments),
        lambda: both(team_reference.work(), WORK),
    )


@pytest.mark.parametrize("name", BROKEN)
def test_an_error_in_the_protocol_is_found(name: str) -> None:
    right, wrong, team = BROKEN[name]
    source = inspect.getsource(team_reference)
    assert right in source
    broken = ModuleType("broken")
    exec(source.replace(right, wrong), vars(broken))
    with pytest.raises(AssertionError):
        TEAMS[team].explore(broken.run, broken.work)
