"""Code that runs where memory that was written can't be made executable; and what is done where none can."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest
from http_servers import ServerProcess
from llvmlite import ir
from places import HELPERS
from prepared import Prepared
from restricted import KINDS

from moetier.runtime.kernels.jit.executable import LinkError, can_become_executable, link
from moetier.runtime.kernels.jit.processor import Processor

INT = ir.IntType(32)
linked = pytest.mark.skipif(platform.machine() != "x86_64", reason="objects of this processor are linked by LLVM")

# what a process computes, and what it says of itself
COMPUTE = f"""
import ctypes, json, sys, warnings
from dataclasses import asdict
sys.path.insert(0, {str(HELPERS)!r})
import torch
import moetier, restricted
from moetier.tools.doctor.machine import kernel
kind, directory = sys.argv[1:]
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as said:
    if kind == "any":
        restricted.forbid_any_code()
    elif kind:
        restricted.forbid(kind)
    model, _ = moetier.load(directory, daemon=None)
    with model.tiers, torch.no_grad():
        ids = torch.arange(100, 164)[None]
        loss = float(model(ids, labels=ids).loss)
        last = model.generate(ids[:, :8], do_sample=False, max_new_tokens=4, min_new_tokens=4)[0, 8:].tolist()
    ours = [str(each.message) for each in said if each.category is RuntimeWarning]
(found,) = kernel()
print(json.dumps([loss, last, type(model.tiers.kernels).__name__, ours, asdict(found)]))
"""


def computed(scripts: Prepared, kind: str, directory: Path) -> Any:
    result = scripts.run(COMPUTE, kind, directory)
    if result.returncode and "OSError: [Errno" in result.stderr:
        pytest.skip(f"this machine can't forbid it so: {result.stderr.splitlines()[-1]}")
    assert result.returncode == 0, f"{result.returncode}: {result.stderr}"
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def permitted(scripts: Prepared, tinymix_4bit: Path) -> Any:
    return computed(scripts, "", tinymix_4bit)


@linked
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_computes_where_written_memory_cannot_be_run(
    kind: str, permitted: Any, scripts: Prepared, tinymix_4bit: Path
) -> None:
    """By the same kernels; torch without oneDNN, which it says once."""
    loss, tokens, kernels, warnings, found = computed(scripts, kind, tinymix_4bit)
    assert kernels == permitted[2] == "PackedKernels"
    assert loss == pytest.approx(permitted[0], rel=0.01)
    assert tokens == permitted[1]
    (warning,) = warnings
    assert "torch computes without oneDNN" in warning
    assert not permitted[3]
    assert (found["name"], found["state"]) == ("kernel", "warn")
    assert "without oneDNN" in found["found"]
    assert "MemoryDenyWriteExecute=no" in found["advice"]


def test_a_model_computes_with_torch_where_no_code_can_be_run(
    permitted: Any, scripts: Prepared, tinymix_4bit: Path
) -> None:
    loss, tokens, kernels, warnings, found = computed(scripts, "any", tinymix_4bit)
    assert kernels == "Kernels"
    assert loss == pytest.approx(permitted[0], rel=0.03)
    assert len(tokens) == 4
    about_onednn, warning = sorted(warnings, key=lambda text: "No kernels" in text)
    assert "torch computes without oneDNN" in about_onednn
    assert "No kernels can be compiled here" in warning
    assert "which is slow" in warning
    assert found["state"] == "warn"
    assert "No kernels can be compiled here" in found["found"]
    assert "MemoryDenyWriteExecute=no" in found["advice"]


@linked
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["seccomp", "prctl"])
def test_a_server_answers_there(kind: str, tinymix_4bit: Path, tmp_path: Path) -> None:
    """A new process: its libraries are loaded under the restriction, too."""
    server = ServerProcess(tinymix_4bit, tmp_path, under=[str(HELPERS / "restricted.py"), kind])
    try:
        with server.client() as client:
            (model,) = client.models.list().data
            answer = client.chat.completions.create(
                model=model.id, messages=[{"role": "user", "content": "Don Abbondio"}], max_tokens=8, temperature=0
            )
        assert answer.choices[0].message.content
        assert "without oneDNN" in server.log
        assert server.stop() == 0
    finally:
        server.end()


def module_of(build: Any) -> ir.Module:
    """With a function "tried" of an int, whose body ``build`` writes."""
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(INT, [INT]), "tried")
    build(module, function, ir.IRBuilder(function.append_basic_block()))
    return module


def call(address: int, number: int) -> int:
    return int(ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32)(address)(number))


def mapped(address: int) -> str:
    """The line of this process's maps that an address is in."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(text, 16) for text in line.split()[0].split("-"))
        if start <= address < end:
            return line
    return ""


def looks_up(module: ir.Module, function: ir.Function, builder: ir.IRBuilder) -> None:
    """A table of constants, and a function of its own beside."""
    kind = ir.ArrayType(INT, 16)
    table = ir.GlobalVariable(module, kind, "table")
    table.initializer, table.linkage, table.global_constant = (
        ir.Constant(kind, [n * n for n in range(16)]),
        "internal",
        True,
    )
    other = ir.Function(module, ir.FunctionType(INT, [INT]), "other")
    other.attributes.add("noinline")
    inside = ir.IRBuilder(other.append_basic_block())
    inside.ret(inside.load(inside.gep(table, [INT(0), other.args[0]])))
    builder.ret(builder.add(builder.call(other, function.args), INT(1)))


def calls_the_c_library(module: ir.Module, function: ir.Function, builder: ir.IRBuilder) -> None:
    other = ir.Function(module, ir.FunctionType(INT, []), "getppid")
    builder.ret(builder.add(builder.call(other, []), function.args[0]))


def counts(module: ir.Module, function: ir.Function, builder: ir.IRBuilder) -> None:
    """A variable that each call writes."""
    total = ir.GlobalVariable(module, INT, "total")
    total.initializer, total.linkage = ir.Constant(INT, 0), "internal"
    builder.store(builder.add(builder.load(total), function.args[0]), total)
    builder.ret(builder.load(total))


@linked
def test_constants_and_functions_of_one_object_are_linked() -> None:
    processor = Processor()
    address = processor.compile(module_of(looks_up), "tried")
    assert [call(address, number) for number in (0, 7, 15)] == [1, 50, 226]
    assert "moetier-code" in mapped(address)
    assert mapped(address).split()[1] == "r-xp"


def test_an_object_that_needs_another_is_left_to_llvm() -> None:
    assert can_become_executable(), "the test runs where that is forbidden"
    processor = Processor()
    address = processor.compile(module_of(calls_the_c_library), "tried")
    assert call(address, 7) == os.getppid() + 7
    assert "moetier-code" not in mapped(address)


def test_an_object_with_data_that_is_written_is_left_to_llvm() -> None:
    processor = Processor()
    address = processor.compile(module_of(counts), "tried")
    assert "moetier-code" not in mapped(address)
    assert [call(address, number) for number in (1, 2, 3)] == [1, 3, 6]


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"MZ" + bytes(100), b"\x7fELF\x01\x01" + bytes(100)])
def test_what_is_no_object_is_refused(content: bytes) -> None:
    with pytest.raises(LinkError):
        link(content)


@linked
def test_code_is_unmapped_with_its_processor() -> None:
    processor = Processor()
    address = processor.compile(module_of(looks_up), "tried")
    assert call(address, 2) == 5
    del processor
    gc.collect()
    assert "moetier-code" not in mapped(address)
