"""docs/api.md: what it names can be imported, and what it named before the packages still can, with a warning."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
from prepared import for_daemons

TEXT = (Path(__file__).parent.parent / "docs" / "api.md").read_text()
NAMED = sorted(set(re.findall(r"(?:auto\w+::|`)\s*(moetier\.[\w.]+)", TEXT)))
FORMER = {
    "moetier.runtime.address": ("Credentials",),
    "moetier.runtime.client": ("DaemonTier",),
    "moetier.runtime.tiers": ("Tiers",),
    "moetier.tiers.device": ("DeviceTier",),
    "moetier.tiers.errors": ("MoetierError", "StoreError"),
    "moetier.tiers.host": ("HostTier",),
    "moetier.tiers.keys": ("ExpertKey", "Projection", "RecordLayout"),
    "moetier.tiers.manifest": ("Block", "Manifest"),
    "moetier.tiers.source": ("ExpertSource", "Lender", "RecordReader", "Lease", "Pace"),
    "moetier.tiers.stats": ("TierStats",),
    "moetier.tiers.store": ("ExpertStore",),
    "moetier.tiers.views": ("HostViews",),
    "moetier.tiers.writer": ("StoreWriter", "ShardWriter"),
}
MOVED = {"moetier.runtime.address", "moetier.runtime.tiers", "moetier.tiers.keys"}
MOVED |= {"moetier.tiers.views", "moetier.tiers.writer"}


def test_the_page_names_something() -> None:
    assert {"moetier.tiers.errors", "moetier.tiers.store.ExpertStore", "moetier.runtime.client.DaemonTier"} <= set(
        NAMED
    )


@pytest.mark.parametrize("name", NAMED)
def test_what_it_names_can_be_imported(name: str) -> None:
    parts = name.split(".")
    for at in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:at]))
        except ModuleNotFoundError:
            continue
        for part in parts[at:]:
            found = getattr(found, part)
        return
    raise AssertionError(name)


@pytest.mark.parametrize("module", FORMER)
def test_former_paths_can_be_imported(module: str) -> None:
    """In a process of its own: a warning comes with the first import alone."""
    code = f"from {module} import {', '.join(FORMER[module])}"
    done = for_daemons().run(f"import warnings; warnings.simplefilter('always'); {code}")
    assert done.returncode == 0, done.stderr
    assert (f"DeprecationWarning: {module} is now" in done.stderr) == (module in MOVED)
