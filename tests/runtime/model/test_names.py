"""Names of pulled models: the folder that each stands for, and what is said of one that nothing has."""

from __future__ import annotations

from pathlib import Path

import pytest
from pulled_models import place

from moetier.runtime.model.names import checkpoint_or_model, listed_name, model_directory, models_folder, pulled
from moetier.tiers.errors import StoreFormatError
from moetier.tools.main import main


def test_a_name_is_a_folder_and_a_folder_that_is_there_goes_before(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(models, "acme/a:4bit", "acme/b:4bit", "acme/b:3bit-trunk8bit", "alone:2bit")
    assert models_folder() == models
    assert list(pulled()) == ["acme/a:4bit", "acme/b:3bit-trunk8bit", "acme/b:4bit", "alone:2bit"]
    assert model_directory("acme/a:4bit") == model_directory("acme/a") == models / "acme--a" / "4bit"
    assert model_directory("alone") == models / "alone" / "2bit"
    assert listed_name(models / "acme--b" / "4bit") == "acme/b:4bit"
    assert listed_name(tmp_path / "else") is None
    assert checkpoint_or_model("acme/a:4bit") == str(models / "acme--a" / "4bit")  # of plan and quality
    assert checkpoint_or_model("acme/a") == "acme/a"  # which is the hub's
    with pytest.raises(StoreFormatError, match="with several tags") as caught:
        model_directory("acme/b")
    assert caught.value.fix == "Give one of them: acme/b:3bit-trunk8bit or acme/b:4bit."
    for path in ("/not/there", "./acme/a", "../x", "a/b/c", str(tmp_path / "nothing")):
        assert model_directory(path) == Path(path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "a").mkdir(parents=True)
    assert model_directory("acme/a") == Path("acme/a")


def test_a_name_that_nothing_has_is_reported_with_those_that_are_near(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place(models, "mistralai/Mixtral-8x7B-v0.1:4bit")
    assert main(["inspect", "mistralai/Mixtral-8x7b:3bit"]) == 1
    cause, fix = capsys.readouterr().err.splitlines()
    there = Path.cwd() / "mistralai/Mixtral-8x7b:3bit"
    assert cause == f"moetier: There is no folder {there}, and no model called mistralai/Mixtral-8x7b:3bit."
    assert "`moetier list` has mistralai/Mixtral-8x7B-v0.1" in fix
    assert fix.endswith("pull it: moetier pull mistralai/Mixtral-8x7b --bits 3")
    assert main(["inspect", "./mistralai/Mixtral-8x7B-v0.1"]) == 1  # a path
    assert capsys.readouterr().err.startswith(
        f"moetier: There is no folder {Path.cwd()}/mistralai/Mixtral-8x7B-v0.1.\n"
    )
    assert main(["generate", "nobody/nothing", "x"]) == 1
    assert capsys.readouterr().err.endswith("  Run moetier plan nobody/nothing: its last lines pull and run it\n")
    assert main(["generate", "nosuch", "x"]) == 1
    said = capsys.readouterr().err  # no model of the hub is called so
    assert f"There is no folder {Path.cwd()}/nosuch, and no model called nosuch." in said
    assert "moetier pull" not in said


def test_the_default_place_is_below_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for wrong in ("", "not/absolute"):
        monkeypatch.setenv("XDG_DATA_HOME", wrong)
        assert models_folder() == tmp_path / ".local" / "share" / "moetier" / "models"
