"""Who uses a folder: processes that have files of it open or mapped, and no others."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from moetier.tools.convert.model_files import disk_bytes, users_of

HOLDS = """
import ctypes, mmap, os, sys
descriptor = os.open(sys.argv[2], os.O_RDONLY)
if sys.argv[1] == "mapped":  # without the descriptor that an object of Python's mmap keeps
    ctypes.CDLL(None).mmap(None, 1, mmap.PROT_READ, mmap.MAP_PRIVATE, descriptor, 0)
    os.close(descriptor)
print(flush=True)
sys.stdin.read()
"""


@contextmanager
def user(how: str, file: Path) -> Iterator[int]:
    """A process that has it "open", or no more than "mapped"."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"1")
    command = [sys.executable, "-c", HOLDS, how, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.communicate()


@pytest.mark.parametrize("how", ["open", "mapped"])
@pytest.mark.parametrize(
    "name", ["model", "a name", "two\nlines", "b\u2028r", b"m\xff".decode(errors="surrogateescape")]
)
def test_a_process_that_has_a_file_of_it(tmp_path: Path, how: str, name: str) -> None:
    with user(how, tmp_path / name / "file") as pid:
        assert list(users_of(tmp_path / name)) == [pid]
        assert users_of(tmp_path / name / "deeper") == users_of(tmp_path / name[:-1]) == {}


@pytest.mark.parametrize("how", ["open", "mapped"])
def test_a_path_that_has_the_folders_in_it_is_another(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with user(how, tmp_path / "backup" / folder.relative_to("/") / "file"):
        assert users_of(folder) == {}


def test_what_it_takes_is_reported_while_files_come_and_go(tmp_path: Path) -> None:
    (tmp_path / "stays").write_bytes(b"1" * 5000)
    ended = threading.Event()

    def convert() -> None:
        while not ended.is_set():
            for number in range(100):
                (tmp_path / f"{number}.partial").touch()
            for number in range(100):
                (tmp_path / f"{number}.partial").rename(tmp_path / str(number))
            for number in range(100):
                (tmp_path / str(number)).unlink()

    with ThreadPoolExecutor(1) as pool:
        converting = pool.submit(convert)
        try:
            for _ in range(100):
                assert disk_bytes(tmp_path) == 8192
        finally:
            ended.set()
        converting.result()
