"""Compiling beside other things that a process does."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from llvmlite import ir
from places import HELPERS
from prepared import Prepared
from readers import PATIENCE
from threads import Task

from moetier.runtime.kernels.jit.emitter import BF16, once
from moetier.runtime.kernels.jit.processor import Processor
from moetier.runtime.kernels.products.gemm import product_kernel
from moetier.runtime.kernels.products.gemm_tile import PackedVariant
from moetier.testing import in_fork
from moetier.tools.convert.api import convert

FORM, OTHER = PackedVariant(4, 64, "bfloat16", BF16), PackedVariant(8, 64, "bfloat16", BF16)


class Slow(Processor):
    """In the midst of something until ``go``."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = threading.Event(), threading.Event()

    def compile(self, module: ir.Module, name: str, *, unroll: bool = True) -> int:
        self.begun.set()
        assert self.go.wait(PATIENCE)
        return super().compile(module, name, unroll=unroll)


def test_a_child_that_is_forked_while_another_thread_compiles_can_compile() -> None:
    """The fork waits: LLVM's own state could not be repaired in the child."""
    slow = Slow()
    task = Task(lambda: product_kernel(slow, FORM))
    assert slow.begun.wait(PATIENCE)
    threading.Timer(0.2, slow.go.set).start()
    found = in_fork(lambda: len({product_kernel(slow, form).address for form in (FORM, OTHER)}))
    assert found == "returned 2"
    assert task.result().address


def test_a_process_that_compiles_may_fork() -> None:
    """As a handler of signals might, or a finalizer."""

    class Forking(Processor):
        def compile(self, module: ir.Module, name: str, *, unroll: bool = True) -> int:
            found.append(in_fork(lambda: "here"))
            return super().compile(module, name, unroll=unroll)

    found: list[str] = []
    assert product_kernel(Forking(), FORM).address
    assert found == ["returned here"]


def test_threads_that_need_the_same_wait_for_one_of_them() -> None:
    """Each would have a processor of its own, which owns the code that it compiles, or compile the same code again."""
    waiting = threading.Barrier(2)

    @once
    def make() -> object:
        with contextlib.suppress(threading.BrokenBarrierError):
            waiting.wait(0.2)
        return object()

    tasks = [Task(make) for _ in range(2)]
    assert tasks[0].result() is tasks[1].result()


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
from moetier.runtime.kernels.jit.team import openmp
address = ctypes.cast(openmp().omp_get_max_threads, ctypes.c_void_p).value
for line in open("/proc/self/maps"):
    start, end = (int(text, 16) for text in line.split()[0].split("-"))
    if start <= address < end:
        library = line.split()[-1]
        print(library, ctypes.CDLL(library).omp_get_max_threads())
"""


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(ctypes.RTLD_LOCAL, id="for itself"),
        pytest.param(ctypes.RTLD_GLOBAL, id="for all libraries", marks=pytest.mark.slow),
    ],
)
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


FORK = f"""
import sys
sys.path.insert(0, {str(HELPERS)!r})
import torch
import moetier
from moetier.testing import in_fork
directory = sys.argv[1]

def layer(model):
    return float(model.model.layers[0].self_attn.q_proj(torch.ones(512, model.config.hidden_size)).sum())

def tokens(model, length=128):
    ids = torch.arange(length)[None] + 100
    return model.generate(ids, do_sample=False, max_new_tokens=2, min_new_tokens=2)[0, -2:].tolist()

def own():
    model, _ = moetier.load(directory, daemon=None)
    with model.tiers:
        return tokens(model), torch.get_num_threads()

torch.set_num_threads(2)
print(in_fork(own))  # before this process has computed
with torch.no_grad():
    model, _ = moetier.load(directory, daemon=None)
    with model.tiers:
        print(in_fork(lambda: tokens(model)))  # before it has computed with this model
        expected = tokens(model), 2
        for length in (128, 1):
            print(in_fork(lambda: tokens(model, length)))
        print(in_fork(lambda: layer(model) == 0), layer(model) == 0)
        print(in_fork(own))
        assert (tokens(model), 2) == expected
print(f"returned {{expected}}")
"""


@pytest.fixture(scope="module")
def tinymix_8bit_trunk(tinymix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tinymix") / "8bit"
    convert(tinymix, folder, bits=4, trunk_bits=8, fast=True)
    return folder


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one CPU")
def test_a_child_of_a_process_that_computed_is_told_or_computes(scripts: Prepared, tinymix_8bit_trunk: Path) -> None:
    """In two threads. A child computes with the trunk and with a model that it opened; of the experts of its parent's
    model it is told that they are another process's."""
    result = scripts.run(FORK, tinymix_8bit_trunk)
    assert result.returncode == 0, result.stderr
    before, loaded, long, short, trunk, own, expected = result.stdout.splitlines()
    assert before == own == expected
    for said in (loaded, long, short):
        assert said.startswith("ClosedError: "), said
        assert "another process's tier" in said
    assert trunk == "returned False False"
