"""Which predictions become prefetch requests, of a source that says what is absent."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from moetier.runtime.speculation.predictor import Prediction
from moetier.runtime.speculation.speculation import Admission
from moetier.tiers.layout import ExpertKey

EXPERTS = 8


class Source:
    """In place of a tier: has experts 6 and 7, and notes requests."""

    def __init__(self) -> None:
        self.made: list[list[int]] = []

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        return [key for key in keys if key.expert < 6]

    def prefetch(self, block: int, requests: Sequence[ExpertKey]) -> None:
        self.made.append([key.expert for key in requests])


def admission(source: Source, most: int | None = None) -> Admission:
    return Admission(source, [EXPERTS], most=most)  # type: ignore[arg-type]


@pytest.mark.parametrize(("most", "made"), [(None, [6, 2, 4, 5]), (4, [6, 2, 4, 5]), (2, [6, 2, 4]), (1, [6, 2])])
def test_no_more_than_asked_for_and_the_best_first(most: int | None, made: list[int]) -> None:
    source = Source()
    admission(source, most).admit(0, Prediction([2, 4, 6, 5, 2], []))
    assert source.made == [made], "a resident expert is named besides: it costs no read"


def test_resident_experts_need_no_request() -> None:
    source = Source()
    assert admission(source).admit(0, Prediction([6, 7], [])) == [6, 7]
    assert source.made == []


def test_a_resident_runner_up_is_named() -> None:
    source = Source()
    assert admission(source).admit(0, Prediction([2], [3, 7])) == [2]
    assert source.made == [[7, 2]], "3 is absent, and not to be read"


def test_a_later_prediction_replaces_a_request_until_the_demand() -> None:
    source = Source()
    found = admission(source)
    found.admit(0, Prediction([2], []))
    assert 0 in found.requested
    found.admit(0, Prediction([6], []))
    found.requested.discard(0)
    assert 0 not in found.requested
    found.admit(0, Prediction([6], []))
    assert source.made == [[2], [6]]


def test_experts_without_a_record_are_not_requested() -> None:
    source = Source()
    assert admission(source).admit(0, Prediction([EXPERTS, 2], [EXPERTS])) == [2]
    assert source.made == [[2]]
