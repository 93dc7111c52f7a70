"""Store, host and device of one model, opened and closed together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comparison import convert_tiny, smallest_ram

import moetier
from moetier.runtime.config import TierConfig
from moetier.runtime.devices.cpu import Cpu
from moetier.runtime.machine.memory import available_memory
from moetier.runtime.model import trunk_files
from moetier.runtime.model.budgets import Needs
from moetier.runtime.model.kv_budget import KVBudget
from moetier.runtime.model.tiers import Tiers
from moetier.runtime.model.trunk_files import mapped_bytes
from moetier.runtime.stores.registry import read_manifest
from moetier.tiers.errors import BudgetError, ClosedError
from moetier.tiers.layout import ExpertKey

CPU = Cpu()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_tiny("mixtral", torch.bfloat16, tmp_path_factory.mktemp("mixtral"))[1]


def test_by_default_everything_that_fits_is_held(directory: Path) -> None:
    with Tiers.open(directory, read_manifest(directory), TierConfig.of(), CPU) as tiers:
        assert tiers.host.stats().slots == tiers.manifest.record_count == 24


def test_the_snapshot_is_json_with_each_tier_by_name(directory: Path) -> None:
    with Tiers.open(directory, read_manifest(directory), TierConfig.of(ram=smallest_ram(directory)), CPU) as tiers:
        for lease in tiers.source.acquire([ExpertKey(1, 3), ExpertKey(1, 4)]):
            assert lease.record.dtype == torch.uint8
            assert len(lease.record) == tiers.manifest.layout(1).record_bytes
        found = json.loads(json.dumps(tiers.snapshot()))
        assert list(found) == [stats.name for stats in tiers.stats()] == ["host"]
        assert (found["host"]["misses"], found["host"]["slots"]) == (2, 3)


def test_closing_ends_every_tier(directory: Path) -> None:
    tiers = Tiers.open(directory, read_manifest(directory), TierConfig.of(), CPU)
    tiers.close()
    tiers.close()
    for source in (tiers.source, tiers.host):
        with pytest.raises(ClosedError) as caught:
            list(source.acquire([ExpertKey(0, 0)]))
        assert "device" not in caught.value.cause, "a CPU's user has none"


@pytest.mark.parametrize("taken", ["trunk", "kv"])
def test_memory_that_is_spoken_for_is_no_budget(directory: Path, taken: str) -> None:
    much = 2 * available_memory().bytes
    needs = Needs(trunk=much) if taken == "trunk" else Needs(kv=KVBudget(64, 1, much))
    with pytest.raises(BudgetError, match="The rest is less than"):
        Tiers.open(directory, read_manifest(directory), TierConfig.of(), CPU, needs=needs)


def test_the_trunk_counts_as_taken_where_it_lies_in_mapped_files(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel could drop its pages, so no count of free memory has them; a copy in another type is counted."""
    monkeypatch.setattr(trunk_files, "COPIED_BYTES", 0)
    mapped, _ = moetier.load(directory)
    moetier.register()
    copied = type(mapped).from_pretrained(directory, dtype=torch.float32)
    with mapped.tiers, copied.tiers:
        assert mapped_bytes(mapped) == sum(parameter.nbytes for parameter in mapped.parameters()) > 0
        assert mapped_bytes(copied) < mapped_bytes(mapped) / 100
