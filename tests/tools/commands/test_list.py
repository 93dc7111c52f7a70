"""moetier list says what was pulled, converted and linked, and what is incomplete or gone."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from prepared import Prepared
from pulled_models import NAME, place
from users import as_nobody

import moetier
from moetier.runtime.model.name_files import register_name
from moetier.tiers.errors import IncompleteStoreError
from moetier.tiers.store.folder import GROUP, METADATA, PLAN, read_manifest
from moetier.tools.main import main


@pytest.fixture
def tinymix_there(models: Path, tinymix_4bit: Path) -> Path:
    return Path(shutil.copytree(tinymix_4bit, models / "acme--tinymix" / "4bit"))


def test_list_says_what_is_there(models: Path, tinymix_there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = Path(shutil.copytree(tinymix_there, models / "acme--part" / "4bit"))
    plan = read_manifest(part / GROUP).plan.to_json()
    (part / GROUP / METADATA).unlink()
    (part / GROUP / PLAN).write_text(json.dumps(plan))
    (part / "conversion.json").write_text(json.dumps({"command": ["moetier", "pull", "acme/part", "--fast\x1b"]}))
    place(models, "acme/empty:3bit-trunk8bit")
    (tinymix_there / "origin.json").write_text(json.dumps({"id": "acme/tinymix", "revision": "a" * 40}))
    assert main(["list", "--json"]) == 0
    empty, cut, whole = json.loads(capsys.readouterr().out)
    assert (whole["name"], whole["bits"], whole["trunk_bits"], whole["complete"]) == (NAME, 4, 16, True)
    assert (whole["type"], whole["origin"], whole["used_unix"]) == ("mixtral", "pulled", None)
    assert (whole["blocks"], whole["experts"], whole["revision"]) == (8, 64, "a" * 40)
    size = sum(path.stat().st_size for path in tinymix_there.rglob("*") if path.is_file())
    assert size <= whole["bytes"] < size * 1.2
    assert whole["pulled_unix"] == (tinymix_there / GROUP / METADATA).stat().st_mtime
    assert (cut["bits"], cut["complete"], cut["resume"]) == (4, False, "moetier pull acme/part '--fast\x1b'")
    assert (empty["bits"], empty["resume"]) == (None, "moetier pull acme/empty --bits 3 --trunk-bits 8 --overwrite")
    assert main(["list"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "type", "bits", "trunk", "size", "experts", "made", "last", "use", "from"]
    assert rows[0].endswith("incomplete: moetier pull acme/empty --bits 3 --trunk-bits 8 --overwrite replaces it")
    assert rows[1].endswith("incomplete: moetier pull acme/part '--fast?' resumes it")
    assert "8 x 8" in rows[2]
    assert rows[2].split()[-2:] == ["never", "pulled"]
    with pytest.raises(IncompleteStoreError, match="incomplete"):
        moetier.load("acme/part")


def test_list_passes_over_folders_that_nothing_pulled_is_called(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place(models, "acme/a:4bit", "we ird:4bit", "acme/b:4 bit", "a/b/c:4bit")
    assert main(["list", "--json"]) == 0
    assert [model["name"] for model in json.loads(capsys.readouterr().out)] == ["acme/a:4bit"]


FINISHED = """
import os, sys
from moetier.tools.main import main
def hook(event, arguments):
    if event == 'open' and str(arguments[0]).endswith('plan.json') and os.path.exists(arguments[0]):
        os.rename(os.path.join(os.path.dirname(arguments[0]), 'ready'), arguments[0].replace('plan.json', 'zarr.json'))
        os.remove(arguments[0])
sys.addaudithook(hook)
sys.exit(main(['list', '--json']))
"""


def test_list_while_a_conversion_ends(tinymix_there: Path, scripts: Prepared) -> None:
    """Its plan is there when it is looked for, and gone when it is read."""
    store = tinymix_there / GROUP
    (store / METADATA).rename(store / "ready")
    (store / PLAN).write_text("{}")
    result = scripts.run(FINISHED, environment=dict(os.environ))
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(result.stdout)
    assert (found["name"], found["bits"], found["complete"]) == (NAME, 4, True)
    assert not (store / PLAN).exists()


def test_list_of_nothing(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert capsys.readouterr().out.startswith("No models yet. Try: moetier demo")
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    capsys.readouterr()
    assert main(["list", "--json"]) == 0
    return {model["name"]: model for model in json.loads(capsys.readouterr().out)}


def test_converted_and_linked_models_have_names(
    models: Path, tmp_path: Path, tinymix: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(tinymix, tmp_path / "of mine"))
    assert main(["convert", str(source), str(tmp_path / "tiny"), "--fast", "--trunk-bits", "8"]) == 0
    assert "Next: moetier chat tiny -n 64 --temperature 0.6\n" in capsys.readouterr().err
    assert main(["link", str(source)]) == 0
    both = listed(capsys)
    tiny, linked = both["tiny"], both["of-mine"]
    assert [tiny[key] for key in ("origin", "type", "bits", "trunk_bits", "folder", "complete")] == [
        *("converted", "mixtral", 4, 8, str(tmp_path / "tiny"), True)
    ]
    assert [linked[key] for key in ("origin", "type", "bits", "folder")] == ["linked", "mixtral", 16, str(source)]
    assert linked["bytes"] == sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert main(["list"]) == 0
    assert f"converted in {tmp_path / 'tiny'}" in capsys.readouterr().out
    shutil.move(tmp_path / "tiny", tmp_path / "away")
    gone = listed(capsys)["tiny"]
    assert (gone["origin"], gone["complete"], gone["bytes"]) == (None, False, 0)
    assert main(["list"]) == 0
    assert f"{tmp_path / 'tiny'} is gone: moetier rm tiny forgets it" in capsys.readouterr().out


def test_a_model_of_another_user_is_listed_as_one_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, tinymix_4bit: Path
) -> None:
    def both() -> tuple[int, int, str]:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            return main(["list"]), main(["rm", "tiny"]), out.getvalue()

    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        monkeypatch.setenv("XDG_DATA_HOME", place)
        folder = Path(shutil.copytree(tinymix_4bit, Path(place, "tiny")))
        assert register_name(folder) == "tiny"
        folder.chmod(0o700)
        said = as_nobody(both)
    assert said.startswith("returned (0, 0, ")
    assert f"{folder} can't be read (Permission denied)" in said
    assert f"tiny: forgotten; nothing was removed of {folder}" in said


def test_the_last_use_is_noted_outside_of_the_model(
    models: Path, tinymix_there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in tinymix_there.rglob("*"))
    assert listed(capsys)[NAME]["used_unix"] is None
    with moetier.load(NAME, daemon=None):
        pass
    assert listed(capsys)[NAME]["used_unix"] == pytest.approx(time.time(), abs=300)
    assert sorted((path, path.stat().st_mtime_ns) for path in tinymix_there.rglob("*")) == before
