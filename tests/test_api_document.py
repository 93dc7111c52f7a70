"""docs/api.md: what it names can be imported."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

TEXT = (Path(__file__).parent.parent / "docs" / "api.md").read_text()
NAMED = sorted(set(re.findall(r"(?:auto\w+::|`)\s*(moetier\.[\w.]+)", TEXT)))


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
