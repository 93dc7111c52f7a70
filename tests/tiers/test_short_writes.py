"""Short writes, caused by real limits: the file is whole, or an error is raised."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from faults import only, strace
from places import HELPERS, ROOT
from prepared import Prepared
from safetensors.numpy import load_file

BEGIN = f"""
import errno, mmap, resource, signal, sys
from pathlib import Path
sys.path.insert(0, {str(HELPERS)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])

def files_end_at(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
"""

# One write crosses the limit, so that the kernel takes a part of it; before the next file or piece the limit is gone.
TRUNK = (
    BEGIN
    + """
import numpy as np
from safetensors.numpy import save_file
from moetier.runtime.formats.tensors import CHUNK_BYTES, read_tensors
from moetier.tools.convert.trunk_writer import distribute_trunk

save_file({"a": np.arange(3 * CHUNK_BYTES // 4, dtype=np.float32).reshape(3, -1)}, folder / "source.safetensors")
(file,) = distribute_trunk(read_tensors(folder / "source.safetensors"))
written = 0

def advance(count):
    global written
    written += count
    files_end_at(written + 5000 if written == len(file.header) + CHUNK_BYTES else resource.RLIM_INFINITY)

try:
    file.write(folder, advance)
except OSError as error:
    files_end_at(resource.RLIM_INFINITY)
    assert error.errno == errno.EFBIG, error
    assert not file.is_complete(folder)
    file.write(folder, lambda count: None)
print(file.name)
"""
)

RECORDS = (
    BEGIN
    + """
from stores import make_plan, make_records
from moetier.tiers.errors import TargetError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.store.writer import StoreWriter

plan = make_plan(blocks=1)
records = make_records(plan)
for limit in (20_000, None):
    with StoreWriter.open(folder / "experts.zarr", plan) as writer:
        try:
            with writer.block(0) as shard:
                for expert in range(4):
                    files_end_at(limit if limit and expert == 1 else resource.RLIM_INFINITY)
                    shard.write(records[ExpertKey(0, expert)])
        except TargetError as error:
            assert limit, error
            files_end_at(resource.RLIM_INFINITY)
            assert not writer.finished_blocks
        else:
            assert not limit
            writer.finish()
with ShardStore.open(folder) as store:
    for key in records:
        view = memoryview(mmap.mmap(-1, store.layout(0).slot_bytes))
        store.read_into(key, view)
        assert bytes(view[:-4]) == records[key]
"""
)

SMALL = (
    BEGIN
    + """
from moetier.tiers.store.atomic import write_durably
path = folder / "small"
write_durably(path, b"before")
files_end_at(100_000)
try:
    write_durably(path, bytes(150_000))
except OSError as error:
    assert error.errno == errno.EFBIG, error
else:
    raise AssertionError
assert path.read_bytes() == b"before"
"""
)


def run(scripts: Prepared, script: str, folder: Path) -> str:
    ended = scripts.run(script, folder)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_a_file_of_the_trunk(tmp_path: Path, scripts: Prepared) -> None:
    name = run(scripts, TRUNK, tmp_path)
    found, wanted = (load_file(tmp_path / each)["a"] for each in (name, "source.safetensors"))
    assert (found == wanted).all()


@pytest.mark.parametrize("script", [RECORDS, SMALL], ids=["records", "small"])
def test_other_files(tmp_path: Path, script: str, scripts: Prepared) -> None:
    run(scripts, script, tmp_path)


NOTHING = """
import sys
from moetier.tiers.store.atomic import write_all
with open(sys.argv[1], "wb") as stream:
    try:
        write_all(stream.fileno(), bytes(100), 0)
    except OSError as error:
        print(error.strerror)
"""


def test_a_write_that_takes_nothing_again_and_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    ended = strace([*only("pwrite64"), "-P", str(path), "-e", "inject=pwrite64:retval=0"], NOTHING, path)
    assert ended.stdout == "nothing was written\n", ended.stderr


def test_only_one_function_calls_the_system_s_write() -> None:
    """All other code uses buffered files, which continue after a short write, or writes a few bytes to a pipe."""
    found = set()
    for path in [path for package in ("tiers", "runtime", "tools") for path in (ROOT / package).glob("**/*.py")]:
        unbuffered = "buffering=0" in path.read_text()
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            of_os = isinstance(node.func.value, ast.Name) and node.func.value.id == "os"
            if (of_os and node.func.attr in ("write", "pwrite", "writev", "pwritev", "sendfile")) or (
                unbuffered and node.func.attr == "write" and ast.unparse(node.func.value) == "stream"
            ):
                found.add(f"{path.parent.name}/{path.stem}")
    assert found == {"store/atomic", "daemon/process"}
