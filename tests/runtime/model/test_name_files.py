"""Names of converted and linked models, which lie in a folder of the user."""

from __future__ import annotations

import fcntl
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

import pytest

from moetier.runtime.model.name_files import data_folder, forget_name, last_use, register_name, registered
from moetier.runtime.model.names import checkpoint_or_model, model_directory, note_use_of
from moetier.tiers.errors import ConfigError, NotFoundError
from moetier.tools.main import main


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_a_model_has_one_name_and_a_name_one_model(models: Path, tmp_path: Path) -> None:
    first, second = folder(tmp_path / "a" / "tiny"), folder(tmp_path / "b" / "tiny")
    assert [register_name(path) for path in (first, second, first, second)] == ["tiny", "tiny-2", "tiny", "tiny-2"]
    assert registered() == {"tiny": first, "tiny-2": second}
    shutil.rmtree(first)
    assert register_name(folder(tmp_path / "c" / "tiny")) == "tiny", "the name of a model that is gone"
    assert registered()["tiny"] == tmp_path / "c" / "tiny"
    forget_name("tiny", second)
    assert list(registered()) == ["tiny", "tiny-2"], "the name of another model"
    forget_name("tiny", tmp_path / "c" / "tiny")
    assert list(registered()) == ["tiny-2"]


@pytest.mark.parametrize(
    ("name", "given"), [("we ird: model", "we-ird-model"), (".hidden", "hidden"), ("---", "model"), ("ü.gguf", "ü")]
)
def test_names_are_those_of_folders_and_of_files_as_far_as_they_can_be(
    models: Path, tmp_path: Path, name: str, given: str
) -> None:
    (tmp_path / name).write_bytes(b"")
    assert register_name(tmp_path / name) == given
    assert model_directory(given) == tmp_path / name


def test_a_name_is_resolved_wherever_a_model_is_named(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = folder(tmp_path / "tiny")
    register_name(tiny)
    assert model_directory("tiny") == tiny
    assert checkpoint_or_model("tiny") == str(tiny)  # of plan and quality
    assert checkpoint_or_model("tony") == "tony"  # may be an id of the hub
    tiny.rmdir()
    with pytest.raises(NotFoundError, match="which is gone") as caught:
        model_directory("tiny")
    assert caught.value.fix.endswith("to forget the name: moetier rm tiny")
    assert main(["inspect", "tine"]) == 1
    assert "`moetier list` has tiny" in capsys.readouterr().err


def test_the_name_of_a_model_that_cannot_be_reached_is_not_taken_over(models: Path, tmp_path: Path) -> None:
    unmounted = tmp_path / "disk" / "models" / "tiny"
    register_name(folder(unmounted))
    shutil.rmtree(tmp_path / "disk" / "models")
    assert register_name(folder(tmp_path / "tiny")) == "tiny-2"
    assert registered() == {"tiny": unmounted, "tiny-2": tmp_path / "tiny"}


def test_names_are_given_one_after_another(models: Path, tmp_path: Path) -> None:
    """Another process takes over the name of a removed model at the same time."""
    removed, first, second = (folder(tmp_path / place / "tiny") for place in "abc")
    register_name(removed)
    removed.rmdir()
    names = models.parent / "names"
    with ThreadPoolExecutor(1) as pool:
        lock = os.open(names, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            name = pool.submit(register_name, second)
            with pytest.raises(FutureTimeoutError):
                name.result(0.2)
            (names / "tiny").unlink()
            (names / "tiny").symlink_to(first)
        finally:
            os.close(lock)
        assert name.result() == "tiny-2"
    assert registered() == {"tiny": first, "tiny-2": second}


def test_links_that_lead_to_each_other_are_no_fault_of_other_models(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = folder(tmp_path / "tiny")
    register_name(tiny)
    (models.parent / "names" / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "loop").symlink_to(tmp_path / "pool")
    (tmp_path / "pool").symlink_to(tmp_path / "loop")
    note_use_of(tmp_path / "loop")
    note_use_of(tiny)
    assert last_use("tiny") is not None
    assert main(["list"]) == 0
    assert f"{tmp_path / 'loop'} can't be read (Too many levels of symbolic links)" in capsys.readouterr().out
    assert main(["rm", "loop"]) == 0
    assert "which can't be read (Too many levels" in capsys.readouterr().out
    assert registered() == {"tiny": tiny}


def test_pulled_models_keep_their_names(models: Path) -> None:
    assert register_name(folder(models / "acme--a" / "4bit")) is None
    assert registered() == {}


def test_other_files_are_no_names(models: Path, tmp_path: Path) -> None:
    names = folder(models.parent / "names")
    (names / "file").write_text("")
    (names / "bad\x1bname").symlink_to(tmp_path)
    (names / "good").symlink_to(tmp_path)
    assert registered() == {"good": tmp_path}


def test_without_a_folder_that_can_be_written_there_are_no_names(tmp_path: Path) -> None:
    """The tests' own $XDG_DATA_HOME is no folder."""
    assert register_name(tmp_path) is None
    assert registered() == {}
    note_use_of(tmp_path)


def test_without_a_home_folder_models_have_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 3)  # a user whom no file names, as in some containers
    with pytest.raises(ConfigError, match="no home folder to keep models in") as caught:
        data_folder()
    assert "XDG_DATA_HOME" in caught.value.fix


def test_the_name_of_a_model_that_cannot_be_looked_for_is_not_taken_over(models: Path, tmp_path: Path) -> None:
    """Its folder has become a file."""
    lost = folder(tmp_path / "disk" / "tiny")
    register_name(lost)
    lost.rmdir()
    lost.parent.rmdir()
    lost.parent.write_bytes(b"")
    assert register_name(folder(tmp_path / "tiny")) == "tiny-2"
    assert registered()["tiny"] == lost
