"""The fallback of a daemon's client: a small host tier, opened when it is first needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from stores import keys, make_store, manifest_of

from moetier.runtime.client.fallback import Fallback
from moetier.tiers.cache.budget import slots_for, smallest_budget
from moetier.tiers.errors import ClosedError
from moetier.tiers.layout import ExpertKey


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_store(tmp_path / "model")
    return tmp_path / "model"


def test_it_is_opened_once_with_the_smallest_budget_and_closed_with_its_store(directory: Path) -> None:
    manifest = manifest_of(directory)
    fallback = Fallback(directory, manifest)
    assert fallback.host is None, "it was not needed yet"
    host = fallback.open()
    assert host is not None
    assert fallback.open() is fallback.host is host
    assert host.stats().slots == slots_for(manifest, smallest_budget(manifest))["records"] == 2
    assert [lease.key for lease in host.acquire(keys(1, 3))] == [ExpertKey(1, 3)]
    fallback.close()
    fallback.close()
    with pytest.raises(ClosedError):
        next(iter(host.acquire(keys(1, 3))))
    with pytest.raises(ClosedError, match="was closed"):
        fallback.open()


def test_what_cannot_be_opened_is_tried_again_when_told_so(directory: Path, tmp_path: Path) -> None:
    fallback = Fallback(tmp_path / "later", manifest_of(directory))
    assert fallback.open() is None
    assert "There is no folder" in fallback.error
    directory.rename(tmp_path / "later")
    assert fallback.open() is None, "each miss would try it"
    fallback.error = ""
    assert fallback.open() is not None
    fallback.close()


def test_another_store_in_the_same_directory_is_not_used(directory: Path, tmp_path: Path) -> None:
    make_store(tmp_path / "other", seed=1)
    fallback = Fallback(directory, manifest_of(tmp_path / "other"))
    assert fallback.open() is None
    assert "holds another store than the daemon" in fallback.error
    fallback.close()
