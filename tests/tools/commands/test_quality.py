"""What quantised experts cost on the bundled model: the promised bounds, and a measurement made another way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from places import ASSETS

from moetier.tools.convert.api import convert
from moetier.tools.main import main
from moetier.tools.quality import quality as perplexity

TEXTS = ASSETS / "texts"


def quality(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main(["quality", *arguments, "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["rows"]
    return rows


def change(rows: list[dict[str, Any]], bits: int, method: str) -> float:
    """Of the perplexity over the unquantised model's."""
    (row,) = (row for row in rows if row["bits"] == bits and row["method"] == method)
    return float(row["perplexity"] / rows[0]["perplexity"] - 1)


@pytest.mark.slow
def test_every_width_keeps_its_promise(tinymix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = quality(capsys, str(tinymix), "--text", str(TEXTS), "--tokens", "512")
    assert [row["bits"] for row in rows] == [None, 16, 8, 4, 3, 2]
    assert change(rows, 16, "") == 0  # its checkpoint is bf16
    assert abs(change(rows, 8, "hqq")) < 0.001
    assert change(rows, 4, "hqq") < 0.01
    assert change(rows, 3, "hqq") < 0.025
    assert change(rows, 3, "hqq") < change(rows, 2, "hqq") < 0.1
    sizes = [row["stored_bytes"] for row in rows[1:]]
    assert sizes == sorted(sizes, reverse=True)
    errors = [row["error"] for row in rows[1:]]
    assert errors == sorted(errors)


@pytest.mark.slow
def test_hqq_is_better_than_plain_rounding_at_two_bits(tinymix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = quality(
        capsys, str(tinymix), "--text", str(TEXTS), "--tokens", "256", "--bits", "2", "--method", "hqq,rounding"
    )
    assert [row["method"] for row in rows] == ["", "hqq", "rounding"]
    _, hqq, rounding = rows
    assert hqq["error"] < rounding["error"]
    assert hqq["perplexity"] < rounding["perplexity"]
    assert hqq["stored_bytes"] == rounding["stored_bytes"]


@pytest.mark.slow
def test_fast_means_what_it_means_in_convert(tinymix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain rounding in place of HQQ, so that less is done, not more."""
    settings = ("--text", str(TEXTS / "it.txt"), "--tokens", "64", "--bits", "2")
    rows = quality(capsys, str(tinymix), *settings, "--fast")
    assert [row["method"] for row in rows] == ["", "rounding"]
    assert quality(capsys, str(tinymix), *settings, "--method", "rounding") == rows


def test_there_is_no_other_method(tinymix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["quality", str(tinymix), "--text", str(TEXTS), "--method", "hqq,best"])
    assert "'hqq,best' has an unknown method" in capsys.readouterr().err


@pytest.mark.slow
def test_changes_have_standard_errors_and_places(
    tinymix: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "WINDOW", 32)  # for speed
    settings = ("--text", str(TEXTS), "--tokens", "256", "--bits", "16,2")
    assert main(["quality", str(tinymix), *settings]) == 0
    head, first, same, far, *notes = capsys.readouterr().out.splitlines()
    assert "rank" in head
    assert "of 16 windows" in notes[0]
    assert " +0.00 ± 0.00 % " in same
    assert all(" 1-2 " in line for line in (first, same)), "they can't be told apart"
    assert " 3 " in far


def test_a_model_directory_is_measured_as_it_runs(
    tinymix: Path, tinymix_4bit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("--text", str(TEXTS / "python.txt"), "--tokens", "512")
    (row,) = quality(capsys, str(tinymix_4bit), *settings)
    _, expected = quality(capsys, str(tinymix), *settings, "--bits", "4")
    assert (row["bits"], row["group"], row["pairs"], row["method"]) == (4, "64", "bfloat16", "hqq")
    assert row["stored_bytes"] == expected["stored_bytes"]
    assert row["perplexity"] == pytest.approx(expected["perplexity"], rel=0.01)  # it runs in bf16


@pytest.mark.slow
def test_a_quantised_trunk(tinymix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In memory, and as a model directory runs it; the trunk is what it was in the way behind."""
    settings = ("--text", str(TEXTS / "python.txt"), "--tokens", "512")
    rows = quality(capsys, str(tinymix), *settings, "--bits", "16", "--trunk-bits", "8,4,16")
    plain, eight, four, again = (row["perplexity"] for row in rows)
    assert [row["trunk_bits"] for row in rows] == [16, 8, 4, 16]
    assert again == plain
    assert 0 < abs(eight / plain - 1) < 0.002
    assert 0.002 < four / plain - 1 < 0.05
    convert(tinymix, tmp_path / "dst", bits=16, trunk_bits=4)
    (row,) = quality(capsys, str(tmp_path / "dst"), *settings)
    assert (row["bits"], row["trunk_bits"], row["method"]) == (16, 4, "hqq")
    assert row["perplexity"] == pytest.approx(four, rel=0.01)  # it runs in bf16
    assert main(["quality", str(tmp_path / "dst"), *settings]) == 0
    assert capsys.readouterr().out.split()[:3] == ["bits", "trunk", "group"]


def test_the_table_for_people(tinymix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(TEXTS / "it.txt")
    settings = ("--tokens", "64", "--bits", "2", "--group-size", "64,32", "--fast")
    assert main(["quality", str(tinymix), "--text", text, *settings]) == 0
    head, first, *others = capsys.readouterr().out.splitlines()
    assert head.split()[-1] == "it"
    assert first.startswith("as it is")
    *others, note = others
    assert [line.split()[:2] for line in others] == [["2", "64"], ["2", "32"]]
    assert note.startswith("No ranks: with fewer than 8 windows")
    assert "rank" not in head


@pytest.mark.parametrize(
    ("arguments", "cause", "code"),
    [
        (("--text", "nowhere.txt"), "nowhere.txt is neither a file nor a folder", 1),
        (("--text", str(Path(__file__).parent)), "nor a folder with .txt files", 1),
        (("--text", str(TEXTS / "it.txt"), str(TEXTS / "it.txt")), "same name", 1),
        (("--text", str(TEXTS), "--tokens", "4", "--bits", "5"), "5 bits are not supported", 2),
        (("--text", str(TEXTS), "--tokens", "4", "--bits", "4", "--group-size", "48"), "Groups of 48", 2),
    ],
)
def test_mistakes(
    tinymix: Path, arguments: tuple[str, ...], cause: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quality", str(tinymix), *arguments]) == code
    error = capsys.readouterr().err
    assert cause in error
    assert "Traceback" not in error


def test_models_that_are_quantised_already_are_refused(
    tinymix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tinymix, tmp_path / "fp8", ignore=shutil.ignore_patterns("scripts"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    assert main(["quality", str(folder), "--text", str(TEXTS), "--tokens", "4"]) == 1
    assert "fp8 is quantised already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [("--bits", "2"), ("--group-size", "32"), ("--pairs", "uint8"), ("--method", "hqq"), ("--fast",)]
)
def test_a_way_to_store_a_model_that_is_stored_already_is_refused(
    tinymix_4bit: Path, option: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quality", str(tinymix_4bit), "--text", str(TEXTS / "it.txt"), *option]) == 1
    assert "is converted already" in capsys.readouterr().err


def test_fast_contradicts_another_method(tinymix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quality", str(tinymix), "--text", str(TEXTS / "it.txt"), "--fast", "--method", "hqq"]) == 2
    assert "--fast means --method rounding, but --method names another." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tinymix", "tinymix_4bit"])
def test_a_model_without_tokenizer_is_refused(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ignored = shutil.ignore_patterns("scripts", "tokenizer*")
    folder = shutil.copytree(request.getfixturevalue(name), tmp_path / "mute", ignore=ignored)
    assert main(["quality", str(folder), "--text", str(TEXTS / "it.txt"), "--tokens", "4"]) == 1
    error = capsys.readouterr().err
    assert f"{folder} has no tokenizer" in error
    assert "Traceback" not in error


def test_keys_and_values_in_8_bits_lose_little(tinymix_4bit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--text", str(TEXTS / "python.txt"), "--tokens", "1500", "--daemon", "none")
    exact, quantised = (
        quality(capsys, str(tinymix_4bit), *settings, "--kv-bits", bits)[0]["perplexity"] for bits in ("16", "8")
    )
    assert 0 < abs(quantised / exact - 1) < 0.003
