"""No model computes while another is built."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import pytest
import torch
from cuts import cut
from readers import PATIENCE
from threads import Task, interrupt_main, wait_until, waits

import moetier
from moetier.runtime.engine.engine import Engine
from moetier.runtime.engine.sequence import Request
from moetier.runtime.engine.steps import Steps
from moetier.runtime.libraries.model_building import MadeOnMeta, ModelBuilding


def test_builders_wait_for_computations_and_go_first() -> None:
    order, building = list[str](), ModelBuilding()
    may_end, is_computing = threading.Event(), threading.Event()

    def compute() -> None:
        with building.computing():
            is_computing.set()
            assert may_end.wait(PATIENCE)
            building.let_build()
            order.append("computed")

    def build() -> None:
        with building.building(), building.building():
            order.append("built")

    def compute_later() -> None:
        with building.computing():
            order.append("computed later")

    threads = [threading.Thread(target=work) for work in (compute, build, compute_later)]
    threads[0].start()
    assert is_computing.wait(PATIENCE)
    threads[1].start()
    wait_until(lambda: waits(threads[1]))
    threads[2].start()
    assert order == []
    may_end.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert order[0] == "built"
    assert {*order[1:]} == {"computed", "computed later"}


def test_an_engine_never_sees_the_type_of_a_model_that_is_built(
    tinymix_4bit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers changes torch's default type for all threads of the process while it builds one."""
    model, tokenizer = moetier.load(tinymix_4bit, daemon=None)
    assert tokenizer is not None
    seen, step = set[torch.dtype](), Steps.step

    def noted(steps: Steps) -> None:
        step(steps)
        for _ in range(10):
            time.sleep(0.0005)
            seen.add(torch.get_default_dtype())

    monkeypatch.setattr(Steps, "step", noted)
    ids = tuple(tokenizer("La mattina")["input_ids"])
    with model.tiers, Engine.of(model, tokens=400) as engine:
        tokens = iter(engine.stream(Request(ids, 300, {"do_sample": False})))
        next(tokens)
        for _ in range(3):
            other, _ = moetier.load(tinymix_4bit, daemon=None)
            other.tiers.close()
        assert next(tokens) is not None, "they were loaded while it computed"
        tokens.close()
    assert seen == {torch.float32}


def test_a_builder_that_is_interrupted_while_it_waits_keeps_nobody_waiting() -> None:
    building = ModelBuilding()
    may_end, is_computing, begins = (threading.Event() for _ in range(3))

    def compute() -> None:
        with building.computing():
            is_computing.set()
            assert may_end.wait(PATIENCE)

    def interrupt() -> None:
        assert begins.wait(PATIENCE)
        interrupt_main(lambda: waits(threading.main_thread()))

    first = Task(compute)
    assert is_computing.wait(PATIENCE)
    interrupting = Task(interrupt)
    begins.set()
    with pytest.raises(KeyboardInterrupt), building.building():
        pass
    interrupting.result()
    may_end.set()
    first.result()
    with building.computing():
        pass
    with building.building():
        pass


def test_an_operation_that_torch_lacks_is_tried_again_with_its_python_code() -> None:
    library = torch.library.Library("moetier_tests", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    asked = list[bool]()

    def complete() -> bool:
        if asked:
            library.impl("twice", torch.empty_like, "Meta")
        asked.append(True)
        return len(asked) > 1

    x = torch.empty(2, 3, device="meta")
    with MadeOnMeta(complete):
        with pytest.raises(NotImplementedError, match="twice"):
            torch.ops.moetier_tests.twice(x)
        assert torch.ops.moetier_tests.twice(x).shape == (2, 3)
    assert len(asked) == 2


def test_an_exception_from_outside_shuts_nobody_out() -> None:
    def compute(building: ModelBuilding) -> None:
        with building.computing():
            building.let_build()

    def build(building: ModelBuilding) -> None:
        with building.building():
            pass

    for work in (compute, build):
        for number in itertools.count():
            building = ModelBuilding()
            exception = cut(lambda work=work, building=building: work(building), number)
            for other in (compute, build):
                Task(lambda other=other, building=building: other(building)).result()
            if exception is None:
                break
        assert number > 3
