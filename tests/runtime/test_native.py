"""Compiling beside other things that a process does."""

from __future__ import annotations

import threading

from forks import in_fork
from llvmlite import ir
from readers import PATIENCE
from threads import Task

from moetier.runtime.form import Form, Number
from moetier.runtime.kernels import _Code
from moetier.runtime.native import Processor

FORM, OTHER = Form(4, 64, "bfloat16", Number.BF16), Form(8, 64, "bfloat16", Number.BF16)


class Slow(Processor):
    """In the midst of something until ``go``."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = threading.Event(), threading.Event()

    def compile(self, module: ir.Module, name: str) -> int:
        self.begun.set()
        assert self.go.wait(PATIENCE)
        return super().compile(module, name)


def test_a_child_that_is_forked_while_another_thread_compiles_can_compile() -> None:
    """The fork waits: LLVM's own state could not be repaired in the child."""
    slow = Slow()
    code = _Code(slow)
    task = Task(lambda: code.of(FORM))
    assert slow.begun.wait(PATIENCE)
    threading.Timer(0.2, slow.go.set).start()
    found = in_fork(lambda: len({code.of(form)[0] for form in (FORM, OTHER)}))
    assert found == "returned 2"
    assert len(task.result()) == 3


def test_who_compiles_may_fork() -> None:
    """As a handler of signals might, or a finalizer."""

    class Forking(Processor):
        def compile(self, module: ir.Module, name: str) -> int:
            found.append(in_fork(lambda: "here"))
            return super().compile(module, name)

    found: list[str] = []
    assert len(_Code(Forking()).of(FORM)) == 3
    assert found == ["returned here"] * 2
