"""Compiling beside other things that a process does."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
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


LOOK = """
import ctypes, sys
from pathlib import Path
folder, mode = Path(sys.argv[1]), int(sys.argv[2])
ctypes.CDLL(str(folder / "before.libs/libgomp.so.1"), mode=mode)
sys.path.insert(0, str(folder))
import torch
assert Path(torch.__file__).parents[1] == folder
ctypes.CDLL(str(folder / "after.libs/libgomp.so.1"), mode=ctypes.RTLD_GLOBAL)
torch.set_num_threads(3)
from moetier.runtime.native import openmp
address = ctypes.cast(openmp(), ctypes.c_void_p).value
for line in open("/proc/self/maps"):
    start, end = (int(text, 16) for text in line.split()[0].split("-"))
    if start <= address < end:
        library = line.split()[-1]
        print(library, ctypes.CDLL(library).omp_get_max_threads())
"""


@pytest.mark.parametrize("mode", [ctypes.RTLD_LOCAL, ctypes.RTLD_GLOBAL], ids=["for itself", "for all libraries"])
def test_of_several_openmps_it_is_the_one_that_torch_calls(mode: int, tmp_path: Path) -> None:
    """Beside torch's folder there are copies of its OpenMP, as other packages bring them. What torch sets shows in the
    one that it calls alone."""
    torch_folder = Path(torch.__file__).parent
    if not (theirs := sorted((torch_folder / "lib").glob("libgomp*.so*"))):
        pytest.skip("torch has another OpenMP")
    (tmp_path / "torch").symlink_to(torch_folder)
    for name in ("before.libs", "after.libs"):
        (tmp_path / name).mkdir()
        shutil.copy(theirs[0], tmp_path / name / "libgomp.so.1")
    found = subprocess.run(
        [sys.executable, "-c", LOOK, tmp_path, str(mode)], capture_output=True, text=True, check=True
    )
    library, threads = found.stdout.split()
    assert threads == "3", library
