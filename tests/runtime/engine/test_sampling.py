"""Sampling: the most likely token or random numbers of a seed, with the log probabilities of the model itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moetier.runtime.engine.sampling import TOKENS, Sampler, scored

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.5])


def unchanged(ids: Tensor, scores: Tensor) -> Tensor:
    return scores


def test_without_sampling_the_most_likely_token_is_chosen() -> None:
    sampled = Sampler([3], unchanged)(LOGITS)
    assert (sampled.token, sampled.logprob, sampled.top) == (1, None, ())


def test_processors_get_all_ids_up_to_now_and_choose() -> None:
    seen = list[list[int]]()

    def forbids_what_was_there(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(ids[0].tolist())
        return scores.index_fill(1, ids[0], -torch.inf)

    sampler = Sampler([1], forbids_what_was_there)
    assert [sampler(LOGITS).token for _ in range(3)] == [3, 0, 2]
    assert seen == [[1], [1, 3], [1, 3, 0]]
    assert LOGITS[1] == 2.0, "the logits stay as they are"


def test_ids_beyond_the_memory_at_the_beginning_are_kept() -> None:
    lengths = list[int]()

    def counts(ids: Tensor, scores: Tensor) -> Tensor:
        lengths.append(ids.shape[1])
        return scores

    sampler = Sampler([0] * (TOKENS - 1), counts)
    for _ in range(TOKENS + 2):
        sampler(LOGITS)
    assert lengths == [*range(TOKENS - 1, 2 * TOKENS + 1)]


def test_random_numbers_depend_on_the_seed_alone() -> None:
    drawn = [[Sampler([0], unchanged, samples=True, seed=seed)(LOGITS).token for _ in range(1)] for seed in range(40)]
    assert drawn == [[Sampler([0], unchanged, samples=True, seed=seed)(LOGITS).token] for seed in range(40)]
    assert {token for (token,) in drawn} > {1, 3}


@pytest.mark.parametrize("ends", [frozenset({1}), frozenset()])
def test_only_the_given_tokens_end_a_sequence(ends: frozenset[int]) -> None:
    sampler = Sampler([0], unchanged, ends=ends)
    assert sampler.is_last(sampler(LOGITS).token) == bool(ends)


def test_log_probabilities_are_those_of_the_model() -> None:
    def doubles(ids: Tensor, scores: Tensor) -> Tensor:
        return 2 * scores

    expected = LOGITS.log_softmax(0)
    sampled = Sampler([0], doubles, logprobs=2)(LOGITS)
    assert sampled.logprob == pytest.approx(float(expected[1]))
    assert [token for token, _ in sampled.top] == [1, 3]
    assert [logprob for _, logprob in sampled.top] == pytest.approx(expected[[1, 3]].tolist())


def test_the_tokens_of_a_prompt_are_scored_each_by_its_own_logits() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0)])
    first, second = scored(logits, [0, 0], 1)
    assert first.logprob == pytest.approx(float(LOGITS.log_softmax(0)[0]))
    assert second.logprob == pytest.approx(float(LOGITS.log_softmax(0)[3]))
    assert [sampled.top[0][0] for sampled in (first, second)] == [1, 2]
