"""The download of a checkpoint: files are there for their stage, and sparse copies of them afterwards."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moetier.runtime.checkpoint import hub
from moetier.runtime.checkpoint.hub import RemoteFile
from moetier.runtime.formats.tensors import read_tensors
from moetier.tiers.errors import CheckpointError
from moetier.tools.convert.conversion_plan import stages
from moetier.tools.convert.streaming import Download, shard_path

NAMES = ("a.safetensors", "b.safetensors", "c.safetensors")
ROWS = 3 << 18  # of fp32: the 3 MiB of a tensor are more than its samples


class Origin:
    """Files on a hub, which is a folder here. ``asked`` lists what was downloaded."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.asked: list[str] = []
        folder.mkdir()
        for number, name in enumerate(NAMES):
            weights = {"w": torch.full((ROWS,), float(number)), "kept": torch.full((ROWS,), number + 0.5)}
            save_file({f"{name[0]}.{key}": value for key, value in weights.items()}, folder / name)
        patch.setattr(hub, "download", self.download)
        patch.setattr(hub, "cached", lambda *_: None)

    def download(
        self, name: str, file: str, revision: str, folder: Path | None, advance: Callable[[int], None]
    ) -> Path:
        assert folder is not None
        self.asked.append(file)
        advance(1)
        return Path(shutil.copy(self.folder / file, folder / file))

    def open(self, folder: Path) -> Download:
        files, tensors = {}, {}
        for name in NAMES:
            data = (self.folder / name).read_bytes()
            files[name] = RemoteFile(len(data), hashlib.sha256(data).hexdigest())
            tensors |= read_tensors(self.folder / name, shard_path(folder, name))
        download = Download("acme/model", "commit", folder, files, tensors, keep=False)
        download.keep_tensors([f"{name[0]}.kept" for name in NAMES])
        return download


@pytest.fixture
def origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Origin:
    return Origin(tmp_path / "origin", monkeypatch)


def stored(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_files_are_whole_in_their_stage_and_sparse_afterwards(origin: Origin, tmp_path: Path) -> None:
    folder = tmp_path / "download"
    paths = [shard_path(folder, name) for name in NAMES]
    in_order = stages({0: frozenset(paths[:1]), 1: frozenset(paths[:2]), 2: frozenset(paths[2:])})
    download = origin.open(folder)
    (on_target, cached), size = download.disk_bytes(in_order), (origin.folder / NAMES[0]).stat().st_size
    assert cached == 0
    assert 2 * size <= on_target <= 6 * size
    assert "will be downloaded; at most" in download.announce(in_order)
    for stage in download.stream(in_order, quiet=True):
        for path in stage.present:
            assert path.read_bytes() == (origin.folder / path.name).read_bytes()
    assert sorted(origin.asked) == sorted(NAMES), "each once"
    for path in paths:
        tensors = read_tensors(path, path)
        assert torch.equal(tensors[f"{path.name[0]}.kept"].read(), torch.full((ROWS,), NAMES.index(path.name) + 0.5))
        assert path.stat().st_size == size
        assert stored(path) < 0.7 * size, "holes in place of the other tensor"
    assert not list((folder / "whole").rglob("*.safetensors"))


def test_what_is_there_is_not_downloaded_again(origin: Origin, tmp_path: Path) -> None:
    folder = tmp_path / "download"
    paths = [shard_path(folder, name) for name in NAMES]
    in_order = stages({block: frozenset([path]) for block, path in enumerate(paths)})
    stream = origin.open(folder).stream(in_order, quiet=True)
    next(stream)
    stream.close()  # the conversion was interrupted in the first block
    assert paths[0].is_symlink()
    again = origin.open(folder)
    list(again.stream(in_order, quiet=True))
    assert origin.asked.count(NAMES[0]) == 1
    origin.asked.clear()
    assert origin.open(folder).disk_bytes([])[0] == 0, "all have sparse copies"
    list(origin.open(folder).stream([], quiet=True))
    assert not origin.asked


def test_a_sparse_copy_that_lacks_a_kept_tensor_is_made_again(origin: Origin, tmp_path: Path) -> None:
    folder = tmp_path / "download"
    list(origin.open(folder).stream([], quiet=True))
    origin.asked.clear()
    more = origin.open(folder)
    more.keep_tensors(["a.w", "a.kept", "b.kept", "c.kept"])
    list(more.stream([], quiet=True))
    assert origin.asked == [NAMES[0]]
    path = shard_path(folder, NAMES[0])
    assert np.all(read_tensors(path, path)["a.w"].read().numpy() == 0)


@pytest.mark.parametrize("fault", ["short", "altered"])
def test_a_file_that_came_damaged_is_deleted(fault: str, origin: Origin, tmp_path: Path) -> None:
    folder = tmp_path / "download"
    download = origin.open(folder)
    data = bytearray((origin.folder / NAMES[0]).read_bytes())
    data[-1] ^= 1
    (origin.folder / NAMES[0]).write_bytes(data[:-1] if fault == "short" else data)
    said = "bytes instead of" if fault == "short" else "its sha256 is not the one that the hub gives"
    with pytest.raises(CheckpointError, match=f"{NAMES[0]} of acme/model was damaged during the download: .*{said}"):
        list(download.stream([], quiet=True))
    assert not list(folder.rglob("*.safetensors"))
