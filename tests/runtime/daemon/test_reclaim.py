"""Arenas of daemons that have ended are taken back, once their owners are gone."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path

import pytest
from readers import PATIENCE
from stores import make_plan, make_records, write_store
from threads import Task

from moetier.runtime.daemon.reclaim import reclaim_arenas
from moetier.tiers.arena.arena import Arena
from moetier.tiers.arena.layout import ArenaLayout


def test_an_arena_that_cannot_be_mapped_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan()
    manifest = write_store(tmp_path, plan, make_records(plan))
    owner = Arena.create(ArenaLayout.of(manifest, {"records": 6}))
    descriptor = owner.export()
    owner.close()

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with contextlib.ExitStack() as closing, monkeypatch.context() as change:
        change.setattr("moetier.tiers.arena.arena.mmap.mmap", refuse)
        assert not reclaim_arenas({manifest.digest: manifest}, closing, [("holder", descriptor)])
        change.undo()
        assert reclaim_arenas({manifest.digest: manifest}, closing, [("holder", descriptor)])
    os.close(descriptor)


def test_an_owner_that_is_still_being_killed_is_waited_for_whatever_is_free_already(tmp_path: Path) -> None:
    """There are two models. A read of one has not ended yet, so its arena is still locked."""
    plans = [make_plan(experts=experts, model=f"acme/{experts}") for experts in (4, 6)]
    manifests = [write_store(tmp_path / plan.model, plan, make_records(plan)) for plan in plans]
    arenas = [Arena.create(ArenaLayout.of(manifest, {"records": 6})) for manifest in manifests]
    kept = [(f"holder {number}", arena.export()) for number, arena in enumerate(arenas)]
    arenas[0].close()
    dying = Task(lambda: (time.sleep(0.2), arenas[1].close()), "the owner")
    with contextlib.ExitStack() as closing:
        found = reclaim_arenas({manifest.digest: manifest for manifest in manifests}, closing, kept, timeout=PATIENCE)
    dying.result()
    for _, descriptor in kept:
        os.close(descriptor)
    assert found.keys() == {manifest.digest for manifest in manifests}
