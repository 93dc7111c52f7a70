"""Few cases of a product, which have every two values of different parameters; the others are slow."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from typing import Any

import pytest


def each_two(*values: Collection[Any]) -> Iterator[Any]:
    """Yield all cases of three parameters or more; quick are those with the most pairs that no quick one has yet."""
    cases = [*itertools.product(*map(range, map(len, values)))]
    pairs = {case: {*itertools.combinations(enumerate(case), 2)} for case in cases}
    left, quick = set[Any]().union(*pairs.values()), set[tuple[int, ...]]()
    while left:
        quick.add(best := max(cases, key=lambda case: len(pairs[case] & left)))
        left -= pairs[best]
    for case, given in zip(cases, itertools.product(*values), strict=True):
        yield pytest.param(*given, marks=[pytest.mark.slow] * (case not in quick))
