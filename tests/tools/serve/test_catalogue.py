"""Names of the models that a server has: given, in folders, and by aliases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moetier.runtime.model.name_files import forget_name, register_name
from moetier.tiers.errors import ConfigError
from moetier.tools.serve.catalogue import Catalogue, is_folder_of_models


def make(path: Path, *, store: bool = True, complete: bool = True) -> Path:
    """Make what looks like a model from the outside."""
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    if store:
        (path / "experts.zarr").mkdir()
    if store and complete:
        (path / "experts.zarr" / "zarr.json").write_text("{}")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    make(folder / "mixtral-4bit")
    make(folder / "checkpoint", store=False)
    make(folder / "half", complete=False)
    make(folder / ".hidden")
    make(folder / "Qwen--Qwen3" / "4bit")
    make(folder / "Qwen--Qwen3" / "8bit")
    make(folder / "Org--One" / "4bit")
    for name in ("one.gguf", "two-00001-of-00002.gguf", "two-00002-of-00002.gguf"):
        (folder / name).write_bytes(b"GGUF")
    (folder / "notes").mkdir()
    return folder


def test_a_folder_has_the_models_in_it(folder: Path) -> None:
    assert is_folder_of_models(folder)
    assert not is_folder_of_models(folder / "mixtral-4bit")
    assert not is_folder_of_models(folder / "notes")
    assert not is_folder_of_models(folder / "none")
    assert {*Catalogue([folder]).models()} == {
        "mixtral-4bit", "checkpoint", "Qwen/Qwen3:4bit", "Qwen/Qwen3:8bit", "Org/One:4bit", "one.gguf",
        "two-00001-of-00002.gguf",
    }  # fmt: skip


def test_links_and_folders_that_cannot_be_read_add_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [*Catalogue([folder]).models()]
    (folder / "a--b").mkdir()
    (folder / "a--b" / "x--y").symlink_to("..")
    make(folder / "closed--to" / "all")
    listed = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:  # root may read all folders
        if path.name == "closed--to":
            raise PermissionError
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert [*Catalogue([folder]).models()] == before


def test_models_that_come_and_go_are_seen(folder: Path) -> None:
    catalogue = Catalogue([folder])
    assert catalogue.find("new") is None
    make(folder / "new")
    assert catalogue.find("new") == "new"
    (folder / "new").rename(folder.parent / "new")
    assert "new" not in catalogue.models()
    folder.rename(folder.parent / "moved")
    assert "mixtral-4bit" in catalogue.models(), "a folder that can't be read leaves what there was"


def test_a_name_may_lack_its_tag_where_one_model_has_it(folder: Path) -> None:
    catalogue = Catalogue([folder])
    assert catalogue.find("Org/One") == "Org/One:4bit"
    assert catalogue.find("Qwen/Qwen3") is None
    assert catalogue.find("Qwen/Qwen3:8bit") == "Qwen/Qwen3:8bit"
    for asked in ("", "4bit", "/", "..", "../models/mixtral-4bit", str(folder / "mixtral-4bit")):
        assert catalogue.find(asked) is None


def test_aliases_are_further_names(folder: Path) -> None:
    catalogue = Catalogue([folder], aliases={"gpt-4o": "mixtral-4bit", "claude": "mixtral-4bit"})
    assert catalogue.find("gpt-4o") == "mixtral-4bit"
    assert catalogue.aliases_of("mixtral-4bit") == ["gpt-4o", "claude"]
    assert catalogue.aliases_of("one.gguf") == []
    with pytest.raises(ConfigError, match="there is no model 'none'"):
        Catalogue([folder], aliases={"gpt-4o": "none"})
    with pytest.raises(ConfigError, match="a model has this name"):
        Catalogue([folder], aliases={"one.gguf": "mixtral-4bit"})


def test_a_name_is_of_one_model(folder: Path, tmp_path: Path) -> None:
    model = folder / "mixtral-4bit"
    assert Catalogue([model], name="small").models() == {"small": model}
    assert Catalogue([model], name="small").find("") is None
    assert Catalogue([model]).has_one
    assert not Catalogue([folder]).has_one
    assert len(Catalogue([model, folder]).models()) == 7, "it is given twice"
    with pytest.raises(ConfigError, match="Two models are called mixtral-4bit"):
        Catalogue([folder, make(tmp_path / "other" / "mixtral-4bit")])
    with pytest.raises(ConfigError, match="Give --alias"):
        Catalogue([folder], name="small")


def test_a_model_that_is_none_is_left_to_the_load(tmp_path: Path) -> None:
    assert Catalogue([tmp_path / "none"]).models() == {"none": tmp_path / "none"}


@pytest.mark.parametrize("in_folder", [False, True])
def test_a_model_is_found_by_its_listed_name_and_by_its_folder(models: Path, folder: Path, in_folder: bool) -> None:
    """One rule holds for models that are given and for those in a folder."""
    assert register_name(make(folder.parent / "else" / "mixtral-4bit")) == "mixtral-4bit"
    assert register_name(folder / "mixtral-4bit") == "mixtral-4bit-2"
    assert register_name(make(folder / "my model")) == "my-model"
    assert register_name(folder / "one.gguf") == "one"
    assert register_name(folder / "Org--One" / "4bit") == "4bit"
    given = [folder / name for name in ("mixtral-4bit", "my model", "one.gguf")]
    catalogue = Catalogue([folder] if in_folder else given, aliases={"gpt-4o": "mixtral-4bit", "y": "one.gguf"})
    assert {"mixtral-4bit-2", "my-model", "one"} <= {*catalogue.models()}
    assert not {"mixtral-4bit", "my model", "one.gguf"} & {*catalogue.models()}
    assert [catalogue.find(name) for name in ("mixtral-4bit", "my model", "one.gguf")] == [
        "mixtral-4bit-2", "my-model", "one",
    ]  # fmt: skip
    assert (catalogue.find("gpt-4o"), catalogue.find("y")) == ("mixtral-4bit-2", "one")
    assert catalogue.aliases_of("one") == ["y"]
    if in_folder:
        assert catalogue.find("Org/One:4bit") == catalogue.find("Org/One") == "4bit"


def test_a_model_is_one_entry_however_it_is_given(models: Path, folder: Path) -> None:
    register_name(make(folder.parent / "else" / "mixtral-4bit"))
    register_name(folder / "mixtral-4bit")
    (folder / "again").symlink_to("mixtral-4bit")
    catalogue = Catalogue([folder / "mixtral-4bit", folder, folder / "again"])
    assert len(catalogue.models()) == 7
    assert catalogue.find("again") == catalogue.find("mixtral-4bit") == "mixtral-4bit-2"


def test_the_name_of_a_folder_goes_before_the_listed_name_of_another_model(models: Path, folder: Path) -> None:
    renamed, other = make(folder / "old"), folder / "new"
    register_name(renamed)
    (models.parent / "names" / "old").rename(models.parent / "names" / "new")
    assert Catalogue([folder]).find("old") == "new"
    make(other)
    catalogue = Catalogue([folder])
    assert (catalogue.models()["new"], catalogue.models()["old"]) == (other, renamed)


def test_a_folder_that_two_models_have_names_neither_of_them(models: Path, tmp_path: Path) -> None:
    places = [make(tmp_path / str(number) / "model") for number in range(3)]
    assert [register_name(place) for place in places] == ["model", "model-2", "model-3"]
    assert Catalogue(places).find("model") == "model"
    assert Catalogue(places[1:]).find("model") is None
    assert [*Catalogue(places[1:]).models()] == ["model-2", "model-3"]
    with pytest.raises(ConfigError, match="there is no model 'model'"):
        Catalogue(places[1:], aliases={"gpt-4o": "model"})


def test_a_model_keeps_its_name_while_it_is_served(models: Path, folder: Path) -> None:
    register_name(make(folder.parent / "else" / "mixtral-4bit"))
    catalogue = Catalogue([folder])
    assert register_name(folder / "mixtral-4bit") == "mixtral-4bit-2"
    assert catalogue.models()["mixtral-4bit"] == folder / "mixtral-4bit"
    assert "mixtral-4bit-2" not in catalogue.models()
    forget_name("mixtral-4bit-2", folder / "mixtral-4bit")
    assert catalogue.find("mixtral-4bit") == "mixtral-4bit"


def test_a_model_keeps_its_name_and_path_beside_new_folders(models: Path, folder: Path) -> None:
    """A new folder that is called as a listed model, and a link that is the first of a model's two paths."""
    model = folder / "mixtral-4bit"
    register_name(model)
    (models.parent / "names" / "mixtral-4bit").rename(models.parent / "names" / "foo")
    catalogue = Catalogue([folder], aliases={"gpt-4o": "mixtral-4bit"})
    assert catalogue.find("gpt-4o") == "foo"
    (folder / "a").symlink_to("mixtral-4bit")
    assert catalogue.models()["foo"] == model
    make(folder / "foo")
    assert catalogue.models()["foo"] == model
    assert catalogue.find("gpt-4o") == "foo"


def test_a_name_is_printable(tmp_path: Path) -> None:
    model = make(tmp_path / "a\nb")
    assert Catalogue([model], name="ab").find("ab") == "ab"
    for name in (None, "", "a\tb"):
        with pytest.raises(ConfigError, match="can't be the name of a model"):
            Catalogue([model], name=name)
