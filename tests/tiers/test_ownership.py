"""A cache of models is used only if no other user can change it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from stores import make_store
from threads import wait_until
from users import NOBODY, as_nobody, need_root

from moetier.tiers.errors import ConfigError
from moetier.tiers.objects.cache_folder import fetch, outline
from moetier.tiers.ownership import check_cache_folder

pytest.importorskip("obstore")


@pytest.fixture
def address(tmp_path: Path) -> str:
    make_store(tmp_path / "store")
    return f"file://{tmp_path / 'store'}"


def refusal(address: str, root: Path) -> str:
    """The same, with and without the trunk's weights."""
    with pytest.raises(ConfigError) as error:
        fetch(address, root)
    if (root / "made").exists():
        with pytest.raises(ConfigError):
            outline(address, root)
    return str(error.value)


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_a_folder_that_others_may_write_is_refused(address: str, tmp_path: Path, mode: int) -> None:
    root = tmp_path / "cache"
    root.mkdir()
    root.chmod(mode)
    said = refusal(address, root)
    assert f"{root}, in which models are cached, may be written by other users." in said
    assert f"chmod -R go-w {root}" in said
    assert not list(root.rglob("*.json*")), "nothing was fetched"
    root.chmod(0o755)
    fetch(address, root)


@pytest.mark.parametrize("below", ["", "experts.zarr", "experts.zarr/zarr.json.partial"])
def test_what_lies_in_it_is_looked_at_where_others_can_enter(address: str, tmp_path: Path, below: str) -> None:
    root = tmp_path / "cache"
    folder = fetch(address, root)
    (folder / below).chmod(0o777)
    fetch(address, root)  # the folder above it is closed
    folder.parent.chmod(0o755)
    assert f"{folder / below}, in which" in refusal(address, root)
    with pytest.raises(ConfigError):
        outline(address, root)
    (folder / below).chmod(0o755)
    fetch(address, root)


def test_a_new_cache_is_closed_to_others(address: str, tmp_path: Path) -> None:
    """Whatever the umask is."""
    before = os.umask(0o002)
    try:
        folder = fetch(address, tmp_path / "new/cache")
        assert (tmp_path / "new/cache").stat().st_mode & 0o777 == 0o755
        assert folder.parent.stat().st_mode & 0o777 == 0o700
        fetch(address, tmp_path / "new/cache")
    finally:
        os.umask(before)


def test_a_folder_of_another_user_is_refused(address: str, tmp_path: Path) -> None:
    need_root()
    root = tmp_path / "cache"
    folder = fetch(address, root)
    for path in (root, folder.parent):
        os.chown(path, NOBODY, -1)
        assert f"{path}, in which models are cached, belongs to another user." in refusal(address, root)
        os.chown(path, 0, -1)
    os.chown(tmp_path, NOBODY, -1)
    assert "could replace what is in it" in refusal(address, root)
    tmp_path.chmod(0o1777)
    fetch(address, root)
    os.chown(tmp_path, 0, -1)


def test_a_link_in_place_of_the_folder_is_refused(address: str, tmp_path: Path) -> None:
    folder = fetch(address, tmp_path / "cache")
    folder.parent.rename(tmp_path / "elsewhere")
    folder.parent.symlink_to(tmp_path / "elsewhere")
    assert "is a symbolic link" in refusal(address, tmp_path / "cache")


def test_a_file_that_another_process_renames_meanwhile_is_no_fault(address: str, tmp_path: Path) -> None:
    folder = fetch(address, tmp_path / "cache")
    folder.parent.chmod(0o755)
    code = (
        "import pathlib, sys\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "while True: path.touch(), path.rename(path.with_suffix('.json')), path.with_suffix('.json').unlink()"
    )
    with subprocess.Popen([sys.executable, "-c", code, folder / "some.partial"]) as process:
        try:
            wait_until(lambda: any(folder.glob("some.*")))
            for _ in range(500):
                check_cache_folder(tmp_path / "cache", folder.parent)
            assert process.poll() is None
        finally:
            process.kill()


def test_a_folder_like_tmp_may_have_a_cache(address: str, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    fetch(address, tmp_path / "shared")


def test_a_cache_that_root_has_made_is_read_by_others(tmp_path: Path) -> None:
    """Root has opened it to them."""
    need_root()
    make_store(tmp_path / "store")
    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        address = f"file://{tmp_path / 'store'}"
        folder = fetch(address, Path(root, "cache"))
        folder.parent.chmod(0o755)
        assert as_nobody(lambda: fetch(address, Path(root, "cache"))) == f"returned {folder}"


def test_a_link_of_another_user_on_the_way_is_refused(address: str, tmp_path: Path) -> None:
    need_root()
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    folder = fetch(address, link / "cache")
    assert outline(address, link / "cache") == folder, "what is cached is not fetched again"
    os.chown(link, NOBODY, -1, follow_symlinks=False)
    assert f"{link} is a symbolic link of another user." in refusal(address, link / "cache")
