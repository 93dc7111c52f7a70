"""Random sequences begin, grow and end in a cache of few pages: every page holds what its sequence computed."""

from __future__ import annotations

from collections.abc import Sequence as Ids

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from toy_runner import WrittenPages

from moetier.runtime.engine.kv_cache import KVCache
from moetier.runtime.engine.sequence import Request, Sampled, Sequence
from moetier.runtime.kernels.layer.paged_cache import PAGE

PAGES = 7
# few prompts, of which many begin alike, and which differ in the middle of a page and at its end
TEXTS = [
    [*range(PAGE), *range(PAGE), 1],
    [*range(PAGE), *range(PAGE), 2, 3],
    [*range(PAGE), *range(40), 9],
    [*range(PAGE), 5],
    [*range(PAGE)],
    [7] * (2 * PAGE),
    [7] * 30,
    [8],
]


class Cache(RuleBasedStateMachine):
    """Sequences of two users in one cache."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = WrittenPages()
        self.cache = KVCache(PAGES, self.memory)
        self.running: list[tuple[Sequence, str]] = []
        self.computed: dict[str, set[tuple[int, ...]]] = {"": set(), "other": set()}

    @rule(text=st.sampled_from(TEXTS), user=st.sampled_from(["", "other"]))
    def begin(self, text: list[int], user: str) -> None:
        sequence = Sequence(Request(tuple(text), 100, user=user))
        if not self.cache.has_room(sequence):
            return
        self.cache.begin(sequence)
        self.running.append((sequence, user))
        assert sequence.computed < len(text), "at least one token is left to compute"
        assert not sequence.computed or tuple(text[: sequence.computed]) in self.computed[user]

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 10), tokens=st.integers(1, 100), new=st.integers(0, 3))
    def compute(self, number: int, tokens: int, new: int) -> None:
        sequence, user = self.running[number % len(self.running)]
        tokens = min(tokens, sequence.remaining)
        before = self.cache.pages_of(sequence)
        if not self.cache.reserve(sequence, tokens):
            assert self.cache.pages_of(sequence) == before
            return
        end = sequence.computed + tokens
        self.memory.write(self.cache.pages_of(sequence), sequence.ids, sequence.computed, end)
        self.computed[user] |= {tuple(sequence.ids[:at]) for at in range(sequence.computed + 1, end + 1)}
        sequence.computed = end
        self.cache.keep(sequence)
        if not sequence.remaining:
            sequence.append(Sampled(new))

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 10))
    def end(self, number: int) -> None:
        sequence, _ = self.running.pop(number % len(self.running))
        self.cache.end(sequence)

    @invariant()
    def pages_hold_what_their_sequences_computed(self) -> None:
        for sequence, _ in self.running:
            pages = self.cache.pages_of(sequence)
            assert len(pages) == len(set(pages))
            for at in range(sequence.computed):
                assert self.memory.pages[pages[at // PAGE]][at % PAGE] == tuple(sequence.ids[: at + 1])

    @invariant()
    def no_page_is_lost(self) -> None:
        held = {page for sequence, _ in self.running for page in self.cache.pages_of(sequence)}
        assert len(held) + self.cache.free_pages() <= PAGES

    def teardown(self) -> None:
        for sequence, _ in self.running:
            self.cache.end(sequence)
        # with nothing pinned, one sequence can have all pages
        sequence = Sequence(Request(tuple(range(1000, 1000 + PAGE * PAGES)), 1))
        self.cache.begin(sequence)
        assert self.cache.reserve(sequence, PAGE * PAGES)
        self.cache.end(sequence)
        assert len(self.memory.pages) <= PAGES


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def begun(cache: KVCache, memory: WrittenPages, ids: Ids[int], user: str = "") -> Sequence:
    sequence = Sequence(Request(tuple(ids), 100, user=user))
    cache.begin(sequence)
    sequence.cached = sequence.computed  # type: ignore[attr-defined]
    assert cache.reserve(sequence, sequence.remaining)
    memory.write(cache.pages_of(sequence), sequence.ids, sequence.computed, len(ids))
    sequence.computed = len(ids)
    cache.keep(sequence)
    return sequence


def test_a_prompt_continues_after_the_longest_prefix_that_is_kept() -> None:
    memory = WrittenPages()
    cache = KVCache(PAGES, memory)
    first = begun(cache, memory, [*range(100)])
    assert begun(cache, memory, [*range(100), 5]).cached == PAGE, "a running sequence shares its full pages"
    cache.end(first)
    assert begun(cache, memory, [*range(90), 7, 8]).cached == 90, "one that has ended shares the rest, too"
    assert begun(cache, memory, [*range(100)], user="other").cached == 0


def test_the_least_recently_used_page_is_evicted_first() -> None:
    memory = WrittenPages()
    cache = KVCache(4, memory)
    for text in ([1] * 100, [2] * 100):
        cache.end(begun(cache, memory, text))
    cache.end(begun(cache, memory, [1] * 100))
    cache.end(begun(cache, memory, [3] * 60))
    assert begun(cache, memory, [2] * 100).cached == PAGE, "the end of a sequence goes before its beginning"
    assert begun(cache, memory, [1] * 100).cached >= PAGE


def test_a_sequence_that_computes_what_is_there_keeps_its_own_pages() -> None:
    """They are next to one another. Those that another one uses stay."""
    memory = WrittenPages()
    cache = KVCache(40, memory)
    first = begun(cache, memory, [*range(3 * PAGE)])
    second = begun(cache, memory, [*range(PAGE), 1])
    for sequence in (first, second):
        cache.end(sequence)
    again = begun(cache, memory, [*range(20)])  # a part of a page is copied
    again.ids += [*range(20, 3 * PAGE)]
    assert cache.reserve(again, again.remaining)
    pages = cache.pages_of(again)
    memory.write(pages, again.ids, 20, 3 * PAGE)
    again.computed = 3 * PAGE
    cache.keep(again)
    assert cache.pages_of(again) == pages == [*range(pages[0], pages[0] + 3)]
    assert cache.free_pages() == 40 - 3 - 1


def test_a_longer_page_replaces_the_one_that_it_continues() -> None:
    memory = WrittenPages()
    cache = KVCache(PAGES, memory)
    cache.end(begun(cache, memory, [*range(10)]))
    cache.end(begun(cache, memory, [*range(50)]))
    assert cache.free_pages() == PAGES - 1


def test_a_sequence_begins_only_if_it_has_room_beside_those_that_run() -> None:
    memory = WrittenPages()
    cache = KVCache(3, memory)
    first = begun(cache, memory, [*range(2 * PAGE)])
    assert not cache.has_room(Sequence(Request((9,) * PAGE, 1)))
    assert cache.has_room(Sequence(Request((*range(2 * PAGE), 9), 1))), "it shares two pages"
    cache.end(first)
    assert cache.has_room(Sequence(Request((9,) * PAGE, 1)))
