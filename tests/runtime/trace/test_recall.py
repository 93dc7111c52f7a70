from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from moetier.runtime.trace.recall import (
    RULES,
    Comparison,
    Recall,
    compare,
    of_popularity,
    of_predictions,
    of_previous_token,
)
from moetier.runtime.trace.trace import NO_EXPERT, Trace


def hand_made() -> Trace:
    """Two sequences, of three tokens and of two; two blocks of four experts, top 2."""
    experts = [[[0, 1], [2, 3]], [[0, 2], [3, 2]], [[1, 2], [NO_EXPERT, 3]], [[3, 0], [0, 1]], [[0, 3], [0, NO_EXPERT]]]
    predictions = np.full((1, 5, 2, 2), NO_EXPERT)
    predictions[0, :, 1] = [[3, 0], [2, 3], [1, 0], [0, 2], [0, 1]]
    return Trace(
        experts=np.array(experts), offsets=(0, 3, 5), num_experts=(4, 4), lookaheads=(1,), predictions=predictions
    )


def test_predictions() -> None:
    found = of_predictions(hand_made(), 1)
    assert found.wanted.tolist() == [0, 8]  # block 0 is predicted by nobody; two experts of block 1 are none
    assert found.named.tolist() == [0, 1 + 2 + 0 + 1 + 1]
    assert found.ratio == 5 / 8


def test_popularity() -> None:
    """As many uses: the lower number. In block 0 expert 0 is used most, in block 1 expert 3."""
    found = of_popularity(hand_made())
    assert found.wanted.tolist() == [10, 8]
    assert found.named.tolist() == [
        4 + 2,
        3 + 2,
    ]  # of 0 and 1; of 3 and 0


def test_the_previous_token() -> None:
    """Not of another sequence."""
    found = of_previous_token(hand_made())
    assert found.wanted.tolist() == [6, 4]
    assert found.named.tolist() == [1 + 1 + 2, 2 + 1 + 1]


def test_only_some_blocks() -> None:
    found = of_previous_token(hand_made()).only(np.array([False, True]))
    assert (found.named.tolist(), found.wanted.tolist()) == ([0, 4], [0, 4])


def test_recall_without_predictions_is_not_a_number() -> None:
    one = Trace(experts=np.array([[[0]]]), offsets=(0, 1), num_experts=(1,))
    assert np.isnan(of_previous_token(one).ratio)
    assert of_popularity(one).ratio == 1


def test_rules_are_compared_over_the_blocks_that_are_predicted() -> None:
    assert compare(hand_made()) == [Comparison(1, 5 / 8, 5 / 8, 4 / 4)]
    trace = random_trace(0)
    foretold = of_predictions(trace, 2).wanted > 0
    near, far = compare(trace)
    assert (near.lookahead, far.lookahead) == (1, 2), "the nearest first"
    assert far.gates == of_predictions(trace, 2).ratio
    assert far.popularity == of_popularity(trace).only(foretold).ratio
    assert far.previous_token == of_previous_token(trace).only(foretold).ratio
    assert compare(Trace(experts=trace.experts, offsets=trace.offsets, num_experts=trace.num_experts)) == []


def test_a_rule_without_predictions_has_no_recall() -> None:
    """No token is the first one's previous, and two blocks ahead nobody foretells these two blocks."""
    predictions = np.full((2, 1, 2, 1), NO_EXPERT)
    predictions[0, 0, 1] = 1
    one = Trace(
        experts=np.array([[[0], [1]]]), offsets=(0, 1), num_experts=(2, 2), lookaheads=(1, 2), predictions=predictions
    )
    assert compare(one) == [Comparison(1, 1.0, 1.0, None), Comparison(2, None, None, None)]
    assert [found.cells() for found in compare(one)] == [["1.000", "1.000", "-"], ["-"] * len(RULES)]


def random_trace(seed: int) -> Trace:
    random = np.random.default_rng(seed)
    tokens, blocks, experts, k = 23, 3, 7, 3

    def some(*shape: int) -> Any:
        found = random.permuted(np.broadcast_to(np.arange(experts), (*shape, experts)), axis=-1)[..., :k].copy()
        found[random.random(found.shape) < 0.2] = NO_EXPERT
        return found

    offsets = (0, *sorted(random.choice(np.arange(1, tokens), 2, replace=False).tolist()), tokens)
    return Trace(
        experts=some(tokens, blocks),
        offsets=offsets,
        num_experts=(experts,) * blocks,
        lookaheads=(2, 1),
        predictions=some(2, tokens, blocks),
    )


def counted(trace: Trace, guess: Any) -> Recall:
    """Slowly, by sets; ``guess(token, block)`` gives one, or None."""
    named, wanted = Counter[int](), Counter[int]()
    for token in range(trace.tokens):
        for block in range(trace.block_count):
            real = set(trace.experts[token, block].tolist()) - {NO_EXPERT}
            if guesses := set(guess(token, block)) - {NO_EXPERT}:
                named[block] += len(real & guesses)
                wanted[block] += len(real)
    blocks = range(trace.block_count)
    return Recall(np.array([named[b] for b in blocks]), np.array([wanted[b] for b in blocks]))


@pytest.mark.parametrize("seed", range(8))
def test_it_is_what_counting_by_hand_gives(seed: int) -> None:
    trace = random_trace(seed)
    assert trace.predictions is not None
    predictions = trace.predictions

    def previous(token: int, block: int) -> Any:
        return [] if token in trace.offsets else trace.experts[token - 1, block].tolist()

    def popular(_: int, block: int) -> Any:
        uses = Counter(e for e in trace.experts[:, block].ravel().tolist() if e != NO_EXPERT)
        return sorted(uses, key=lambda e: (-uses[e], e))[: trace.top_k]

    for found, guess in (
        (of_predictions(trace, 2), lambda token, block: predictions[0, token, block].tolist()),
        (of_predictions(trace, 1), lambda token, block: predictions[1, token, block].tolist()),
        (of_previous_token(trace), previous),
        (of_popularity(trace), popular),
    ):
        expected = counted(trace, guess)
        assert found.named.tolist() == expected.named.tolist()
        assert found.wanted.tolist() == expected.wanted.tolist()
