"""Slots of a daemon's models, by their budget and by memory of earlier daemons; what a failed start gives back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from stores import layout_of, make_plan, make_records, write_store
from threads import threads_named, without_thread

from moetier.runtime.config import Size
from moetier.runtime.daemon.daemon_config import DaemonConfig
from moetier.runtime.daemon.reclaim import ReclaimedArena
from moetier.runtime.daemon.startup import divide_memory, open_models, open_stores
from moetier.runtime.daemon.systemd import ServiceManager
from moetier.runtime.machine.memory import Available
from moetier.tiers.arena.arena import Arena
from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.errors import BudgetError, ExhaustedError
from moetier.tiers.manifest import Manifest

SLOT = layout_of().slot_bytes


@pytest.fixture
def two(tmp_path: Path) -> dict[str, Manifest]:
    """Models of 12 and 36 records."""
    manifests = {}
    for number, experts in enumerate((4, 12)):
        plan = make_plan(experts=experts, model=f"acme/{experts}")
        manifest = write_store(tmp_path / str(number), plan, make_records(plan, number))
        manifests[manifest.digest] = manifest
    return manifests


@contextlib.contextmanager
def leftover(manifest: Manifest, slots: int) -> Iterator[ReclaimedArena]:
    arena = Arena.create(ArenaLayout.of(manifest, {"records": slots}))
    try:
        yield ReclaimedArena(arena, "process 1")
    finally:
        arena.close()


PLENTY = Available(1 << 30, "this machine")


def test_models_share_in_proportion(two: dict[str, Manifest]) -> None:
    small, large = two
    slots, kept = divide_memory(two, Size(bytes=24 * SLOT), PLENTY, {})
    assert not kept
    assert slots[small]["records"] == pytest.approx(6, abs=1)
    assert slots[large]["records"] == pytest.approx(18, abs=1)
    slots, _ = divide_memory(two, None, PLENTY, {})
    assert [slots[digest]["records"] for digest in two] == [12, 36]
    slots, _ = divide_memory(two, Size(bytes=4 * SLOT), PLENTY, {})
    assert [slots[digest]["records"] for digest in two] == [2, 2]
    with pytest.raises(BudgetError):
        divide_memory(two, Size(bytes=4 * SLOT - 1), PLENTY, {})


def test_a_leftovers_memory_is_there_to_be_used(two: dict[str, Manifest]) -> None:
    small, large = two
    tight = Available((16 << 20) + 400_000, "this machine")  # the margin, and enough for 6 slots, but not for 24
    asked = Size(bytes=24 * SLOT)
    with pytest.raises(BudgetError):
        divide_memory(two, asked, tight, {})
    wanted = divide_memory(two, asked, PLENTY, {})[0]
    with leftover(two[large], wanted[large]["records"]) as fits, leftover(two[large], 3) as other:
        slots, kept = divide_memory(two, asked, tight, {large: [other, fits]})
        assert slots == wanted
        assert kept == {large: fits}
        with pytest.raises(BudgetError):  # what is not used gives nothing
            divide_memory(two, asked, tight, {large: [other]})
        # no number of bytes was asked for: it stays as it is, and the other gets of the rest
        slots, kept = divide_memory(two, None, PLENTY, {large: [other, fits]})
        assert (slots[large], slots[small]) == ({"records": 3}, {"records": 12})
        assert kept == {large: other}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    plan = make_plan()
    return write_store(tmp_path, plan, make_records(plan))


def start(folder: Path, ram: int, manager: ServiceManager) -> None:
    config = DaemonConfig.of((folder,), ram=ram, folder=str(folder / "daemon"), learn=True)
    with contextlib.ExitStack() as closing:
        open_models(config, open_stores(config.directories, closing), manager, closing, was_killed=False)


@pytest.mark.parametrize("name", ["moetier-loader-1", "moetier-learner", "moetier-fetches", "moetier-trunk"])
def test_a_model_for_which_there_is_no_thread_leaves_none_behind(name: str, manifest: Manifest, tmp_path: Path) -> None:
    before = threads_named("moetier-")
    with without_thread(name), pytest.raises(ExhaustedError, match="new thread"):
        start(tmp_path, manifest.stored_bytes, ServiceManager({}))
    assert threads_named("moetier-") == before


def test_a_reclaimed_arena_is_given_back_if_the_memory_is_too_small(manifest: Manifest, tmp_path: Path) -> None:
    manager = ServiceManager({})
    with contextlib.closing(Arena.create(ArenaLayout.of(manifest, {"records": 6}))) as arena:
        manager.passed.append(("arena", arena.export()))
    with pytest.raises(BudgetError):
        start(tmp_path, 1, manager)
    Arena.reclaim(manager.passed[0][1], manifest).close()  # an ArenaError if it still had an owner
    manager.close()
