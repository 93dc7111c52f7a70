"""Against a second implementation that shares nothing with the first, on real routing; what the policies promise."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator, Mapping
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ASSETS

from moetier.runtime.trace.trace import Trace
from moetier.tiers.cache.policies import DEFAULT_POLICY, POLICIES, Lru
from moetier.tiers.layout import ExpertKey
from moetier.tools.traces.simulation import SIMULATED, SimulatedDemand, demands_of, simulate

TRACES = ASSETS / "traces"
MIXTRAL = "mixtral_8x7b_instruct_h39s"
GPT_OSS = "gptoss_20b_12seq"
SHORTEST = "gptoss_120b_top2_bigmoeonedge"
SLOTS = {
    MIXTRAL: (1, 2, 3, 5, 8),
    GPT_OSS: (2, 16),
    "qwen3_30b_a3b_top6_bigmoeonedge": (8, 32),
    "gemma4_26b_a4b_top6_bigmoeonedge": (8, 32),
    SHORTEST: (4, 32),
}


@cache
def load(name: str) -> Trace:
    return Trace.load(TRACES / f"{name}.npz")


@cache
def ratio(name: str, policy: str, slots: int) -> float:
    """Of hits while decoding."""
    return simulate(load(name), policy, slots).decoding.hit_ratio


@cache
def some_blocks(name: str, every: int) -> Trace:
    """Every so many: each has a cache of its own."""
    trace = load(name)
    return Trace(
        experts=trace.experts[:, ::every],
        offsets=trace.offsets,
        num_experts=trace.num_experts[::every],
        n_prefill=trace.n_prefill,
        weights=None if trace.weights is None else trace.weights[:, ::every],
    )


@cache
def ratio_of_some(name: str, policy: str, slots: int) -> float:
    """Return the ratio of hits while decoding, in every sixth block; in every third of the shortest trace."""
    return simulate(some_blocks(name, 3 if name == SHORTEST else 6), policy, slots).decoding.hit_ratio


def test_lru_on_mixtral() -> None:
    """Figures that were found with another program."""
    found = [ratio(MIXTRAL, "lru", slots) for slots in (1, 2, 4, 8)]
    assert found == pytest.approx([0.166, 0.327, 0.574, 0.995], abs=0.001)


# -- the second implementation ----------------------------------------------------------------------------------------


def sets_of(trace: Trace, sequence: int, block: int) -> list[tuple[bool, list[int]]]:
    """(whether it is the prompt, its experts in ascending order) of each demand."""
    first, last = trace.offsets[sequence : sequence + 2]
    prompt = trace.n_prefill[sequence] if trace.n_prefill else 0
    rows = [set(row[row >= 0].tolist()) for row in trace.experts[first:last, block]]
    found = [(True, sorted(set().union(*rows[:prompt])))] if prompt else []
    return found + [(False, sorted(row)) for row in rows[prompt:]]


def second_lru(demands: list[tuple[bool, list[int]]], slots: int) -> int:
    """Last uses on a time line: the cache is the ``slots`` latest. Hits of decoding."""
    last: dict[int, float] = {}
    hits = 0
    for now, (is_prompt, wanted) in enumerate(demands):
        cache = sorted(last, key=last.__getitem__)[-slots:]
        hits += 0 if is_prompt else len(set(cache) & set(wanted))
        streams = is_prompt and len(wanted) > slots  # then the last that was read is the latest
        for place, expert in enumerate(wanted if streams else reversed(wanted)):
            last[expert] = now + place / 1000
    return hits


def second_belady(demands: list[tuple[bool, list[int]]], slots: int) -> int:
    """From the end backwards each demand learns when its experts are wanted next; then the nearest are kept."""
    coming: dict[int, int] = {}
    nexts: list[dict[int, int]] = []
    for now in range(len(demands) - 1, -1, -1):
        nexts.append({expert: coming.get(expert, 10**9) for expert in demands[now][1]})
        coming |= dict.fromkeys(demands[now][1], now)
    cache: dict[int, int] = {}  # expert -> its next use
    hits = 0
    for (is_prompt, wanted), upcoming in zip(demands, reversed(nexts), strict=True):
        hits += 0 if is_prompt else len(cache.keys() & set(wanted))
        others = {expert: use for expert, use in cache.items() if expert not in upcoming}
        nearest = sorted(upcoming, key=upcoming.__getitem__)[:slots]
        room = slots - len(nearest)
        cache = {expert: upcoming[expert] for expert in nearest}
        cache |= {expert: others[expert] for expert in sorted(others, key=others.__getitem__)[:room]}
    return hits


def second_lrfu(demands: list[tuple[bool, list[int]]], slots: int) -> int:
    """Every count fades at every use. A prompt of more than the slots comes first, leaves the last that were read, and
    is no use."""
    counts: dict[int, float] = {}
    passed: list[int] = []
    cache: set[int] = set()
    hits = 0
    for is_prompt, wanted in demands:
        if is_prompt and len(wanted) > slots:
            assert not cache
            passed = wanted[-slots:]
            cache = set(passed)
            continue
        hits += 0 if is_prompt else len(cache & set(wanted))
        for expert in reversed(wanted):
            if expert not in cache and len(cache) == slots:
                settled = sorted(cache - set(passed), key=counts.__getitem__)
                cache.remove(next(other for other in passed + settled if other not in wanted))
            cache.add(expert)
            passed = [other for other in passed if other in cache and other != expert]
            counts = {other: count / 2 ** (1 / 30) for other, count in counts.items()}
            counts[expert] = counts.get(expert, 0.0) + 1
    return hits


SECOND: Mapping[str, Callable[[list[tuple[bool, list[int]]], int], int]] = {
    "lru": second_lru,
    "scan": second_lru,  # as prompts come first here
    "lrfu": second_lrfu,
    "belady": second_belady,
}


@pytest.mark.parametrize(("name", "slots"), [(name, slots) for name, several in SLOTS.items() for slots in several])
def test_both_implementations_agree(name: str, slots: int) -> None:
    trace = some_blocks(name, 12)
    every = [
        sets_of(trace, sequence, block)
        for sequence in range(len(trace.sequences))
        for block in range(trace.block_count)
    ]
    lookups = sum(len(wanted) for demands in every for is_prompt, wanted in demands if not is_prompt)
    for policy, second in SECOND.items():
        if slots < trace.top_k and policy == "lrfu":
            continue  # of one token's experts the last stay, whatever their counts
        found = simulate(trace, policy, slots).decoding
        assert found.lookups == lookups
        assert found.hits == sum(second(demands, slots) for demands in every)


# -- what is promised -------------------------------------------------------------------------------------------------


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    experts, k, blocks = draw(st.integers(2, 8)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    lengths = draw(st.lists(st.integers(1, 25), min_size=1, max_size=3))
    seed = draw(st.integers(0, 2**20))
    chance = np.random.default_rng(seed)
    rows = [[chance.permutation(experts)[:k] for _ in range(blocks)] for _ in range(sum(lengths))]
    prompts = tuple(draw(st.integers(0, length)) for length in lengths)
    return Trace(
        experts=np.asarray(rows, np.int16),
        offsets=tuple(int(n) for n in np.cumsum([0, *lengths])),
        num_experts=(experts,) * blocks,
        n_prefill=draw(st.sampled_from([(), prompts])),
    )


@settings(max_examples=150, deadline=None)
@given(traces(), st.integers(1, 8))
def test_belady_is_the_bound(trace: Trace, slots: int) -> None:
    outcomes = {policy: simulate(trace, policy, slots) for policy in SIMULATED}
    best = outcomes["belady"]
    for name, found in outcomes.items():
        assert found.decoding.lookups == best.decoding.lookups
        assert found.prompts.lookups == best.prompts.lookups
        if slots >= trace.top_k or name in POLICIES:
            loads = found.decoding.misses + found.prompts.misses + found.preloads
            assert best.decoding.misses + best.prompts.misses <= loads
        if name in POLICIES:
            assert found.decoding.hits <= best.decoding.hits
    if slots >= trace.num_experts[0]:
        distinct = {
            (number, block, int(expert))
            for number, span in enumerate(trace.sequences)
            for block in range(trace.block_count)
            for expert in np.unique(trace.experts[span.start : span.stop, block])
        }
        assert best.decoding.misses + best.prompts.misses == len(distinct), "each is loaded once"


@pytest.mark.parametrize("name", [MIXTRAL, GPT_OSS])
def test_no_policy_is_above_the_bound_on_real_routing(name: str) -> None:
    slots = load(name).num_experts[0] // 2
    assert all(ratio_of_some(name, policy, slots) < ratio_of_some(name, "belady", slots) for policy in POLICIES)


@pytest.mark.parametrize("part", [2, 4])
@pytest.mark.parametrize("name", SLOTS)
def test_no_policy_hits_more_often_than_the_default(name: str, part: int) -> None:
    """Beyond two thousandths, of a quarter and of half the experts: else another had better be the default."""
    slots = load(name).num_experts[0] // part
    best = max(ratio_of_some(name, policy, slots) for policy in POLICIES)
    assert ratio_of_some(name, DEFAULT_POLICY, slots) >= best - 0.002


@pytest.mark.parametrize(("name", "slots", "points"), [(MIXTRAL, 4, 1.5), (GPT_OSS, 8, 3.5), (GPT_OSS, 16, 1.0)])
def test_what_counting_uses_gains(name: str, slots: int, points: float) -> None:
    """In all blocks, or in some of a long trace."""
    measured = ratio if name == MIXTRAL else ratio_of_some
    assert 100 * (measured(name, "lrfu", slots) - measured(name, "scan", slots)) >= points


MEASUREMENT = runpy.run_path(str(TRACES.parents[1] / "measurements/passages.py"))


@cache
def some_rows(name: str) -> list[list[tuple[ExpertKey, ...]]]:
    """Of every other block."""
    return [MEASUREMENT["rows_of"](load(name), block) for block in range(0, load(name).block_count, 2)]


@cache
def ratio_after(name: str, policy: str, slots: int, start: int, tokens: int, *, prefill: bool) -> float:
    found: float = MEASUREMENT["ratio_after"](some_rows(name), policy, slots, start, tokens, prefill=prefill)
    return found


@pytest.mark.parametrize(
    ("policy", "tokens"),  # of LRU the first tokens suffer, more than is promised of the others
    [("scan", 32), ("scan", 128), ("lrfu", 32), ("lrfu", 128), ("lru", 128)],
)
@pytest.mark.parametrize(
    ("name", "slots", "start"),
    [(MIXTRAL, 4, 0), (MIXTRAL, 6, 0), (GPT_OSS, 8, 0), (GPT_OSS, 16, 611), (GPT_OSS, 16, 1952), (GPT_OSS, 24, 3200)],
)
def test_a_prefill_costs_the_decoding_behind_it_two_points_at_most(
    name: str, slots: int, start: int, policy: str, tokens: int
) -> None:
    before = ratio_after(name, policy, slots, start, tokens, prefill=False)
    assert ratio_after(name, policy, slots, start, tokens, prefill=True) >= before - 0.02


def test_a_prefill_does_cost_recency_something() -> None:
    """Else the test above would prove nothing of the others."""
    costs = [
        ratio_after(GPT_OSS, policy, 16, 611, 32, prefill=False)
        - ratio_after(GPT_OSS, policy, 16, 611, 32, prefill=True)
        for policy in ("lru", "scan", "lrfu")
    ]
    assert costs[0] > 0.02 > max(costs[1:])


def test_what_was_learned_is_there_from_the_second_sequence_on() -> None:
    rows = [[[0, 1]]] * 4 + [[[2, 3]]] * 4 + [[[0, 1]]] * 4
    trace = Trace(experts=np.asarray(rows, np.int16), offsets=(0, 4, 8, 12), num_experts=(8,))
    cold, learned = simulate(trace, "lru", 4), simulate(trace, "learned", 4)
    assert cold.decoding.misses == 6
    assert (learned.decoding.misses, learned.preloads) == (4, 2 + 4)


def test_a_device_tier_above() -> None:
    """What it misses is what the tier below is asked for."""
    trace = load(MIXTRAL)
    found = simulate(trace, "lru", 8, device_slots=4)
    assert found.device.hit_ratio == pytest.approx(0.574, abs=0.001)
    assert found.decoding.lookups == found.device.misses
    assert found.decoding.misses == 256, "each expert of each block comes from the disk once"


class NewestFirst(Lru):
    """A policy that tiers do not have."""

    def victims(self, *, is_scan: bool) -> Iterator[ExpertKey]:
        return reversed(self._keys)


@pytest.mark.parametrize(
    ("policy", "above"),
    [*zip(POLICIES, POLICIES, strict=True), ("learned", DEFAULT_POLICY), ("belady", DEFAULT_POLICY)],
)
def test_a_device_tier_has_the_same_policy(policy: str, above: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that comes first leaves the same behind by each of tiers' policies, and two are the same from then
    on. So one that leaves something else stands in for each: it is seen in the device tier where its name is asked for,
    and nowhere else."""
    trace = load(SHORTEST)
    assert sum(trace.n_prefill) == 85
    demands = [sets_of(trace, 0, block) for block in range(trace.block_count)]
    expected = sum(SECOND[above](of_block, 4) for of_block in demands)
    assert simulate(trace, policy, 16, device_slots=4).device.hits == expected
    for name in POLICIES:
        with monkeypatch.context() as patch:
            patch.setitem(POLICIES, name, NewestFirst)
            hits = simulate(trace, policy, 16, device_slots=4).device.hits
        assert (hits != expected) == (name == above)


def test_what_was_learned_is_kept_least_recently_used() -> None:
    """A prompt of more than the cache's four evicts it, as it would not from the others."""
    prompt, token = [[4, 5], [6, 7], [0, 4]], [[0, 1]]
    rows = [*[[pair] for pair in ([0, 1], [2, 3], [0, 1])], *[[pair] for pair in prompt], token]
    trace = Trace(experts=np.asarray(rows, np.int16), offsets=(0, 3, 7), num_experts=(8,), n_prefill=(0, 3))
    found = simulate(trace, "learned", 4)
    assert found.preloads == 4
    assert (found.decoding.lookups, found.decoding.misses) == (8, 4 + 2)


def test_a_prompt_is_one_demand() -> None:
    experts = np.asarray([[[0, 1]], [[1, 2]], [[0, 3]]], np.int16)
    trace = Trace(experts=experts, offsets=(0, 3), num_experts=(4,), n_prefill=(2,))
    keys = [ExpertKey(0, expert) for expert in range(4)]
    assert demands_of(trace, 0, 0) == [
        SimulatedDemand((keys[0], keys[1], keys[2]), is_prompt=True),
        SimulatedDemand((keys[0], keys[3]), is_prompt=False),
    ]
    found = simulate(trace, "lru", 4)
    assert (found.tokens, found.prompts.lookups, found.decoding.lookups, found.decoding.hits) == (1, 3, 2, 1)
