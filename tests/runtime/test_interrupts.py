"""Ctrl-C, and other exceptions from outside, at random moments of generate()."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from daemons import running_daemon
from places import HELPERS
from prepared import Prepared
from readers import PATIENCE, GatedReader
from stores import make_plan, make_records
from threads import Task

import moetier
from moetier.tiers.cache.budget import smallest_budget
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import UNINTERRUPTIBLE, Monitor, postpone_interrupts, raise_interrupts
from moetier.tiers.store.folder import read_manifest, store_folder

SCRIPT = HELPERS / "interrupted.py"
PLAN = make_plan(blocks=1, experts=2, top_k=1)


def cases() -> Iterator[Any]:
    """50 interrupts of two kinds of tiers in the ordinary suite; 2,000 of each in the slow one."""
    for budget, where in itertools.product(("smallest", "half"), ("embedded", "daemon")):
        for kind in ("SIGINT", "SIGALRM"):
            if (budget, where) in {("smallest", "embedded"), ("half", "daemon")}:
                yield budget, where, kind, 50
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
        result = scripts.run(SCRIPT.read_text(), tinymix_4bit, *options, timeout=1000)
        assert result.returncode == 0, result.stderr
        told = json.loads(result.stdout)
        assert told["interrupts"] == count, told
        assert told["default"], "the handler is Python's own again"
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

        postpone_interrupts()
        closing.callback(raise_interrupts)
        task = Task(interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(tier.acquire([ExpertKey(0, 0)]))
        task.result()
        assert not gate.reads, "the read has not ended"
        tier.check_integrity()


def test_a_step_is_not_cut_and_the_signal_comes_behind_it() -> None:
    """However long the step takes."""
    reached: list[str] = []
    with held_back():

        def step() -> None:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)  # it comes again, and again
            reached.append("the end of the step")

        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            Monitor().run(step)
            while True:
                threading.Event().wait(PATIENCE)
        assert reached


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    postpone_interrupts()
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    try:
        yield
    finally:
        raise_interrupts()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_handler_is_a_forward_pass_long_and_replaces_pythons_own_alone(tinymix_4bit: Path) -> None:
    model, _ = moetier.load(tinymix_4bit, ram="100%")
    seen: list[Any] = []
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append(signal.getsignal(signal.SIGINT)))
    ids = torch.tensor([[1, 2]])
    with model.tiers:
        before = signal.getsignal(signal.SIGINT)
        assert before is signal.default_int_handler
        model(ids)
        assert seen.pop() is not before
        assert signal.getsignal(signal.SIGINT) is before
        Task(lambda: model(ids)).result()  # another thread may set none
        assert seen.pop() is before

        def own(*_: Any) -> None: ...

        signal.signal(signal.SIGINT, own)
        try:
            model(ids)
        finally:
            assert signal.signal(signal.SIGINT, before) is own
        assert seen.pop() is own
        with pytest.raises(ZeroDivisionError):
            model(ids, use_cache=Broken())
        assert signal.getsignal(signal.SIGINT) is before


def test_pythons_own_handler_is_back_when_ctrl_c_has_ended_a_forward_pass(tinymix_4bit: Path) -> None:
    model, _ = moetier.load(tinymix_4bit, ram="100%")
    with model.tiers:
        model.lm_head.register_forward_pre_hook(lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            model(torch.tensor([[1, 2]]))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Broken:
    def __bool__(self) -> bool:
        raise ZeroDivisionError


def test_the_modules_that_are_not_cut_are_there() -> None:
    for name in UNINTERRUPTIBLE:
        importlib.import_module(name)
