"""Which guesses become wishes, of a source that says what is absent."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from moetier.runtime.speculation.admission import Prefetch
from moetier.runtime.speculation.predictor import Leads
from moetier.tiers.layout import ExpertKey

EXPERTS = 8


class Source:
    """In place of a tier: has experts 6 and 7, and notes wishes."""

    def __init__(self) -> None:
        self.made: list[list[int]] = []

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        return [key for key in keys if key.expert < 6]

    def prefetch(self, block: int, wishes: Sequence[ExpertKey]) -> None:
        self.made.append([key.expert for key in wishes])


def prefetch_of(source: Source, most: int | None = None) -> Prefetch:
    """Guesses with a lead of .1 were right in seven of ten cases, with one of 1 always."""
    found = Prefetch(source, [EXPERTS], look_ahead=1, most=most)  # type: ignore[arg-type]
    for lead, right in ((0.1, 7), (1.0, 10)):
        for number in range(200):
            found._confidence.learn(1, lead, right=number % 10 < right)
    return found


@pytest.mark.parametrize(("most", "wished"), [(None, [6, 2, 4, 5]), (4, [6, 2, 4, 5]), (2, [6, 2, 4]), (1, [6, 2])])
def test_no_more_than_asked_for_and_the_likeliest(most: int | None, wished: list[int]) -> None:
    source = Source()
    prefetch_of(source, most).wish(0, 1, Leads([(4, 0.1), (5, 0.1), (6, 0.1), (2, 1.0)], []))
    assert source.made == [wished], "what is there is wished for besides: it costs nothing"


def test_what_is_there_needs_no_wish() -> None:
    source = Source()
    named = prefetch_of(source).wish(0, 1, Leads([(6, 1.0), (7, 1.0)], []))
    assert source.made == []
    assert [name.was_absent for name in named] == [False, False]


def test_what_comes_next_is_wished_for_if_it_is_there() -> None:
    source = Source()
    found = prefetch_of(source)
    assert [name.expert for name in found.wish(0, 1, Leads([(2, 1.0)], [3, 7]))] == [2]
    assert source.made == [[7, 2]], "3 is not there, and not to be read"


def test_what_is_no_record_is_not_wished() -> None:
    source = Source()
    named = prefetch_of(source).wish(0, 1, Leads([(EXPERTS, 1.0), (2, 1.0)], [EXPERTS]))
    assert source.made == [[2]]
    assert [name.expert for name in named] == [2]
