"""Records that no checksum proves: a file that is written to while it is in use is refused by name."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest
from extent_files import open_extents, write_extents
from faults import flip_bit
from stores import make_plan, make_records, make_store, read_record, without_table

from moetier.tiers.errors import StoreFormatError
from moetier.tiers.extents.reader import ExtentStore
from moetier.tiers.layout import ExpertKey
from moetier.tiers.store.folder import GROUP
from moetier.tiers.store.mirror import MirroredStore
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.store.shard import ShardFile
from moetier.tiers.store.unchanged import Unchanged

PLAN = make_plan()
KEY = ExpertKey(1, 2)
TICK = 0.02  # seconds, more than the steps of a file's times
Store = ExtentStore | ShardStore | MirroredStore


class Opens(Protocol):
    def __call__(self, folder: Path, seed: int = 0) -> tuple[Store, Path, dict[ExpertKey, bytes]]: ...


def checkpoint(folder: Path, seed: int = 0) -> tuple[Store, Path, dict[ExpertKey, bytes]]:
    records = make_records(PLAN, seed)
    table = write_extents(folder, PLAN, records, linked=False)
    time.sleep(TICK)
    return open_extents(folder, table), folder / "model-1.safetensors", records


def older_store(folder: Path, seed: int = 0) -> tuple[Store, Path, dict[ExpertKey, bytes]]:
    """Its manifest has no checksums of records, so that a read is compared only with those beside the records."""
    records = make_store(folder, seed=seed)
    without_table(folder)
    time.sleep(TICK)
    return ShardStore.open(folder), ShardFile.of(folder / GROUP, PLAN, 1).path, records


@pytest.fixture(params=[checkpoint, older_store])
def opens(request: pytest.FixtureRequest) -> Opens:
    found: Opens = request.param
    return found


def other(opens: Opens, folder: Path) -> Path:
    """The same file of another model, whose records have other bytes."""
    store, path, _ = opens(folder, seed=1)
    store.close()
    return path


def overwrite(path: Path, another: Path) -> None:
    with path.open("r+b") as stream:
        stream.write(another.read_bytes())


def overwrite_and_set_the_time_back(path: Path, another: Path) -> None:
    found = path.stat()
    overwrite(path, another)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def copy_onto(path: Path, another: Path) -> None:
    """As cp does: the file is cut and written anew."""
    shutil.copyfile(another, path)


@pytest.mark.parametrize("change", [overwrite, overwrite_and_set_the_time_back, copy_onto])
def test_a_file_that_is_overwritten_is_refused_by_name(
    opens: Opens, change: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    store, path, records = opens(tmp_path / "model")
    with store:
        assert read_record(store, KEY) == records[KEY]
        change(path, other(opens, tmp_path / "other"))
        with pytest.raises(StoreFormatError, match=rf"{path} was changed while it was in use: its .*time") as caught:
            read_record(store, KEY)
        assert "file" in caught.value.fix
        assert read_record(store, ExpertKey(0, 0)) == records[0, 0], "its file is as it was"


@pytest.mark.parametrize("times", [(), (0, 0)])
def test_a_file_with_more_bytes_is_refused(opens: Opens, times: tuple[int, ...], tmp_path: Path) -> None:
    store, path, _ = opens(tmp_path / "model")
    with store:
        with path.open("ab") as stream:
            stream.write(b"x")
        if times:
            os.utime(path, times)
        with pytest.raises(StoreFormatError, match="was changed while it was in use: it had"):
            read_record(store, KEY)


def test_a_file_that_another_one_replaces_is_read_on(opens: Opens, tmp_path: Path) -> None:
    store, path, records = opens(tmp_path / "model")
    with store:
        other(opens, tmp_path / "other").replace(path)
        assert {key: read_record(store, key) for key in records} == records


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.chmod(0o400),
        lambda path: (path.parent / "link").hardlink_to(path),
        Path.unlink,
        lambda path: path.parent.rename(path.parent.with_name("moved")),
        lambda path: path.read_bytes(),
    ],
    ids=["mode", "hard link", "removed", "folder renamed", "read"],
)
def test_a_file_whose_bytes_stay_is_read_on(opens: Opens, change: Callable[[Path], object], tmp_path: Path) -> None:
    store, path, records = opens(tmp_path / "model")
    with store:
        change(path)
        assert read_record(store, KEY) == records[KEY]


def restore_times(path: Path) -> None:
    """As a backup does with the time of the last access."""
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def link_and_unlink(path: Path) -> None:
    link = path.with_name("link")
    link.hardlink_to(path)
    link.unlink()


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.rename(path.with_name("moved")),
        lambda path: path.chmod(path.stat().st_mode),
        restore_times,
        link_and_unlink,
    ],
    ids=["moved", "same mode", "access time", "link and unlink"],
)
def test_a_file_whose_change_time_alone_differs_is_read_on_with_a_warning(
    opens: Opens, change: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, path, records = opens(tmp_path / "model")
    with store:
        before = path.stat().st_ctime_ns
        change(path)
        path = path if path.exists() else path.with_name("moved")
        assert path.stat().st_ctime_ns != before
        assert read_record(store, KEY) == records[KEY]
        time.sleep(TICK)
        restore_times(path)
        assert {key: read_record(store, key) for key in records} == records
        assert sum("Its change time (ctime) differs" in message for message in caplog.messages) == 1
        time.sleep(TICK)
        overwrite_and_set_the_time_back(path, other(opens, tmp_path / "other"))
        with pytest.raises(StoreFormatError, match="was changed while it was in use: its change time"):
            read_record(store, KEY)


@pytest.mark.parametrize("mode", [0o400, 0o600])
def test_a_new_mode_does_not_hide_a_change(opens: Opens, mode: int, tmp_path: Path) -> None:
    store, path, _ = opens(tmp_path / "model")
    with store:
        overwrite_and_set_the_time_back(path, other(opens, tmp_path / "other"))
        path.chmod(mode)
        with pytest.raises(StoreFormatError, match="was changed while it was in use: its change time"):
            read_record(store, KEY)


def test_after_a_new_mode_a_change_is_still_noticed(opens: Opens, tmp_path: Path) -> None:
    store, path, records = opens(tmp_path / "model")
    with store:
        path.chmod(0o600 if path.stat().st_mode & 0o077 else 0o644)
        assert read_record(store, KEY) == records[KEY]
        flip_bit(path, -1)
        with pytest.raises(StoreFormatError, match="was changed"):
            read_record(store, KEY)


def test_what_a_checksum_proves_is_read_on(tmp_path: Path) -> None:
    """A file that is written anew with the same bytes, as a second download does."""
    records = make_records(PLAN)
    table = write_extents(tmp_path, PLAN, records)
    with open_extents(tmp_path, table) as store:
        path = tmp_path / "model-1.safetensors"
        path.write_bytes(path.read_bytes())
        assert read_record(store, KEY) == records[KEY]


def test_a_file_is_replaced_once_its_name_leads_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    file = Unchanged.open(path, "Load it again.")
    try:
        assert not file.is_replaced()
        (tmp_path / "other").write_bytes(b"new")
        (tmp_path / "other").replace(path)
        assert file.is_replaced()
        path.unlink()
        assert file.is_replaced()
        file.check()  # what is open is as it was
    finally:
        file.close()
