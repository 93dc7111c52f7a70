"""The model card of a model directory, and of a model that was pushed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import yaml

from moetier.tiers.errors import ConfigError
from moetier.tiers.store.atomic import PARTIAL
from moetier.tiers.store.folder import GROUP, read_manifest
from moetier.tools.convert.api import convert
from moetier.tools.convert.model_card import CARD, MARK, is_card, model_card, write_card
from moetier.tools.convert.model_files import files_of_users, outside_store
from moetier.tools.main import main


def front_matter(card: str) -> dict[str, object]:
    matter: dict[str, object] = yaml.safe_load(card.split("---\n")[1])
    return matter


def program(card: str) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    return str(code)


def test_a_conversion_writes_a_card_whose_program_runs(
    tinymix_4bit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card, manifest = (tinymix_4bit / CARD).read_text(), read_manifest(tinymix_4bit / GROUP)
    assert front_matter(card)["library_name"] == "moetier"
    assert json.loads((tinymix_4bit / "config.json").read_text())["library_name"] == "moetier"
    rows = dict(re.findall(r"^\| ([a-z ]+) \| (.*) \|$", card, re.MULTILINE))
    assert rows["digest"] == f"`{manifest.digest}`"
    assert rows["weights of experts"] == "quantised by HQQ, in groups of 64"
    assert rows["experts"].startswith("8 blocks, 64 experts, ")
    assert "perplexity" not in rows
    monkeypatch.chdir(tinymix_4bit)
    exec(program(card), {})
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_what_the_source_is_called_cannot_change_the_card(tinymix_4bit: Path) -> None:
    manifest = read_manifest(tinymix_4bit / GROUP)
    card = model_card(replace(manifest, model='acme/a"\n---\n`|x')).decode()
    assert front_matter(card)["base_model"] == 'acme/a"\n---\n`|x'
    assert "\n---\n`" not in card
    assert front_matter(model_card(replace(manifest, model="acme/a")).decode())["base_model"] == "acme/a"


def test_a_card_of_the_user_stays(tinymix_4bit: Path, tmp_path: Path) -> None:
    folder, manifest = tmp_path / "model", read_manifest(tinymix_4bit / GROUP)
    copytree(tinymix_4bit, folder)
    path = folder / CARD
    assert is_card(path)
    assert path in outside_store(folder)
    path.write_text(path.read_text().replace(MARK, ""))
    mine = path.read_bytes()
    write_card(folder, manifest)
    assert path.read_bytes() == mine
    assert files_of_users(folder) == [path]
    assert main(["push", str(folder), f"file://{tmp_path}/bucket/model"]) == 0
    assert (tmp_path / "bucket" / "model" / CARD).read_bytes() == mine


def test_a_pushed_model_has_a_card_with_its_address(
    tinymix_4bit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    address, quality = f"file://{tmp_path}/bucket/model", tmp_path / "quality.json"
    measured = {"perplexity": 12.3456, "perplexity_by_text": {"a.txt": 12.3456}}
    quality.write_text(json.dumps({"model": "DIR", "tokens": 3072, "rows": [measured]}))
    assert main(["push", str(tinymix_4bit), address, "--quality", str(quality)]) == 0
    card = (tmp_path / "bucket" / "model" / CARD).read_text()
    assert "| perplexity | 12.346 over `a.txt`, at most 3,072 tokens of each |" in card
    capsys.readouterr()
    exec(program(card), {})
    assert capsys.readouterr().out.startswith("Once upon a time")
    (tmp_path / "bucket" / "model" / CARD).write_text("mine")
    assert main(["push", str(tinymix_4bit), address]) == 0
    assert (tmp_path / "bucket" / "model" / CARD).read_text() == "mine"
    assert main(["push", str(tinymix_4bit), address, "--overwrite"]) == 0
    assert MARK in (tmp_path / "bucket" / "model" / CARD).read_text()


def test_a_second_push_writes_the_perplexity_into_its_own_card_alone(
    tinymix_4bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, card = f"file://{tmp_path}/bucket/model", tmp_path / "bucket" / "model" / CARD
    (quality := tmp_path / "quality.json").write_text(
        json.dumps({"tokens": 3072, "rows": [{"perplexity": 12.3456, "perplexity_by_text": {"a.txt": 12.3456}}]})
    )
    assert main(["push", str(tinymix_4bit), address]) == 0
    assert "perplexity" not in card.read_text()
    assert main(["push", str(tinymix_4bit), address, "--quality", str(quality)]) == 0
    assert "| perplexity | 12.346 over" in card.read_text()
    assert main(["push", str(tinymix_4bit), address]) == 0
    assert "| perplexity | 12.346 over" in card.read_text()
    card.write_text("mine")
    capsys.readouterr()
    assert main(["push", str(tinymix_4bit), address, "--quality", str(quality)]) == 1
    assert "has a README.md that moetier did not write" in capsys.readouterr().err
    assert card.read_text() == "mine"


def test_a_complete_model_without_a_card_gets_one(tinymix: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    convert(tinymix, folder, fast=True)
    (folder / CARD).unlink()
    (cut := folder / f"{CARD}{PARTIAL}").mkdir()  # where the card is written first
    assert convert(tinymix, folder, fast=True).was_complete, "the card can't be written"
    assert not convert(tinymix, folder, fast=True, replace_first=True).was_complete
    assert not (folder / CARD).exists()
    cut.rmdir()
    convert(tinymix, folder, fast=True)
    assert is_card(folder / CARD)
    (folder / CARD).write_text("mine")
    convert(tinymix, folder, fast=True)
    assert (folder / CARD).read_text() == "mine"


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}', '{"rows": [{}], "tokens": 1}'])
def test_other_files_are_no_measurements(tinymix_4bit: Path, tmp_path: Path, text: str) -> None:
    (path := tmp_path / "quality.json").write_text(text)
    with pytest.raises(ConfigError, match="moetier quality"):
        model_card(read_manifest(tinymix_4bit / GROUP), "", path)
