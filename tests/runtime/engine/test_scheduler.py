"""The scheduler chooses the prompts of a step, begins sequences, and lets some wait again if there is no page."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_runner import WrittenPages

from moetier.runtime.engine.kv_cache import KVCache
from moetier.runtime.engine.scheduler import Scheduler, StepLimits
from moetier.runtime.engine.sequence import PATIENCE, Request, Sampled, TokenSequence
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS


def scheduler_of(
    pages: int,
    *,
    max_sequences: int = 8,
    chunk: int = 4 * PAGE_TOKENS,
    later: int | None = None,
    pass_tokens: int | None = None,
) -> Scheduler:
    limits = StepLimits(max_sequences, max(chunk, pass_tokens or 1), later or chunk, pass_tokens or chunk, pass_tokens)
    return Scheduler(KVCache(pages, WrittenPages()), limits)


def added(scheduler: Scheduler, tokens: int, deadline: float | None = None) -> TokenSequence:
    """Let a sequence wait whose tokens are those of no other."""
    first = 1000 * (len(scheduler.waiting) + len(scheduler.running) + 1)
    sequence = TokenSequence(Request(tuple(range(first, first + tokens)), 1000, deadline=deadline))
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler, *, samples: bool = True) -> tuple[dict[TokenSequence, int], list[TokenSequence]]:
    """Compute the tasks of a step; return how many tokens of each sequence were computed, and which wait again."""
    scheduler.begin_next()
    tasks, preempted = scheduler.schedule()
    for task in tasks:
        scheduler.note_computed(task)
        if samples and not task.sequence.remaining:
            task.sequence.append(Sampled(1))
    return {task.sequence: task.tokens for task in tasks}, preempted


def test_one_sequence_begins_in_a_step() -> None:
    scheduler = scheduler_of(8, max_sequences=2)
    first, second, third = (added(scheduler, 3) for _ in range(3))
    assert step(scheduler)[0] == {first: 3}
    assert step(scheduler)[0] == {first: 1, second: 3}
    assert step(scheduler)[0] == {first: 1, second: 1}, "two run at most"
    scheduler.remove(first)
    assert step(scheduler)[0] == {second: 1, third: 3}


def test_prompts_are_computed_in_turn_and_in_chunks() -> None:
    scheduler = scheduler_of(8, chunk=50, later=20)
    long = added(scheduler, 100)
    assert step(scheduler)[0] == {long: 50}, "alone, and behind nothing"
    short = added(scheduler, 30)
    turns = [step(scheduler)[0] for _ in range(4)]
    assert turns == [{short: 20}, {long: 20}, {short: 10}, {long: 20, short: 1}]


def test_long_prompts_are_computed_together_and_a_short_one_beside_them() -> None:
    scheduler = scheduler_of(20, chunk=150, pass_tokens=10)
    running = added(scheduler, 5)
    step(scheduler)
    long, short, longest = added(scheduler, 60), added(scheduler, 7), added(scheduler, 200)
    while scheduler.begin_next():
        pass
    tasks, _ = scheduler.schedule()
    assert {task.sequence: task.tokens for task in tasks} == {running: 1, long: 60, short: 7, longest: 83}
    beside, _ = scheduler.schedule({long, longest})
    assert {task.sequence: task.tokens for task in beside} == {running: 1, short: 7}
    last = added(scheduler, 100)
    scheduler.begin_next()
    assert last in scheduler.running
    assert last not in {task.sequence for task in scheduler.schedule({long, longest})[0]}, "it is long itself"


def test_a_few_tokens_are_not_the_rest_of_a_chunk() -> None:
    scheduler = scheduler_of(20, chunk=100, pass_tokens=10)
    first, second = added(scheduler, 95), added(scheduler, 50)
    while scheduler.begin_next():
        pass
    assert step(scheduler)[0] == {first: 95}
    assert step(scheduler)[0] == {first: 1, second: 50}


def test_sequences_that_are_computed_keep_their_pages() -> None:
    scheduler = scheduler_of(3, pass_tokens=10)
    first = added(scheduler, PAGE_TOKENS - 1)
    step(scheduler)
    second = added(scheduler, 2 * PAGE_TOKENS - 5)
    scheduler.begin_next()
    of_first, of_second = scheduler.schedule()[0]
    assert (of_first.sequence, of_second.sequence) == (first, second)
    scheduler.note_computed(of_first)
    first.append(Sampled(1))
    assert scheduler.schedule({second}) == ([], [first]), "the one that began last would have to wait otherwise"


def test_the_sequence_that_began_last_waits_again_for_one_that_began_before() -> None:
    scheduler = scheduler_of(2)
    first, second = added(scheduler, PAGE_TOKENS - 1), added(scheduler, PAGE_TOKENS - 2)
    step(scheduler)
    assert step(scheduler) == ({first: 1, second: PAGE_TOKENS - 2}, [])
    assert step(scheduler) == ({first: 1}, [second]), "each has one page, and the first needs another one"
    assert list(scheduler.waiting) == [second]


def test_a_sequence_that_began_last_waits_again_itself() -> None:
    scheduler = scheduler_of(3)
    first, second = added(scheduler, PAGE_TOKENS + 1), added(scheduler, PAGE_TOKENS - 1)
    step(scheduler)
    step(scheduler)
    assert step(scheduler) == ({first: 1, second: 1}, [])
    later = added(scheduler, 1)
    assert step(scheduler) == ({first: 1}, [second]), "it needs a second page"
    assert list(scheduler.waiting) == [second, later], "it is the next to begin"


def test_a_near_deadline_goes_first_but_nothing_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("moetier.runtime.engine.sequence.monotonic", lambda: now)
    scheduler = scheduler_of(8, max_sequences=1)
    running, without, far, near = (added(scheduler, 3, deadline) for deadline in (None, None, 1e6, now + 5))
    scheduler.begin_next()
    assert scheduler.running == [near]
    assert scheduler.waiting == [running, without, far], "those without a near deadline in the order of their arrival"
    now += PATIENCE - 1
    late = added(scheduler, 3, now + 5)
    assert scheduler.waiting == [running, without, far, late]


def test_a_sequence_that_cannot_begin_still_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of(8)
    first = added(scheduler, 3)

    def fail(*_: object) -> None:
        raise OSError("no memory")

    with monkeypatch.context() as broken:
        broken.setattr(KVCache, "begin", fail)
        with pytest.raises(OSError, match="no memory"):
            scheduler.begin_next()
    assert (list(scheduler.waiting), scheduler.running) == ([first], [])
    assert step(scheduler)[0] == {first: 3}


@given(
    prompts=st.lists(st.integers(1, 3 * PAGE_TOKENS), min_size=1, max_size=8),
    pages=st.integers(4, 6),
    most=st.integers(1, 4),
    chunk=st.integers(1, 2 * PAGE_TOKENS),
)
def test_tasks_are_of_sequences_that_run(prompts: list[int], pages: int, most: int, chunk: int) -> None:
    """And every sequence comes to its end, however few pages there are."""
    scheduler = scheduler_of(pages, max_sequences=most, chunk=chunk)
    sequences = [added(scheduler, tokens) for tokens in prompts]
    for _ in range(2000):
        if not scheduler.has_work:
            break
        computed, preempted = step(scheduler)
        assert not computed.keys() & set(preempted)
        assert computed.keys() <= set(scheduler.running)
        for sequence in [*computed]:
            if sequence.new_tokens == 20 or len(sequence.ids) == PAGE_TOKENS * pages:
                scheduler.remove(sequence)
    assert not scheduler.has_work
    assert all(sequence.new_tokens == 20 for sequence in sequences)
