"""A daemon that can't open its models gives back what it has opened and reclaimed."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from stores import make_plan, make_records, write_store
from threads import threads_named, without_thread

from moetier.runtime.daemon.options import DaemonConfig
from moetier.runtime.daemon.startup import open_models, open_stores
from moetier.runtime.daemon.systemd import ServiceManager
from moetier.tiers.arena.arena import Arena
from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.errors import BudgetError
from moetier.tiers.manifest import Manifest


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
    with without_thread(name), pytest.raises(RuntimeError, match="new thread"):
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
