"""A store that the project does not have: one new module (``tar_store``) and one line of the registry.

This is the promise of "A new store" in CONTRIBUTING.md.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from faults import flip_bit
from stores import read_records
from tar_store import NAME, TarStore, flip_bit_of_record, pack, write_tar

import moetier
from moetier.runtime.daemon.startup import open_stores
from moetier.runtime.stores import registry
from moetier.testing import Records, StoreTests
from moetier.tiers.errors import StoreFormatError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.base import Store
from moetier.tiers.store.folder import GROUP
from moetier.tools.doctor.model_directory import health
from moetier.tools.main import main

LINE = "tar_store:TarStore"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "STORES", [*registry.STORES, LINE])


class TestTarStore(StoreTests):
    def write(self, folder: Path, manifest: Manifest, records: Records) -> None:
        pack(folder, manifest, records)

    def damage(self, folder: Path, store: Store, key: ExpertKey) -> None:
        flip_bit_of_record(folder, key)


@pytest.fixture
def packed(tinymix_4bit: Path, tmp_path: Path) -> Path:
    """A model directory with ``experts.tar`` in place of ``experts.zarr``."""
    with registry.open_store(tinymix_4bit) as store:
        folder = shutil.copytree(tinymix_4bit, tmp_path / "packed", ignore=shutil.ignore_patterns(GROUP))
        pack(Path(folder), store.manifest, read_records(store))
    return Path(folder)


def test_a_model_is_loaded_from_it(tinymix_4bit: Path, packed: Path) -> None:
    ids = torch.arange(2, 18)[None]
    logits = []
    for folder in (tinymix_4bit, packed):
        model, _ = moetier.load(folder, ram="4MiB")
        with model.tiers, torch.no_grad():
            logits.append(model(input_ids=ids).logits)
            assert model.tiers.where == "this process"
    assert torch.equal(*logits)


@pytest.mark.parametrize("place", range(5))
def test_its_line_may_stand_anywhere(
    place: int, tinymix: Path, tinymix_4bit: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line for line in registry.STORES if line != LINE]
    monkeypatch.setattr(registry, "STORES", [*lines[:place], LINE, *lines[place:]])
    for folder, name in ((tinymix, "CheckpointStore"), (tinymix_4bit, "ShardStore"), (packed, "TarStore")):
        with registry.open_store(folder) as store:
            assert type(store).__name__ == name
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreFormatError, match=r"it has no experts\.zarr"):
        registry.open_store(tmp_path / "empty")


def test_commands_and_the_daemon_open_it(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(packed)]) == 0
    assert "reads            buffered\n" in capsys.readouterr().out
    assert main(["verify", str(packed)]) == 0
    assert "opened without a fault" in next(health(packed, checksums=False)).found
    flip_bit(packed / NAME, packed.joinpath(NAME).stat().st_size // 2)
    capsys.readouterr()
    assert main(["verify", str(packed)]) == 1
    assert f"checksum mismatch in {packed / NAME}." in capsys.readouterr().out
    with contextlib.ExitStack() as closing:
        (store,) = open_stores([packed], closing).values()
        assert isinstance(store, TarStore)


def test_what_needs_another_store_says_so(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "target")
    for command, done in ((["mirror", str(packed), target], "mirrored"), (["push", str(packed), "s3://a/b"], "pushed")):
        assert main(command) == 1
        cause = f"{packed} has no experts.zarr, and only such stores can be {done}."
        assert cause in capsys.readouterr().err


def test_a_store_that_is_gone_is_named(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed.joinpath(NAME).unlink()
    for command in (["verify", str(packed)], ["generate", str(packed), "a"]):
        assert main(command) == 1
        assert f"{packed} has no experts.zarr.\n" in capsys.readouterr().err


def test_a_bad_manifest_is_an_error(packed: Path) -> None:
    """The error names the file, and what is wrong with its manifest."""
    for value, cause in (
        (b"[]", "is not a JSON object"),
        (b"{}", "it has no manifest"),
        (b" " * (3 << 20), "2,097,152"),
    ):
        write_tar(packed, {"manifest.json": value})
        with pytest.raises(StoreFormatError, match=cause) as caught:
            registry.open_store(packed)
        assert str(packed / NAME) in caught.value.cause
        assert caught.value.fix == "Write the file again."
