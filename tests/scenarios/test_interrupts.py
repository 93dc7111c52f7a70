"""Ctrl-C, and other exceptions from outside, at random moments of generate()."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import running_daemon
from integrity import check_integrity
from places import HELPERS
from prepared import Prepared
from readers import GatedReader
from stores import make_plan, make_records
from threads import Task

from moetier.tiers.cache.budget import smallest_budget
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import Monitor
from moetier.tiers.store.folder import read_manifest, store_folder

SCRIPT = f"import sys\nsys.path.insert(0, {str(HELPERS)!r})\nimport interrupted\ninterrupted.main()\n"
PLAN = make_plan(blocks=1, experts=2, top_k=1)


def cases() -> Iterator[Any]:
    """10 interrupts of two kinds of tiers in the ordinary suite; 2,000 of each in the slow one."""
    for budget, where in itertools.product(("smallest", "half"), ("embedded", "daemon")):
        for kind in ("SIGINT", "SIGALRM"):
            if (budget, where) in {("smallest", "embedded"), ("half", "daemon")}:
                yield budget, where, kind, 10
            yield pytest.param(budget, where, kind, 2000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])


@pytest.mark.parametrize(("budget", "where", "kind", "count"), list(cases()))
def test_at_random_moments(
    scripts: Prepared, tinymix_4bit: Path, tmp_path: Path, budget: str, where: str, kind: str, count: int
) -> None:
    """Python's own handler of SIGINT, and a user's of SIGALRM that raises. Then the same model gives the right tokens,
    and its tier's integrity holds."""
    manifest = read_manifest(store_folder(tinymix_4bit))
    ram = smallest_budget(manifest) if budget == "smallest" else manifest.stored_bytes // 2
    with contextlib.ExitStack() as closing:
        place = ["--ram", ram]
        if where == "daemon":
            folder = tmp_path / "daemon"
            running = closing.enter_context(running_daemon(tinymix_4bit, ram=ram, folder=folder))
            place = ["--daemon", folder]
        options = [*place, "--count", count, "--signal", kind, "--seed", count]
        result = scripts.run(SCRIPT, tinymix_4bit, *options, timeout=1000)
        assert result.returncode == 0, result.stderr
        told = json.loads(result.stdout)
        assert told["interrupts"] == count, told
        if where == "daemon":
            running.wait_for("leases == 0")


def test_a_wait_for_a_read_ends_at_once() -> None:
    gate = GatedReader(PLAN, make_records(PLAN))
    main = threading.main_thread().ident or 0
    with HostTier(gate, slots={"records": 1}) as tier, contextlib.ExitStack() as closing:
        closing.callback(gate.open)

        def interrupt() -> None:
            gate.wait_begun(ExpertKey(0, 0))
            signal.pthread_kill(main, signal.SIGINT)

        task = Task(interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(tier.acquire([ExpertKey(0, 0)]))
        task.result()
        assert not gate.reads, "the read has not ended"
        check_integrity(tier)


def test_ctrl_c_cuts_a_transition_and_the_next_one_repairs_first() -> None:
    done: list[str] = []
    monitor = Monitor(lambda: done.append("repaired"))

    def change() -> None:
        done.append("begun")
        signal.raise_signal(signal.SIGINT)
        done.append("ended")

    with pytest.raises(KeyboardInterrupt):
        monitor.run(change)
    assert done == ["begun"]
    monitor.run(lambda: done.append("the next one"))
    assert done == ["begun", "repaired", "the next one"]
