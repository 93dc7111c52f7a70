"""Let pytest's workers begin with the files that took longest in the last run, so that all of them end together."""

from __future__ import annotations

import os
from collections import Counter

import pytest

KEY = "moetier/seconds-of-files"  # in pytest's cache
GUESS = 0.05  # seconds of a test, where the file is not known


class LongestFirst:
    """A plugin of pytest. Files stay whole: ``--dist loadfile --no-loadscope-reorder`` gives them out in this order."""

    def __init__(self, cache: pytest.Cache) -> None:
        self._cache = cache
        self._seconds: Counter[str] = Counter()  # by file, as its tests' ids begin

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            return
        files = [item.nodeid.partition("::")[0] for item in items]
        seconds = {file: GUESS * count for file, count in Counter(files).items()} | self._cache.get(KEY, {})
        order = sorted(range(len(items)), key=lambda index: (-seconds[files[index]], files[index], index))
        items[:] = [items[index] for index in order]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid.partition("::")[0]] += report.duration

    def pytest_sessionfinish(self) -> None:
        if "PYTEST_XDIST_WORKER" in os.environ:
            return
        if len(self._seconds) > 0.9 * len(self._cache.get(KEY, {})):  # all files, not a few
            self._cache.set(KEY, {file: round(seconds, 2) for file, seconds in self._seconds.items()})
