from __future__ import annotations

import json
from pathlib import Path

import pytest

from moetier.tools.doctor.machine import State, configuration, findings_of
from moetier.tools.main import main


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.toml"
    path.write_text("[general]\nram = '50%'\n[generate]\ncontext = 100\n[replay]\nslots = '1-3'\n")
    monkeypatch.setenv("MOETIER_CONFIG", str(path))
    monkeypatch.setenv("MOETIER_CONVERT_BITS", "3")
    return path


def test_a_command(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "generate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["file"], found["file_exists"], list(found["settings"])) == (str(config), True, ["generate"])
    settings = found["settings"]["generate"]
    assert settings["ram"] == {
        "value": "50%",
        "source": "file",
        "where": f"{config}, [general] ram",
        "fault": None,
        "variable": "MOETIER_GENERATE_RAM",
    }
    assert (settings["context"]["value"], settings["policy"]["source"]) == (100, "default")


def test_all(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show"]) == 0
    sections = capsys.readouterr().out.split("\n\n")
    assert sections[0] == f"file  {config}"
    by_name = {section.splitlines()[0]: section.splitlines()[1:] for section in sections[1:]}
    rows = {(name, line.split()[0]): line.split(maxsplit=2)[1:] for name, lines in by_name.items() for line in lines}
    assert rows["[general]", "ram"] == ["50%", f"{config}, [general] ram"]
    assert rows["[general]", "context"] == ["-", "default"]
    assert rows["[generate]", "context"] == ["100", f"{config}, [generate] context"]
    assert rows["[convert]", "bits"] == ["3", "MOETIER_CONVERT_BITS"]
    assert rows["[replay]", "slots"][0] == "1,2,3"
    assert ("[trace]", "context") not in rows  # as in general


def test_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("MOETIER_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert main(["config", "show"]) == 0
    assert f"{tmp_path}/moetier/config.toml (does not exist)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ps", "general", "nothing"])
def test_a_command_without_settings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["config", "show", name])
    assert stop.value.code == 2
    assert "pull, convert" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "key"),
    [("ram = '6GB!'", "ram"), ("device-memory = '0%'", "device-memory"), ("device = 'gpu'", "device")],
)
def test_a_value_that_cannot_be_names_its_place(
    line: str, key: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of what only a run would look at; doctor says it too."""
    config.write_text(f"[general]\n{line}\n")
    assert main(["config", "show"]) == 1
    cause, fix = capsys.readouterr().err.splitlines()
    assert f"{config}, [general] {key}: " in cause
    assert "Give " in fix
    (found,) = findings_of("config", configuration)
    assert (found.state, f"[general] {key}: " in found.found) == (State.FAIL, True)


def test_the_rest_is_shown_beside_what_cannot_be(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text("top = 1\n[general]\nram = '6GB!'\nrma = '1GiB'\n[genrate]\n[ps]\nx = 1\n[convert]\nbits = 8\n")
    monkeypatch.setenv("MOETIER_GENERATE_SEED", "many")
    monkeypatch.setenv("MOETIER_SEDE", "1")
    assert main(["config", "show"]) == 1
    out, err = capsys.readouterr()
    rows = {tuple(line.split(maxsplit=2)) for line in out.splitlines()}
    assert ("ram", "6GB!", f"{config}, [general] ram: invalid") in rows
    assert ("seed", "many", "MOETIER_GENERATE_SEED: invalid") in rows
    assert ("bits", "3", "MOETIER_CONVERT_BITS") in rows
    assert out.count(": invalid") == 2
    unknown, *rest = err.splitlines()
    assert unknown.startswith("moetier: MOETIER_SEDE in the environment is not a setting")
    causes = rest[::2]
    words = ("top stands", "no key 'rma'", "section [genrate]", "ps has no settings", "'6GB!'", "'many'")
    assert len(causes) == len(words)
    assert all(sum(word in cause for cause in causes) == 1 for word in words)
    assert main(["config", "show", "convert", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["convert"]["bits"]["value"] == 3
    assert len(found["faults"]) == 4  # of the file and the environment as a whole: of values those that are shown


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_its_json_is_json_and_says_what_cannot_be(value: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(f"[generate]\ntemperature = {value}\n")
    assert main(["config", "show", "generate", "--json"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    shown = found["settings"]["generate"]
    assert shown["temperature"]["value"] == value
    assert [shown["temperature"]["fault"]] == found["faults"]
    assert shown["seed"]["fault"] is None


def test_a_file_that_is_no_toml_shows_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text("[general\n")
    assert main(["config", "show"]) == 1
    out, err = capsys.readouterr()
    assert (out, "is not TOML" in err) == ("", True)
