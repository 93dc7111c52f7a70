"""Random sequences begin, grow and end in a cache of few pages: every page holds what its sequence computed."""

from __future__ import annotations

import random
from collections.abc import Sequence as Ids

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from toy_runner import WrittenPages, WrittenStates

from moetier.runtime.engine.kv_cache import LAST_TOKENS, MIN_TOKENS, KVCache
from moetier.runtime.engine.sequence import Request, Sampled, TokenSequence
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS
from moetier.runtime.model.context import SNAPSHOT_TOKENS

PAGES = 7
# few prompts, of which many begin alike, and which differ in the middle of a page and at its end
TEXTS = [
    [*range(PAGE_TOKENS), *range(PAGE_TOKENS), 1],
    [*range(PAGE_TOKENS), *range(PAGE_TOKENS), 2, 3],
    [*range(PAGE_TOKENS), *range(40), 9],
    [*range(PAGE_TOKENS), 5],
    [*range(PAGE_TOKENS)],
    [7] * (2 * PAGE_TOKENS),
    [7] * 30,
    [8],
]


class Cache(RuleBasedStateMachine):
    """Sequences of two users in one cache."""

    def __init__(self, memory: WrittenPages | None = None) -> None:
        super().__init__()
        self.memory = memory or WrittenPages()
        self.cache = KVCache(PAGES, self.memory)
        self.running: list[tuple[TokenSequence, str]] = []
        self.computed: dict[str, set[tuple[int, ...]]] = {"": set(), "other": set()}

    @rule(text=st.sampled_from(TEXTS), user=st.sampled_from(["", "other"]))
    def begin(self, text: list[int], user: str) -> None:
        sequence = TokenSequence(Request(tuple(text), 100, user=user))
        if not self.cache.has_pages_for(sequence):
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
        self.write(sequence, end)
        self.computed[user] |= {tuple(sequence.ids[:at]) for at in range(sequence.computed + 1, end + 1)}
        sequence.computed = end
        self.cache.keep(sequence)
        if not sequence.remaining:
            sequence.append(Sampled(new))

    def write(self, sequence: TokenSequence, end: int) -> None:
        self.memory.write(self.cache.pages_of(sequence), sequence.ids, sequence.computed, end)

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
            self.memory.check(pages, sequence.ids[: sequence.computed])

    @invariant()
    def no_page_is_lost(self) -> None:
        held = {page for sequence, _ in self.running for page in self.cache.pages_of(sequence)}
        assert len(held) + self.cache.free_pages() <= PAGES

    @invariant()
    def running_sequences_hold_a_page_more_than_their_tokens_need(self) -> None:
        """Each at most; pages that several share count once."""
        held = {page for sequence, _ in self.running for page in self.cache.pages_of(sequence)}
        full = {
            (user, *sequence.ids[:end])
            for sequence, user in self.running
            for end in range(PAGE_TOKENS, sequence.computed + 1, PAGE_TOKENS)
        }
        assert len(held) <= len(full) + len(self.running)

    def teardown(self) -> None:
        for sequence, _ in self.running:
            self.cache.end(sequence)
        # with nothing pinned, one sequence can have all pages
        sequence = TokenSequence(Request(tuple(range(1000, 1000 + PAGE_TOKENS * PAGES)), 1))
        self.cache.begin(sequence)
        assert self.cache.reserve(sequence, PAGE_TOKENS * PAGES)
        self.cache.end(sequence)
        assert len(self.memory.pages) <= PAGES


class CacheOfStates(Cache):
    """Sequences of a model that has states besides keys and values: each continues from its own."""

    def __init__(self) -> None:
        self.memory: WrittenStates
        super().__init__(WrittenStates())

    def write(self, sequence: TokenSequence, end: int) -> None:
        self.memory.compute(self.cache.pages_of(sequence), sequence, end)


TestCache, TestCacheOfStates = Cache.TestCase, CacheOfStates.TestCase
TestCache.settings = TestCacheOfStates.settings = settings(max_examples=70, stateful_step_count=40, deadline=None)


def begun(cache: KVCache, memory: WrittenPages, ids: Ids[int], user: str = "") -> TokenSequence:
    sequence = TokenSequence(Request(tuple(ids), 100, user=user))
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
    assert begun(cache, memory, [*range(100), 5]).cached == PAGE_TOKENS, "a running sequence shares its full pages"
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
    assert begun(cache, memory, [2] * 100).cached == PAGE_TOKENS, "the end of a sequence goes before its beginning"
    assert begun(cache, memory, [1] * 100).cached >= PAGE_TOKENS


def test_a_sequence_that_computes_what_is_there_keeps_its_own_pages() -> None:
    """They are next to one another. Those that another one uses stay."""
    memory = WrittenPages()
    cache = KVCache(40, memory)
    first = begun(cache, memory, [*range(3 * PAGE_TOKENS)])
    second = begun(cache, memory, [*range(PAGE_TOKENS), 1])
    for sequence in (first, second):
        cache.end(sequence)
    again = begun(cache, memory, [*range(20)])  # a part of a page is copied
    again.ids += [*range(20, 3 * PAGE_TOKENS)]
    assert cache.reserve(again, again.remaining)
    pages = cache.pages_of(again)
    memory.write(pages, again.ids, 20, 3 * PAGE_TOKENS)
    again.computed = 3 * PAGE_TOKENS
    cache.keep(again)
    assert cache.pages_of(again) == pages == [*range(pages[0], pages[0] + 3)]
    assert cache.free_pages() == 40 - 3 - 1


def test_a_longer_page_replaces_the_one_that_it_continues() -> None:
    memory = WrittenPages()
    cache = KVCache(PAGES, memory)
    cache.end(begun(cache, memory, [*range(10)]))
    cache.end(begun(cache, memory, [*range(50)]))
    assert cache.free_pages() == PAGES - 1


def test_pages_hold_little_more_than_tokens_need() -> None:
    """Running sequences and those that have ended take a page more each at most. Shared pages count once."""
    random_, memory, size = random.Random(0), WrittenPages(), 400
    cache, tokens, running = KVCache(size, memory), dict[tuple[int, ...], int](), list[TokenSequence]()
    text = [random_.randrange(50) for _ in range(1000)]

    def check() -> None:
        assert PAGE_TOKENS * (size - cache.free_pages()) <= 1.02 * sum(tokens.values()) + PAGE_TOKENS * len(running)

    for _ in range(20):
        ids = text[: random_.randrange(1000)] + [random_.randrange(50) for _ in range(random_.randrange(1, 200))]
        running.append(begun(cache, memory, ids))
        for begin in range(0, len(ids), PAGE_TOKENS):
            page = ids[begin : begin + PAGE_TOKENS]
            tokens[*ids[:begin], *page] = len(page)
        check()
    for sequence in running:
        cache.end(sequence)
        check()


def test_a_sequence_begins_only_if_it_has_room_beside_those_that_run() -> None:
    memory = WrittenPages()
    cache = KVCache(3, memory)
    first = begun(cache, memory, [*range(2 * PAGE_TOKENS)])
    assert not cache.has_pages_for(TokenSequence(Request((9,) * PAGE_TOKENS, 1)))
    assert cache.has_pages_for(TokenSequence(Request((*range(2 * PAGE_TOKENS), 9), 1))), "it shares two pages"
    cache.end(first)
    assert cache.has_pages_for(TokenSequence(Request((9,) * PAGE_TOKENS, 1)))


def test_a_sequence_that_cannot_begin_holds_nothing() -> None:
    """The copy of a page fails, as memory is short. Then the sequence begins after all."""
    memory = WrittenPages()
    cache = KVCache(4, memory)
    cache.end(begun(cache, memory, [*range(100)]))
    free, again = cache.free_pages(), TokenSequence(Request((*range(90), 7), 1))
    with pytest.MonkeyPatch.context() as broken:

        def fail(*_: int) -> None:
            raise MemoryError

        broken.setattr(memory, "copy_page", fail)
        with pytest.raises(MemoryError):
            cache.begin(again)
    assert cache.free_pages() == free
    cache.end(begun(cache, memory, [1000] * (4 * PAGE_TOKENS)))  # no page of the first is pinned
    cache.begin(again)
    assert again.computed == 0


# -- states besides keys and values ------------------------------------------------------------------------------------


def compute(cache: KVCache, memory: WrittenStates, sequence: TokenSequence) -> list[int]:
    """Compute all tokens of a sequence that has begun. Returns where parts begin, and the end."""
    places = [sequence.computed]
    while sequence.remaining:
        tokens = cache.max_tokens(sequence)
        assert cache.reserve(sequence, tokens)
        memory.compute(cache.pages_of(sequence), sequence, sequence.computed + tokens)
        sequence.computed += tokens
        cache.keep(sequence)
        places.append(sequence.computed)
    return places


def computed_in_parts(cache: KVCache, memory: WrittenStates, ids: Ids[int]) -> tuple[TokenSequence, list[int]]:
    """Begin a sequence, and compute its tokens. Returns it, and what ``compute`` returns."""
    sequence = TokenSequence(Request(tuple(ids), 100))
    cache.begin(sequence)
    return sequence, compute(cache, memory, sequence)


def test_a_sequence_continues_behind_the_last_snapshot() -> None:
    """Those of a prompt are at multiples of 2,048 tokens and near its end; one is at the end of the answer."""
    memory = WrittenStates()
    cache = KVCache(200, memory)
    prompt = [*range(2 * SNAPSHOT_TOKENS + 100)]
    first, places = computed_in_parts(cache, memory, prompt)
    last = len(prompt) - LAST_TOKENS
    assert places == [0, SNAPSHOT_TOKENS, 2 * SNAPSHOT_TOKENS, last, len(prompt)]
    for token in range(PAGE_TOKENS):
        first.append(Sampled(token))
        assert cache.reserve(first, 1)
        memory.compute(cache.pages_of(first), first, first.computed + 1)
        first.computed += 1
        cache.keep(first)
    cache.end(first)
    for ids, begin in (
        ([*first.ids, 7], len(first.ids)),
        ([*prompt, 7], last),  # another answer
        (prompt, last),
        ([*prompt[:-5], 7, 8], last),  # as it is rendered later
        ([*prompt[:-50], 7, 8], 2 * SNAPSHOT_TOKENS),
        ([*prompt[:2000], 7, 8], 0),
    ):
        sequence, places = computed_in_parts(cache, memory, ids)
        assert places[0] == begin
        cache.end(sequence)


@pytest.mark.parametrize("turn", [40, 100, 700])
@pytest.mark.parametrize("answer", [1, 60, 130])
def test_few_tokens_of_a_turn_are_computed_again(turn: int, answer: int) -> None:
    """Wherever prompts and answers end in their pages; the answer is kept, or its first tokens are left out later."""
    memory = WrittenStates()
    cache = KVCache(1000, memory)
    for leaves_out in (0, 5):
        ids, shared = [9 + leaves_out], 0
        for number in range(3):
            ids += [10 + number] * turn
            sequence, places = computed_in_parts(cache, memory, ids)
            assert shared - places[0] < MIN_TOKENS + LAST_TOKENS
            begin = len(ids)
            for token in range(answer):
                sequence.append(Sampled(1000 + token))
            compute(cache, memory, sequence)
            cache.end(sequence)
            # a chat template ends a prompt with tokens that it leaves out once the answer is there
            shared = begin - leaves_out if leaves_out else len(sequence.ids)
            ids = [*sequence.ids[:shared], *sequence.ids[begin + leaves_out :]]


def test_a_snapshot_is_taken_where_a_prompt_has_left_the_tokens_of_another() -> None:
    """So what many prompts begin with is computed twice, not each time."""
    memory = WrittenStates()
    cache = KVCache(200, memory)
    begins = []
    for number in range(4):
        sequence, places = computed_in_parts(cache, memory, [*range(1000), *[5000 + number] * 300])
        cache.end(sequence)
        begins.append(places[:-1])
    left, last = 1000 - 1000 % PAGE_TOKENS, 1300 - LAST_TOKENS
    assert begins == [[0, last], [0, left, last], [left, last], [left, last]]


def test_the_least_recently_used_snapshot_is_evicted_before_the_pages_of_others() -> None:
    memory = WrittenStates(size=4)
    cache = KVCache(16, memory)
    first, _ = computed_in_parts(cache, memory, [*range(2 * PAGE_TOKENS)])
    cache.end(first)
    second, places = computed_in_parts(cache, memory, [*range(4 * PAGE_TOKENS)])
    assert places[0] == 2 * PAGE_TOKENS - LAST_TOKENS
    cache.end(second)  # 4 pages and two snapshots of 4
    assert cache.free_pages() == 4
    third, _ = computed_in_parts(cache, memory, [9] * (5 * PAGE_TOKENS))
    cache.end(third)
    begun, places = computed_in_parts(cache, memory, [*range(4 * PAGE_TOKENS), 5])
    assert places[0] in (0, 4 * PAGE_TOKENS - LAST_TOKENS), "the older snapshot went first"
    cache.end(begun)


def test_nothing_is_evicted_for_a_snapshot_that_has_no_room() -> None:
    memory = WrittenStates(size=5)
    cache = KVCache(7, memory)
    cache.end(computed_in_parts(cache, memory, [*range(30)])[0])  # too few tokens for a snapshot
    cache.end(computed_in_parts(cache, memory, [9] * (3 * PAGE_TOKENS))[0])
    assert cache.free_pages() == 7 - 1 - 3


def test_nothing_is_evicted_for_a_snapshot_that_is_there() -> None:
    memory = WrittenStates(size=4)
    cache = KVCache(17, memory)
    cache.end(computed_in_parts(cache, memory, [*range(PAGE_TOKENS)])[0])
    cache.end(computed_in_parts(cache, memory, [9] * (5 * PAGE_TOKENS))[0])
    cache.end(computed_in_parts(cache, memory, [*range(PAGE_TOKENS), 7])[0])  # it uses the first snapshot
    assert cache.free_pages() == 17 - 1 - 4 - 5 - 4 - 1
    again, places = computed_in_parts(cache, memory, [*range(PAGE_TOKENS)])
    assert places[0] == 0, "the snapshot is behind the last token, which is computed"
    cache.end(again)
    assert cache.free_pages() == 2


@pytest.mark.parametrize("broken", ["save_state", "copy_page"])
def test_a_sequence_goes_on_without_a_snapshot_for_which_memory_is_missing(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = WrittenStates()
    cache = KVCache(8, memory)

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(memory, broken, fail)
    sequence, _ = computed_in_parts(cache, memory, [*range(100)])
    assert cache.free_pages() == 8 - 2
    cache.end(sequence)
    monkeypatch.undo()
    again, places = computed_in_parts(cache, memory, [*range(100), 7])
    assert places[0] == 0
    cache.end(again)
    assert computed_in_parts(cache, memory, [*range(100), 7, 8])[1][0] == PAGE_TOKENS


def test_a_state_that_cannot_be_read_leaves_nothing_behind() -> None:
    memory = WrittenStates()
    cache = KVCache(8, memory)
    cache.end(computed_in_parts(cache, memory, [*range(100)])[0])
    free, again = cache.free_pages(), TokenSequence(Request((*range(100), 7), 1))
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(memory, "load_state", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache.begin(again)
    assert cache.free_pages() == free
    cache.begin(again)
    assert again.computed == 100 - LAST_TOKENS
