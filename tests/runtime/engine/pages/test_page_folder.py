"""The folder of pages, against a dictionary: random writes, reads, faults, restarts and jumps of the clock."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import flip_bit, mounted, remounted
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from users import NOBODY, as_nobody, need_root

from moetier.runtime.engine.pages import page_folder
from moetier.runtime.engine.pages.page_file import ALIGNMENT, Payload, head_bytes
from moetier.runtime.engine.pages.page_folder import PageFolder, PageOptions, clear, entries, models_in, open_folder
from moetier.tiers.errors import ConfigError
from moetier.tiers.store.atomic import PARTIAL

LAYOUT = ["x"]
BINDING, DAY = b"b" * 32, 86_400
FILE = 2 * ALIGNMENT  # bytes of a file with up to ALIGNMENT bytes of data


_open = weakref.WeakSet[PageFolder]()


@pytest.fixture(autouse=True)
def closes_folders() -> Iterator[None]:
    yield
    for folder in _open:
        folder.close()


def opened(place: Path, size: int = 1 << 30, seconds: float = 7 * DAY, **more: object) -> PageFolder:
    folder = PageFolder(PageOptions(place, size, seconds), **{"model": "model", "binding": BINDING} | more)  # type: ignore[arg-type]
    _open.add(folder)
    return folder


def write(folder: PageFolder, name: bytes, data: bytes, *before_piece: Callable[[int], None]) -> int:
    begin = head_bytes(LAYOUT)
    memory = folder.memory(begin + len(data))
    memory[begin : begin + len(data)] = data
    try:
        payload = Payload(LAYOUT, memoryview(memory)[begin : begin + len(data)])
        return folder.write(name, 0, payload, memory, *before_piece)
    finally:
        folder.release(memory)


def read(folder: PageFolder, name: bytes, depth: int = 0) -> bytes | None:
    if (page := folder.read(name, depth)) is None:
        return None
    payload, memory = page
    data = bytes(payload.data)
    folder.release(memory)
    return data


def name(number: int) -> bytes:
    return PageFolder.follow(b"", [number])


class Pages(RuleBasedStateMachine):
    """Two processes with one folder of five files. ``data`` has all that was ever written, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp())
        self.now = time.time_ns()
        self.data: dict[bytes, bytes] = {}
        self.folders = [self.open(), self.open()]

    def open(self) -> PageFolder:
        return opened(self.place / "pages", 5 * FILE, DAY, clock=lambda: self.now)

    @rule(number=st.integers(0, 9), which=st.integers(0, 1), size=st.integers(0, ALIGNMENT))
    def write(self, number: int, which: int, size: int) -> None:
        self.now += 10**9
        data = self.data.setdefault(name(number), os.urandom(size))
        write(self.folders[which], name(number), data)
        assert read(self.folders[which], name(number)) == data

    @rule(number=st.integers(0, 9), which=st.integers(0, 1))
    def read(self, number: int, which: int) -> None:
        assert read(self.folders[which], name(number)) in (None, self.data.get(name(number)))

    @precondition(lambda self: self.files())
    @rule(number=st.integers(0, 9), place=st.integers(0, FILE - 1))
    def damage(self, number: int, place: int) -> None:
        path = self.files()[number % len(self.files())]
        if size := path.stat().st_size:
            flip_bit(path, place % size)

    @precondition(lambda self: self.files())
    @rule(number=st.integers(0, 9), size=st.integers(0, FILE))
    def cut(self, number: int, size: int) -> None:
        os.truncate(self.files()[number % len(self.files())], size)

    @precondition(lambda self: self.files())
    @rule(number=st.integers(0, 9), other=st.integers(0, 9))
    def rename(self, number: int, other: int) -> None:
        path = self.files()[number % len(self.files())]
        path.rename(path.with_name(f"{name(other).hex()}.page"))

    @rule(which=st.integers(0, 1))
    def restart(self, which: int) -> None:
        self.folders[which] = self.open()

    @rule(seconds=st.sampled_from([-10 * DAY, -1, 1, 3600, DAY + 1]))
    def wait(self, seconds: int) -> None:
        self.now += 10**9 * seconds

    @rule()
    def clear(self) -> None:
        clear(self.place / "pages")

    def files(self) -> list[Path]:
        return sorted(Path(entry.path) for entry in entries(self.place / "pages"))

    @invariant()
    def both_together_keep_to_the_size(self) -> None:
        """Each counts anew after a sixteenth of it at the latest: here after each file."""
        assert sum(path.stat().st_size for path in self.files()) <= 5 * FILE

    def teardown(self) -> None:
        shutil.rmtree(self.place)


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def test_a_name_depends_on_all_before_it(tmp_path: Path) -> None:
    folder, other = opened(tmp_path / "a"), opened(tmp_path / "b", binding=b"c" * 32)
    root = folder.root(b"key")
    names = {
        root,
        folder.root(b"other key"),
        other.root(b"key"),
        folder.follow(root, [1, 2]),
        folder.follow(root, [2, 1]),
        folder.follow(folder.follow(root, [1]), [2]),
    }
    assert len(names) == 6
    assert folder.root(b"key") == root


def test_files_of_another_key_or_model_are_not_found(tmp_path: Path) -> None:
    folder, other = opened(tmp_path), opened(tmp_path, binding=b"c" * 32)
    page = folder.follow(folder.root(b"key"), [1])
    write(folder, page, b"data")
    assert not folder.has(folder.follow(folder.root(b"other"), [1]))
    assert not other.has(page)
    assert folder.has(page)


def test_the_least_recently_used_are_removed_first(tmp_path: Path) -> None:
    now = time.time_ns()
    folder = opened(tmp_path, 4 * FILE, clock=lambda: now)
    for number in range(4):
        write(folder, name(number), b"data")
        now += 10**9
    assert read(folder, name(0)) == b"data"
    now += 10**9
    write(folder, name(4), b"data")
    assert [folder.has(name(number)) for number in range(5)] == [True, False, False, True, True]


def test_of_pages_used_together_the_last_is_removed_first(tmp_path: Path) -> None:
    now = time.time_ns()
    folder = opened(tmp_path, 4 * FILE, clock=lambda: now)
    for number in range(5):
        write(folder, name(number), b"data")
        if number < 4:
            for depth in range(number + 1):
                folder.touch(name(depth), depth)
    assert [folder.has(name(number)) for number in range(4)] == [True, True, False, False]


def test_what_is_too_old_is_neither_used_nor_kept(tmp_path: Path) -> None:
    now = time.time_ns()
    folder = opened(tmp_path, seconds=DAY, clock=lambda: now)
    write(folder, name(0), b"data")
    write(folder, name(1), b"data")
    now += 10**9 * (DAY - 100)
    assert read(folder, name(1)) == b"data"
    now += 10**9 * 200
    assert read(folder, name(0)) is None
    folder.sweep()
    assert [folder.has(name(number)) for number in (0, 1)] == [False, True]


@pytest.mark.parametrize("years", [-30, 30])
def test_a_clock_that_jumps_does_no_harm(tmp_path: Path, years: int) -> None:
    """A file of the future counts as used now: it does not stay for ever."""
    now = time.time_ns()
    folder = opened(tmp_path, 2 * FILE, clock=lambda: now)
    write(folder, name(0), b"data")
    now += 365 * DAY * 10**9 * years
    assert read(opened(tmp_path, clock=lambda: now), name(0)) in (None, b"data")
    folder.sweep()
    now += 10**9
    for number in range(1, 4):
        write(folder, name(number), b"data")
        now += 10**9
    assert not folder.has(name(0))
    assert read(folder, name(3)) == b"data"


def test_unfinished_files_are_removed_but_not_those_of_a_process_that_writes(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    write(folder, name(0), b"data")
    place = Path(next(entries(tmp_path)).path).parent
    unfinished = [f"{name(1).hex()}.page.0123456{number}{PARTIAL}" for number in range(3)]
    for file, age in zip(unfinished, (0, 100, -1000), strict=True):
        path = place / file
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age, time.time() - age))
    folder.sweep()
    assert {Path(entry.path).name for entry in entries(tmp_path)} == {unfinished[0], f"{name(0).hex()}.page"}


@pytest.mark.parametrize("files", [4_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_start_with_many_unfinished_files_is_quick(tmp_path: Path, files: int) -> None:
    """Half are under the names of pages."""
    folder = opened(tmp_path)
    write(folder, name(0), b"data")
    place = Path(next(entries(tmp_path)).path).parent
    for number in range(files // 2):
        page = f"{name(number + 1).hex()}.page"
        for file in (page, f"{page}.01234567{PARTIAL}"):
            os.close(os.open(place / file, os.O_CREAT | os.O_WRONLY))
    begin = time.process_time()
    folder = opened(tmp_path)
    assert read(folder, name(0)) == b"data"
    assert all(read(folder, name(number)) is None for number in range(1, 100))
    assert time.process_time() - begin < 2
    assert folder.damaged == 99
    assert folder.has(name(200))
    begin = time.process_time()
    folder.sweep()  # in the background
    assert time.process_time() - begin < 20


def test_files_of_other_programs_stay(tmp_path: Path) -> None:
    """The folder may be someone's home."""
    folder, page = opened(tmp_path), f"{name(0).hex()}.page"
    write(folder, name(1), b"data")
    place = Path(next(entries(tmp_path)).path).parent
    others = [tmp_path / "documents" / page, tmp_path / page, place / "my.page", place / f"big.iso{PARTIAL}"]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("of another program")
        os.utime(path, (0, 0))
    folder.sweep()
    assert clear(tmp_path) == (1, FILE)
    assert all(path.exists() for path in others)


def test_what_cannot_be_read_is_removed_and_written_again(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    write(folder, name(0), b"data")
    path = Path(next(entries(tmp_path)).path)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert read(folder, name(0)) is None
    assert not folder.has(name(0))
    assert (tmp_path / "elsewhere").exists()
    write(folder, name(0), b"data")
    assert read(folder, name(0)) == b"data"


def test_a_pipe_in_place_of_a_file_stops_no_reader(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    write(folder, name(0), b"data")
    path = Path(next(entries(tmp_path)).path)
    path.unlink()
    os.mkfifo(path)
    assert read(folder, name(0)) is None
    assert not folder.has(name(0))


def test_a_name_that_is_lost_is_written_again(tmp_path: Path) -> None:
    """`moetier cache clear` removes it while a server writes its next page."""
    folder = opened(tmp_path)
    write(folder, name(0), b"data")
    (Path(next(entries(tmp_path)).path).parent / page_folder.MODEL).unlink()
    write(folder, name(1), b"data")
    assert [model.name for model in models_in(tmp_path)] == ["model"]


def test_a_model_that_was_renamed_is_listed_by_its_present_name(tmp_path: Path) -> None:
    write(opened(tmp_path), name(0), b"data")
    write(opened(tmp_path, model="new"), name(1), b"data")
    assert [model.name for model in models_in(tmp_path)] == ["new"]


def test_a_model_folder_of_another_user_hinders_no_other_one(tmp_path: Path) -> None:
    write(opened(tmp_path), name(0), b"data")
    write(opened(tmp_path, binding=b"c" * 32), name(1), b"data")
    os.chown(tmp_path, NOBODY, NOBODY)
    os.chown(Path(next(entries(tmp_path)).path).parent, NOBODY, NOBODY)
    descriptor = os.open(tmp_path, os.O_RDONLY)  # it is below folders of root
    try:
        assert as_nobody(lambda: sum(1 for _ in entries(Path(f"/proc/self/fd/{descriptor}")))) == "returned 1"
    finally:
        os.close(descriptor)


def test_too_many_open_files_remove_no_page(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    write(folder, name(0), b"data")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        assert read(folder, name(0)) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert read(folder, name(0)) == b"data"


def test_a_file_of_another_user_is_not_used(tmp_path: Path) -> None:
    need_root()
    folder = opened(tmp_path)
    write(folder, name(0), b"data")
    os.chown(next(entries(tmp_path)).path, NOBODY, NOBODY)
    assert read(folder, name(0)) is None
    assert not folder.has(name(0))


def test_a_file_waits_for_its_turn_before_it_is_made(tmp_path: Path) -> None:
    """Or another process would remove it, as of one that has ended."""
    folder = opened(tmp_path)
    later = opened(tmp_path, clock=lambda: time.time_ns() + 100 * 10**9)
    assert write(folder, name(0), b"data", lambda _: later.sweep())
    assert read(folder, name(0)) == b"data"


def test_a_page_that_another_process_removes_while_it_is_written_is_lost(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    write(folder, name(0), b"data")
    assert not write(folder, name(1), b"data", lambda _: shutil.rmtree(Path(next(entries(tmp_path)).path).parent))
    assert write(folder, name(1), b"data")
    assert read(folder, name(1)) == b"data"


def test_a_damaged_file_is_removed_and_written_again(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    write(folder, name(0), b"data")
    flip_bit(Path(next(entries(tmp_path)).path), ALIGNMENT)
    assert read(folder, name(0)) is None
    assert not folder.has(name(0))
    assert folder.damaged == 1
    write(folder, name(0), b"data")
    assert read(folder, name(0)) == b"data"


def test_a_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    folder = opened(tmp_path / "a" / "b")
    write(folder, name(0), b"data")
    for place in (tmp_path / "a" / "b", Path(next(entries(tmp_path / "a" / "b")).path).parent):
        assert place.stat().st_mode & 0o777 == 0o700
        assert all(file.stat().st_mode & 0o777 == 0o600 for file in place.iterdir() if file.is_file())


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o770])
def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages").chmod(mode)
    with pytest.raises(ConfigError, match="open to other users"):
        open_folder(tmp_path / "pages")


@pytest.mark.parametrize("mode", [0o777, 0o2777, 0o1777])
def test_a_folder_in_one_that_others_may_write_is_made_for_this_user_alone(tmp_path: Path, mode: int) -> None:
    """An emptyDir of Kubernetes is such a folder. Another user may move the folder away: it is used nevertheless."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(mode)
    place = tmp_path / "shared" / "pages"
    folder = opened(place)
    assert place.stat().st_mode & 0o777 == 0o700
    write(folder, name(0), b"data")
    place.rename(tmp_path / "shared" / "moved")
    place.symlink_to(tmp_path)
    write(folder, name(1), b"more")
    assert read(folder, name(0)) == b"data"
    assert sum(1 for _ in entries(tmp_path / "shared" / "moved")) == 2
    assert not [*entries(tmp_path)]


def test_a_folder_of_root_that_all_may_write_is_refused_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an emptyDir itself is, in a container of another user."""
    need_root()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o2777)
    monkeypatch.setattr(os, "getuid", lambda: NOBODY)
    with pytest.raises(ConfigError, match="belongs to another user") as error:
        os.close(open_folder(tmp_path / "cache"))
    assert f"{tmp_path}/cache/pages" in error.value.fix


def test_a_folder_that_is_removed_is_made_again(tmp_path: Path) -> None:
    folder = opened(tmp_path / "pages")
    write(folder, name(0), b"data")
    shutil.rmtree(tmp_path / "pages")
    assert read(folder, name(0)) is None
    folder.sweep()
    write(folder, name(0), b"data")
    assert sum(1 for _ in entries(tmp_path / "pages")) == 1


def test_a_folder_that_cannot_be_made_again_is_no_other_one(tmp_path: Path) -> None:
    folder, place, other = opened(tmp_path / "pages"), tmp_path / "pages", tmp_path / "other"
    write(folder, name(0), b"data")
    shutil.rmtree(place)
    place.touch()
    other.mkdir()
    descriptors = list[int]()
    try:
        for _ in range(3):
            with pytest.raises(ConfigError, match="is not a folder"):
                write(folder, name(0), b"data")
            descriptors.append(os.open(other, os.O_RDONLY))  # gets the number of one that was closed
            assert not folder.has(name(0))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    assert not [*other.iterdir()]
    place.unlink()
    write(folder, name(0), b"data")
    assert read(folder, name(0)) == b"data"


def test_a_file_that_is_too_large_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is no fault of the disk: others are kept."""
    folder = opened(tmp_path, 3 * FILE)
    assert write(folder, name(0), bytes(3 * FILE)) == 0
    assert write(folder, name(1), bytes(ALIGNMENT)) == FILE
    monkeypatch.setattr(page_folder, "MAX_BYTES", FILE)
    assert write(folder, name(2), bytes(ALIGNMENT + 1)) == 0
    assert [folder.has(name(number)) for number in range(3)] == [False, True, False]


def test_parents_are_made_for_this_user_to_write(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        os.close(open_folder(tmp_path / "new" / "folder" / "pages"))
    finally:
        os.umask(before)


def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    need_root()
    (tmp_path / "pages").mkdir(mode=0o700)
    os.chown(tmp_path / "pages", NOBODY, NOBODY)
    with pytest.raises(ConfigError, match="belongs to another user"):
        open_folder(tmp_path / "pages")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        open_folder(tmp_path / "link")


@pytest.mark.parametrize("place", ["/proc/nowhere/pages", "/dev/null/pages"])
def test_a_folder_that_cannot_be_is_refused(place: str) -> None:
    with pytest.raises(ConfigError, match="can't be used"):
        open_folder(Path(place))


def test_a_read_only_folder_is_read(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "disk", "mode=700") as disk:
        write(opened(disk / "pages"), name(0), b"data")
        with remounted(disk, "ro"):
            folder = opened(disk / "pages")
            folder.sweep()
            assert read(folder, name(0)) == b"data"
            with pytest.raises(OSError, match="Read-only"):
                write(folder, name(1), b"data")


def test_a_disk_is_not_filled(tmp_path: Path) -> None:
    """A tenth of it, or 1 GiB, is left to others, who may fill it."""
    with mounted("tmpfs", tmp_path / "disk", "mode=700,size=1m") as disk:
        folder = opened(disk / "pages")
        for number in range(200):
            write(folder, name(number), b"data")
        assert shutil.disk_usage(disk).free >= (1 << 20) // 10 - FILE
        assert read(folder, name(199)) == b"data"
        (disk / "others").write_bytes(bytes(shutil.disk_usage(disk).free))
        with pytest.raises(OSError, match="No space"):
            write(folder, name(200), b"data")
        write(folder, name(200), b"data")
        assert read(folder, name(200)) == b"data"
        (disk / "others").write_bytes(bytes(shutil.disk_usage(disk).free))
        clear(disk / "pages")
        with (disk / "others").open("ab") as others, contextlib.suppress(OSError):
            others.write(bytes(1 << 20))
        with pytest.raises(OSError, match="No space"):
            write(opened(disk / "pages"), name(0), b"data")


def test_two_threads_of_readers_and_a_writer_agree(tmp_path: Path) -> None:
    folder, other, errors = opened(tmp_path, 8 * FILE), opened(tmp_path, 8 * FILE), list[object]()
    is_over = threading.Event()

    def look() -> None:
        while not is_over.is_set():
            for number in range(12):
                if (data := read(other, name(number))) not in (None, bytes([number]) * 3000):
                    errors.append(data)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in [*range(12)] * 20:
        write(folder, name(number), bytes([number]) * 3000)
    is_over.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert other.damaged == 0


def test_models_are_listed_and_all_is_cleared(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        models_in(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no page")
    write(opened(tmp_path), name(0), b"data")
    write(opened(tmp_path, binding=b"c" * 32), name(1), b"data")
    assert [(model.name, model.files, model.bytes) for model in models_in(tmp_path)] == [("model", 1, FILE)] * 2
    assert clear(tmp_path) == (2, 2 * FILE)
    assert not models_in(tmp_path)
    assert [*tmp_path.iterdir()] == [tmp_path / "notes.txt"]


def data_of(page: bytes) -> bytes:
    return page * 100


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_a_writer_that_is_killed_leaves_only_whole_pages(tmp_path: Path, kills: int) -> None:
    """At random moments; the next one goes on with the same folder, whose files it evicts."""
    random_ = random.Random(0)
    for _ in range(kills):
        if not (child := os.fork()):
            try:
                folder, number = opened(tmp_path, 50 * FILE), 0
                while True:
                    write(folder, name(number % 80), data_of(name(number % 80)))
                    number += 1
            finally:
                os._exit(1)
        time.sleep(random_.uniform(0.005, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        folder = opened(tmp_path, 50 * FILE)
        for number in range(80):
            assert read(folder, name(number)) in (None, data_of(name(number)))
        assert folder.damaged == 0
    unfinished = [entry.path for entry in entries(tmp_path) if entry.path.endswith(PARTIAL)]
    for path in unfinished:
        os.utime(path, (0, 0))
    folder.sweep()
    assert all(entry.path.endswith(".page") for entry in entries(tmp_path))
    assert sum(entry.bytes for entry in entries(tmp_path)) <= 50 * FILE


def test_a_file_is_removed_by_whoever_is_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "page").write_bytes(b"data")
    assert page_folder.remove(tmp_path / "page")
    assert page_folder.remove(tmp_path / "page"), "another process has removed it"
    assert not caplog.messages
    (tmp_path / "folder").mkdir()
    assert not page_folder.remove(tmp_path / "folder")
    assert caplog.messages == [f"{tmp_path / 'folder'} can't be removed: Is a directory"]


def test_a_model_whose_name_is_gone_is_listed_by_its_folder(tmp_path: Path) -> None:
    write(opened(tmp_path), name(0), b"data")
    (place,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert [model.name for model in models_in(tmp_path)] == ["model"]
    (place / "model").unlink()
    assert [(model.name, model.files) for model in models_in(tmp_path)] == [(place.name, 1)]
