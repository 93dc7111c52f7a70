"""Object files that a process has compiled are read by the next one, if nothing has happened to them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import mounted
from prepared import Prepared

from moetier.runtime.kernels.jit.object_cache import KEPT_SECONDS, cached_object

SOURCE, OBJECT = "define i32 @answer()", b"\x7fELF" + bytes(1000)
COMPUTE = """
import sys
from llvmlite import ir
import ctypes
from moetier.runtime.kernels.jit.processor import Processor

optimised, compiled = Processor.optimised, []

def noted(self, *arguments, **options):
    compiled.append(1)
    return optimised(self, *arguments, **options)

Processor.optimised = noted

def answer(processor, number):
    module, i32 = ir.Module(), ir.IntType(32)
    function = ir.Function(module, ir.FunctionType(i32, []), "answer")
    ir.IRBuilder(function.append_basic_block()).ret(ir.Constant(i32, number))
    return ctypes.CFUNCTYPE(ctypes.c_int)(processor.compile(module, "answer"))()

features = sys.argv[2] if len(sys.argv) > 2 else None
print(answer(Processor(features), int(sys.argv[1])), len(compiled))
"""


class Compiler:
    """Counts how often it is asked for the object file."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        return OBJECT


@pytest.fixture
def compiler() -> Compiler:
    return Compiler()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, which does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "moetier" / "kernels"


def test_the_next_process_does_not_compile(scripts: Prepared, folder: Path) -> None:
    def run(*arguments: object) -> list[int]:
        found = scripts.run(COMPUTE, *arguments)
        assert found.returncode == 0, found.stderr
        return [int(word) for word in found.stdout.split()]

    assert [run(42), run(42), run(43), run(42)] == [[42, 1], [42, 0], [43, 1], [42, 0]]
    assert run(42, "+sse4.2") == [42, 1]  # for another processor
    assert len([*folder.iterdir()]) == 3


def test_only_the_user_can_read_and_write_the_cache(compiler: Compiler, folder: Path) -> None:
    cached_object(SOURCE, compiler)
    (file,) = folder.iterdir()
    assert [path.stat().st_mode & 0o777 for path in (folder, file)] == [0o700, 0o600]


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[500] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        _flip,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.chmod(0o620),
        lambda file: file.chmod(0o602),
        lambda file: os.chown(file, 12345, -1),
    ],
    ids=["flipped", "empty", "cut", "of a group", "of all", "of another user"],
)
def test_what_cannot_be_trusted_is_replaced(compiler: Compiler, folder: Path, change: Callable[[Path], object]) -> None:
    assert cached_object(SOURCE, compiler) == cached_object(SOURCE, compiler) == OBJECT
    assert compiler.calls == 1
    (file,) = folder.iterdir()
    try:
        change(file)
    except PermissionError:
        pytest.skip("only root can give a file away")
    assert cached_object(SOURCE, compiler) == cached_object(SOURCE, compiler) == OBJECT
    assert compiler.calls == 2
    assert [*folder.iterdir()] == [file]


def test_code_of_another_source_is_not_taken(compiler: Compiler, folder: Path) -> None:
    cached_object("another", lambda: b"another")
    (another,) = folder.iterdir()
    assert cached_object(SOURCE, compiler) == OBJECT
    (file,) = {*folder.iterdir()} - {another}
    another.replace(file)
    assert cached_object(SOURCE, compiler) == OBJECT


def test_nobody_waits_for_a_pipe(compiler: Compiler, folder: Path) -> None:
    cached_object(SOURCE, compiler)
    (file,) = folder.iterdir()
    file.unlink()
    os.mkfifo(file)
    assert cached_object(SOURCE, compiler) == OBJECT
    assert compiler.calls == 2


def test_without_a_folder_each_process_compiles(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert cached_object(SOURCE, compiler) == cached_object(SOURCE, compiler) == OBJECT
    assert compiler.calls == 2


def test_a_full_disk_leaves_no_part_of_a_file(compiler: Compiler, folder: Path) -> None:
    with mounted("tmpfs", folder, "size=4k"):
        (folder / "other").write_bytes(bytes(4096))
        assert cached_object(SOURCE, compiler) == OBJECT
        assert [file.name for file in folder.iterdir()] == ["other"]


def test_an_error_of_the_compiler_is_not_kept(folder: Path) -> None:
    def fails() -> bytes:
        raise RuntimeError("it does not compile")

    with pytest.raises(RuntimeError, match="it does not compile"):
        cached_object(SOURCE, fails)
    assert not folder.exists()


def test_what_nobody_reads_is_removed(compiler: Compiler, folder: Path) -> None:
    def age(file: Path, seconds: float) -> None:
        os.utime(file, (time.time() - seconds,) * 2)

    cached_object(SOURCE, compiler)
    (read,) = folder.iterdir()
    cached_object("not read", compiler)
    (unread,) = {*folder.iterdir()} - {read}
    for file in (read, unread):
        age(file, KEPT_SECONDS + 60)
    cached_object(SOURCE, compiler)
    assert compiler.calls == 2
    cached_object("new", compiler)
    left = {*folder.iterdir()}
    assert read in left
    assert unread not in left
    assert len(left) == 2
