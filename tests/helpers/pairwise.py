"""Half of the cases of a product, which have every two values of different parameters; the other half is slow."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from typing import Any

import pytest


def each_two(*values: Collection[Any]) -> Iterator[Any]:
    """Yield all cases of three parameters or more, by turns quick and slow."""
    for cases in itertools.product(*map(enumerate, values)):
        marks = [pytest.mark.slow] * (sum(place for place, _ in cases) % 2)
        yield pytest.param(*(value for _, value in cases), marks=marks)
