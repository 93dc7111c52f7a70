"""open_store opens the store at a location, whatever it is, and imports no other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import save_checkpoint
from object_servers import served_folder
from stores import make_store

from moetier.runtime.stores import registry
from moetier.runtime.stores.checkpoint_store import CheckpointStore
from moetier.runtime.stores.registry import open_store, read_manifest
from moetier.tiers.errors import StoreFormatError
from moetier.tiers.objects.cache import CachedStore
from moetier.tiers.objects.cache_folder import fetch
from moetier.tiers.store.folder import GROUP
from moetier.tiers.store.mirror import MirroredStore
from moetier.tiers.store.reader import ShardStore
from moetier.tools.convert.mirror_writer import make_mirror

IMPORTED = """
import sys
from pathlib import Path
from moetier.runtime.stores import registry
from moetier.runtime.stores.registry import open_store
with open_store(Path(sys.argv[1])) as store:
    print(store.manifest.digest, *sys.modules)
"""


@pytest.fixture(autouse=True, params=[1, -1], ids=["in order", "reversed"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the classes makes no difference."""
    monkeypatch.setattr(registry, "STORES", registry.STORES[:: request.param])


def imported(folder: Path) -> tuple[str, set[str]]:
    """The digest of the store in ``folder``, and the modules of a process that has opened it."""
    ended = subprocess.run([sys.executable, "-c", IMPORTED, folder], stdout=subprocess.PIPE, text=True, check=True)
    digest, *modules = ended.stdout.split()
    return digest, set(modules)


def test_a_model_directory(tmp_path: Path) -> None:
    make_store(tmp_path)
    for location in (tmp_path, tmp_path / GROUP):
        with open_store(location) as store:
            assert type(store) is ShardStore
            assert store.directory == tmp_path
            assert store.manifest == read_manifest(location)
    digest, modules = imported(tmp_path)
    assert digest == read_manifest(tmp_path).digest
    assert not {"torch", "moetier.tiers.objects.cache", "moetier.runtime.stores.checkpoint_store"} & modules


def test_mirrors_are_used_unless_this_copy_is_asked_for(tmp_path: Path) -> None:
    make_store(tmp_path / "a")
    make_mirror(tmp_path / "a", tmp_path / "b")
    with open_store(tmp_path / "a") as store:
        assert isinstance(store, MirroredStore)
    with open_store(tmp_path / "a", damaged=True) as store:
        assert type(store) is ShardStore
    assert read_manifest(tmp_path / "a") == read_manifest(tmp_path / "b")


def test_the_cache_of_an_object_store(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    make_store(tmp_path / "model")
    with served_folder(tmp_path / "model") as server:
        folder = fetch(server.address, tmp_path / "cache")
        assert read_manifest(folder) == read_manifest(tmp_path / "model")
        with open_store(folder) as store:
            assert isinstance(store, CachedStore)
            assert (store.where, store.is_local) == (server.address.rstrip("/"), False)


@pytest.mark.slow  # two processes; tools/commands/test_link.py looks at the maps of a daemon
@pytest.mark.parametrize("order", [1], indirect=True)
def test_a_checkpoint_is_opened_without_torch(tmp_path: Path) -> None:
    """A daemon does without torch. The table, which needs it, is made in another process."""
    folder = save_checkpoint(tmp_path / "mixtral")
    with open_store(folder) as store:
        assert isinstance(store, CheckpointStore)
        digest, modules = imported(folder)
        assert digest == store.manifest.digest
        assert "torch" not in modules


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    for location, words in ((tmp_path, "it has no experts.zarr"), (tmp_path / "none", "There is no folder")):
        for opening in (open_store, read_manifest):
            with pytest.raises(StoreFormatError, match=words) as caught:
                opening(location)
            assert "moetier convert" in caught.value.fix
