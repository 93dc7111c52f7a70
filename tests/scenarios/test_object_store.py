"""A model in an object store gives the same tokens as its copy on this machine."""

from __future__ import annotations

import shutil
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from daemons import running_daemon
from object_servers import served_folder
from prepared import Prepared
from readers import PATIENCE

import moetier
from moetier.runtime.model.names import directory_at
from moetier.tiers.errors import ConfigError, MoetierError
from moetier.tiers.store.folder import GROUP

IDS = torch.randint(3, 250, (1, 12), generator=torch.Generator().manual_seed(0))

LOCAL = """
import sys, moetier
model, _ = moetier.load(sys.argv[1], daemon=None)
with model.tiers:
    pass
print([name for name in sys.modules if name.startswith(("obstore", "moetier.tiers.objects"))])
"""
WITHOUT = """
import sys
sys.modules["obstore"] = None
import moetier
moetier.load(sys.argv[1], daemon=None)[0].tiers.close()
try:
    moetier.load("s3://bucket/model", store_cache=sys.argv[2])
except moetier.MoetierError as error:
    print(type(error).__name__, error)
"""


@torch.no_grad()
def tokens(model: Any) -> list[int]:
    with model.tiers:
        found = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, do_sample=False)
        return list(map(int, found[0]))


def test_the_same_tokens_come_cold_and_warm(tinymix_4bit: Path, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    expected = tokens(moetier.load(tinymix_4bit, daemon=None)[0])
    with served_folder(tinymix_4bit) as server:
        model, tokenizer = moetier.load(server.address, store_cache=tmp_path, daemon=None)
        assert tokenizer is not None
        assert server.address in model.tiers.where
        asked = len(server.gets)
        assert tokens(model) == expected
        fetched, found = model.tiers.origin.shares()
        assert len(server.gets) - asked == len(server.records) == fetched.records + model.tiers.host.stats().warmed
        assert len(set(server.records)) <= len(server.records)
        assert found.records == 0
        server.gets.clear()
        # neither predictions nor reading in the background, which may want experts that no token has used
        model, _ = moetier.load(server.address, store_cache=tmp_path, daemon=None, ram="50%", speculate="off")
        assert tokens(model) == expected
        assert not server.gets, "warm: nothing is asked"


def test_the_cache_has_the_size_that_was_asked_for(tinymix_4bit: Path, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    with served_folder(tinymix_4bit) as server:
        model, _ = moetier.load(server.address, store_cache=tmp_path, store_cache_size="300KiB", daemon=None)
        tokens(model)
        (folder,) = tmp_path.glob("*/*")
        assert sum(path.stat().st_blocks for path in (folder / GROUP).rglob("c/*/0/0")) * 512 < 400 << 10
        for size in ("50%", "0.5"):
            with pytest.raises(ConfigError, match="store_cache_size"):
                moetier.load(server.address, store_cache=tmp_path, store_cache_size=size, daemon=None)


def test_models_of_this_machine_import_none_of_it(scripts: Prepared, tinymix_4bit: Path, tmp_path: Path) -> None:
    assert scripts.run(LOCAL, tinymix_4bit).stdout.strip().endswith("[]")
    said = scripts.run(WITHOUT, tinymix_4bit, tmp_path).stdout
    assert "ConfigError s3://bucket/model needs obstore" in said


def test_a_daemon_holds_a_model_of_an_object_store(tinymix_4bit: Path, tmp_path: Path) -> None:
    """It takes signals, although obstore has begun threads before it could block them."""
    pytest.importorskip("obstore")
    expected = tokens(moetier.load(tinymix_4bit, daemon=None)[0])
    with served_folder(tinymix_4bit) as server:
        extra = ["--store-cache", str(tmp_path / "cache")]
        address: Any = server.address
        with running_daemon([address], folder=tmp_path / "daemon", extra=extra) as daemon:
            (folder,) = (tmp_path / "cache").glob("*/*")
            model, _ = moetier.load(folder, daemon=str(daemon.folder))
            assert tokens(model) == expected
            assert server.records
            daemon.process.terminate()
            assert daemon.process.wait(PATIENCE) == 0


@pytest.mark.parametrize("address", ["s3://KEY:SECRET@bucket/model", "https://host/model?sig=SECRET"])
def test_an_address_with_secrets_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which moetier does not accept") as error:
        moetier.load(address, store_cache=tmp_path)
    assert "SECRET" not in "".join(traceback.format_exception(error.value)).replace("AWS_SECRET_ACCESS_KEY", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors.index.json"])
def test_a_file_that_is_damaged_in_a_cache_without_sums_is_reported_with_what_to_remove(
    name: str, tinymix_4bit: Path, tmp_path: Path
) -> None:
    pytest.importorskip("obstore")
    with served_folder(tinymix_4bit) as server:
        folder = directory_at(server.address, tmp_path)
        (folder / name).write_text("<html>Sign in</html>")
        with pytest.raises(MoetierError) as error:
            moetier.load(server.address, store_cache=tmp_path, daemon=None)
        assert str(folder) in error.value.cause
        assert error.value.fix == f"Remove the folder {folder}, and give the address of the model again."
        shutil.rmtree(folder)
        moetier.load(server.address, store_cache=tmp_path, daemon=None)[0].tiers.close()
