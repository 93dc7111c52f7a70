"""Let pytest's workers begin with the files that took longest in the last run, so that all of them end together."""

from __future__ import annotations

import os
from collections import Counter

import pytest

KEY = "moetier/seconds-of-files"  # in pytest's cache
GUESS = 0.05  # seconds of a test, where the file is not known
# seconds of files with a few long tests, for the first run in a clone: the last ones to begin would end alone
LONG = {
    "tests/tools/serve/test_models.py": 50,
    "tests/runtime/client/test_remote_compute.py": 40,
    "tests/runtime/model/test_load_generation.py": 25,
    "tests/scenarios/test_client_faults.py": 25,
    "tests/test_documentation.py": 25,
    "tests/runtime/model/test_same_bits.py": 20,
    "tests/scenarios/test_prompt_peaks.py": 15,
    "tests/scenarios/test_remote_daemons.py": 15,
    "tests/scenarios/test_several_models.py": 15,
    "tests/scenarios/test_interrupts.py": 15,
    "tests/test_kubernetes.py": 15,
    "tests/test_upgrades.py": 15,
    "tests/test_watching.py": 15,
    "tests/test_wheel.py": 15,
    "tests/tiers/store/test_mirror.py": 15,
    "tests/tools/convert/test_replacement.py": 15,
    "tests/tools/serve/test_sampled_tokens_agents.py": 12,
    "tests/scenarios/test_foreign_shards.py": 12,
    "tests/runtime/engine/test_engine_schedules.py": 10,
    "tests/scenarios/test_soak.py": 10,
}


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
        seconds = {file: GUESS * count for file, count in Counter(files).items()} | LONG | self._cache.get(KEY, {})
        order = sorted(range(len(items)), key=lambda index: (-seconds[files[index]], files[index], index))
        items[:] = [items[index] for index in order]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid.partition("::")[0]] += report.duration

    def pytest_sessionfinish(self) -> None:
        if "PYTEST_XDIST_WORKER" in os.environ:
            return
        if len(self._seconds) > 0.9 * len(self._cache.get(KEY, {})):  # all files, not a few
            self._cache.set(KEY, {file: round(seconds, 2) for file, seconds in self._seconds.items()})
