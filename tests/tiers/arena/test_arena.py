from __future__ import annotations

import errno
import fcntl
import gc
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from threads import Task, joins, wait_until

from moetier.tiers.arena import arena as arena_module
from moetier.tiers.arena.arena import SEALS, Arena
from moetier.tiers.arena.layout import ArenaLayout, Region
from moetier.tiers.errors import ArenaError, BudgetError, ClosedError
from moetier.tiers.layout import PAGE_BYTES


def layout_of(slots: int, pages: int = 1) -> ArenaLayout:
    return ArenaLayout("ab" * 32, (slots,), (Region("records", slots, pages * PAGE_BYTES),))


def arena_maps() -> int:
    return Path("/proc/self/maps").read_text().count("/memfd:moetier-arena")


def in_child(code: str, *arguments: int, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        pass_fds=arguments,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,  # type: ignore[call-overload]
    )


def test_slots_are_apart_and_begin_on_pages() -> None:
    arena = Arena.create(layout_of(3, 2))
    for index in range(3):
        slot = arena.slot(index)
        assert len(slot) == 2 * PAGE_BYTES
        assert np.frombuffer(slot, np.uint8).ctypes.data % PAGE_BYTES == 0
        slot[:] = bytes([index + 1]) * len(slot)
    for index in range(3):
        assert bytes(arena.view(index)[:100]) == bytes([index + 1]) * 100
        assert bytes(arena.slot(index)) == bytes([index + 1]) * 2 * PAGE_BYTES
    del slot
    arena.close()


def test_a_view_is_read_only_and_shows_what_is_written_later() -> None:
    arena = Arena.create(layout_of(1))
    view = arena.view(0)[:10]
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 1
    arena.slot(0)[:3] = b"abc"
    assert bytes(view[:3]) == b"abc"
    del view
    arena.close()


def test_the_memory_file_is_private_sealed_and_not_under_dev_shm() -> None:
    arena = Arena.create(layout_of(2))
    descriptor = arena.export()
    status = os.fstat(descriptor)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == 3 * PAGE_BYTES
    assert status.st_blocks * 512 == 3 * PAGE_BYTES, "allocated, not sparse"
    assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) == SEALS
    assert not os.get_inheritable(descriptor)
    assert str(Path(f"/proc/self/fd/{descriptor}").readlink()) == "/memfd:moetier-arena (deleted)"
    os.close(descriptor)
    arena.close()


def test_an_arena_without_memory_for_its_directory_leaves_no_file_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise MemoryError

    def files() -> list[Path]:
        links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return [link for link in links if str(link).startswith("/memfd:moetier-arena")]

    before = files()
    monkeypatch.setattr(arena_module.Directory, "create", refuse)
    with pytest.raises(MemoryError):
        Arena.create(layout_of(2))
    gc.collect()
    assert files() == before


def test_another_process_reads_and_can_do_nothing_else() -> None:
    arena = Arena.create(layout_of(2))
    arena.slot(1)[:6] = b"expert"
    descriptor = arena.export()
    child = in_child(
        f"""
        import errno, mmap, os, sys
        from moetier.tiers.arena.arena import Arena
        from moetier.tiers.arena.layout import ArenaLayout, Region
        descriptor = int(sys.argv[1])
        arena = Arena.map(descriptor, ArenaLayout("ab" * 32, (2,), (Region("records", 2, {PAGE_BYTES}),)))
        print(bytes(arena.view(1)[:6]).decode())
        print(arena.view(1)[:6].readonly)
        again = os.open(f"/proc/self/fd/{{descriptor}}", os.O_RDWR)  # the same user may: a restarted owner has to
        for attempt in (
            lambda: mmap.mmap(descriptor, {2 * PAGE_BYTES}, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
            lambda: os.pwrite(descriptor, b"x", 0),
            lambda: os.ftruncate(descriptor, 0),
            lambda: os.ftruncate(again, 0),
            lambda: os.ftruncate(again, {4 * PAGE_BYTES}),
        ):
            try:
                attempt()
                print("allowed")
            except OSError as error:
                print(errno.errorcode[error.errno])
        os.close(again)
        arena.close()
        print("memfd:moetier-arena" in open("/proc/self/maps").read())
        """,
        descriptor,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == ["expert", "True", "EACCES", "EBADF", "EINVAL", "EPERM", "EPERM", "False"]
    assert bytes(arena.view(1)[:6]) == b"expert"
    os.close(descriptor)
    arena.close()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_cannot_open_it_for_writing() -> None:
    arena = Arena.create(layout_of(1))
    descriptor = arena.export()
    child = in_child(
        """
        import os, sys
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        try:
            os.open(f"/proc/self/fd/{sys.argv[1]}", os.O_RDWR)
        except PermissionError:
            print("refused")
        """,
        descriptor,
    )
    assert child.stdout.split() == ["refused"], child.stderr
    os.close(descriptor)
    arena.close()


def test_what_could_shrink_under_the_reader_is_not_mapped(tmp_path: Path) -> None:
    def refused(descriptor: int, slots: int = 1) -> str:
        try:
            with pytest.raises(ArenaError) as caught:
                Arena.map(descriptor, layout_of(slots))
            return caught.value.cause
        finally:
            os.close(descriptor)

    file = tmp_path / "file"
    file.write_bytes(bytes(2 * PAGE_BYTES))
    assert "not refer to a memory file" in refused(os.open(file, os.O_RDONLY))

    arena = Arena.create(layout_of(1))
    content = os.pread(descriptor := arena.export(), 2 * PAGE_BYTES, 0)
    os.close(descriptor)

    def memory_file(seals: int, content: bytes = content) -> int:
        made = os.memfd_create("odd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.write(made, content)
        fcntl.fcntl(made, fcntl.F_ADD_SEALS, seals)
        return made

    assert "not sealed" in refused(memory_file(0))
    assert "not sealed" in refused(memory_file(fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL))
    assert "fewer than its header" in refused(memory_file(SEALS, content[:100]))
    assert "does not begin with the magic" in refused(memory_file(SEALS, bytes(2 * PAGE_BYTES)))
    assert "has version 2" in refused(memory_file(SEALS, content[:8] + b"\2" + content[9:]))
    assert "4,096 bytes; its header says 8,192" in refused(memory_file(SEALS, content[:PAGE_BYTES]))
    assert "not the one" in refused(arena.export(), slots=2)
    arena.close()


def test_only_the_owner_fills_and_exports() -> None:
    arena = Arena.create(layout_of(1))
    descriptor = arena.export()
    reader = Arena.map(descriptor, layout_of(1))
    os.close(descriptor)
    with pytest.raises(TypeError, match="read-only"):
        reader.slot(0)[:2] = b"no"
    with pytest.raises(AssertionError):
        reader.export()
    arena.slot(0)[:2] = b"ok"
    assert bytes(reader.view(0)[:2]) == b"ok", "the map outlives the descriptor"
    reader.close()
    arena.close()


def test_no_memory_is_a_budget_error() -> None:
    """fallocate really fails: with EFBIG, by the process's limit on file sizes."""
    child = in_child(
        f"""
        import os, resource
        from moetier.tiers.arena.arena import Arena
        from moetier.tiers.errors import BudgetError
        from moetier.tiers.arena.layout import ArenaLayout, Region
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        before = os.listdir("/proc/self/fd")
        try:
            Arena.create(ArenaLayout("", (1024,), (Region("records", 1024, {PAGE_BYTES}),)))
        except BudgetError as error:
            print(error.cause)
            print(error.fix)
        assert os.listdir("/proc/self/fd") == before
        """,
    )
    assert "can't allocate 4,222,976 bytes of shared memory (EFBIG)" in child.stdout, child.stderr
    assert "less memory" in child.stdout


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("code", ["ENOSPC", "ENOMEM"])
def test_a_full_memory_is_a_budget_error(code: str) -> None:
    program = (
        "from moetier.tiers.arena.arena import Arena; from moetier.tiers.arena.layout import ArenaLayout, Region; "
        f"Arena.create(ArenaLayout('', (4,), (Region('records', 4, {PAGE_BYTES}),)))"
    )
    injected = subprocess.run(
        ["strace", "-qq", "-o", "/dev/null", "-e", f"inject=fallocate:error={code}", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "ptrace" in injected.stderr and "Operation not permitted" in injected.stderr:
        pytest.skip("strace may not trace here")
    said = f"{BudgetError.__name__}: The system can't allocate 20,480 bytes of shared memory ({code})"
    assert said in injected.stderr


@pytest.fixture
def slow_pages(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Pages are allocated one by one; in the background only once the event is set."""
    allocate, goes_on = os.posix_fallocate, threading.Event()

    def wait_and_allocate(descriptor: int, offset: int, length: int) -> None:
        if threading.current_thread().name == "moetier-arena":
            goes_on.wait()
        allocate(descriptor, offset, length)

    monkeypatch.setattr(arena_module, "FIRST_BYTES", PAGE_BYTES)
    monkeypatch.setattr(arena_module, "ALLOCATION_BYTES", PAGE_BYTES)
    monkeypatch.setattr(os, "posix_fallocate", wait_and_allocate)
    return goes_on


def pages_of(arena: Arena) -> int:
    descriptor = arena.export()
    try:
        return os.fstat(descriptor).st_blocks * 512 // PAGE_BYTES
    finally:
        os.close(descriptor)


def test_pages_are_allocated_in_the_background_and_those_of_a_slot_before_it_is_used(
    slow_pages: threading.Event,
) -> None:
    arena = Arena.create(layout_of(4, 3))
    assert pages_of(arena) == 1, "the directory's"
    arena.allocate(2)
    assert pages_of(arena) == 4
    slow_pages.set()
    wait_until(lambda: pages_of(arena) == 13)
    arena.allocate(3)
    arena.close()


def test_closing_ends_the_allocation(slow_pages: threading.Event) -> None:
    arena = Arena.create(layout_of(100))
    descriptor = arena.export()
    closing = Task(arena.close)
    wait_until(lambda: joins(closing.thread))
    slow_pages.set()
    closing.result()
    assert os.fstat(descriptor).st_blocks * 512 < 100 * PAGE_BYTES
    os.close(descriptor)


def test_a_slot_whose_pages_cannot_be_had_is_a_budget_error(
    slow_pages: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = Arena.create(layout_of(4))

    def refuse(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    slow_pages.set()  # the background ends, and says nothing
    with pytest.raises(BudgetError, match=r"can't allocate 20,480 bytes of shared memory \(ENOSPC\)"):
        arena.allocate(3)
    arena.close()


def test_without_a_thread_slots_are_allocated_when_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(arena_module, "FIRST_BYTES", PAGE_BYTES)
    monkeypatch.setattr(threading.Thread, "start", start)
    arena = Arena.create(layout_of(4))
    arena.allocate(3)
    assert pages_of(arena) == 2
    arena.close()


def test_close_leaves_nothing() -> None:
    before = arena_maps()
    arena = Arena.create(layout_of(4))
    assert arena_maps() == before + 1
    arena.close()
    assert arena_maps() == before
    arena.close()
    with pytest.raises(ClosedError):
        arena.slot(0)
    with pytest.raises(ClosedError):
        arena.view(0)[:1]


@pytest.mark.parametrize("kind", ["memoryview", "numpy", "torch"])
def test_a_view_outlives_close_and_takes_the_map_with_it(kind: str) -> None:
    before = arena_maps()
    arena = Arena.create(layout_of(1))
    arena.slot(0)[:4] = b"held"
    view = arena.view(0)[:4]
    held: object
    match kind:
        case "memoryview":
            held = view
        case "numpy":
            held = np.frombuffer(view, np.uint8)
        case "torch":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says, once a process, that the buffer is not writable
                held = torch.frombuffer(view, dtype=torch.uint8)
    del view
    arena.close()
    assert arena_maps() == before + 1
    assert bytes(held.numpy() if isinstance(held, torch.Tensor) else held) == b"held"  # type: ignore[arg-type]
    del held
    assert arena_maps() == before


def test_the_map_is_shared_not_private() -> None:
    arena = Arena.create(layout_of(1))
    descriptor = arena.export()
    reader = Arena.map(descriptor, layout_of(1))
    view = reader.view(0)[:1]
    assert bytes(view) == b"\0", "the page is mapped before it is written"
    arena.slot(0)[:1] = b"1"
    assert bytes(view) == b"1"
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:moetier-arena" in line]
    assert sorted(line.split()[1] for line in lines) == ["r--s", "rw-s"]
    del view
    os.close(descriptor)
    reader.close()
    arena.close()
