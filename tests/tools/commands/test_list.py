"""moetier list says what was pulled, and what is incomplete."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from prepared import Prepared
from pulled_models import NAME, place

import moetier
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
    assert (whole["blocks"], whole["experts"], whole["revision"]) == (8, 64, "a" * 40)
    size = sum(path.stat().st_size for path in tinymix_there.rglob("*") if path.is_file())
    assert size <= whole["bytes"] < size * 1.2
    assert whole["pulled_unix"] == (tinymix_there / GROUP / METADATA).stat().st_mtime
    assert (cut["bits"], cut["complete"], cut["resume"]) == (4, False, "moetier pull acme/part '--fast\x1b'")
    assert (empty["bits"], empty["resume"]) == (None, "moetier pull acme/empty --bits 3 --trunk-bits 8 --overwrite")
    assert main(["list"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "bits", "trunk", "size", "experts", "pulled"]
    assert rows[0].endswith("incomplete: moetier pull acme/empty --bits 3 --trunk-bits 8 --overwrite replaces it")
    assert rows[1].endswith("incomplete: moetier pull acme/part '--fast?' resumes it")
    assert "8 x 8" in rows[2]
    assert rows[2].split()[-1] == "complete"
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
    assert capsys.readouterr().out == f"There are no pulled models in {models}.\n"
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
