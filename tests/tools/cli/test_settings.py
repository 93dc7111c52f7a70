from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moetier.tiers.errors import ConfigError
from moetier.tools.cli.arguments import resources_of
from moetier.tools.cli.settings import Setting, config_file, mentioned, without_settings
from moetier.tools.main import main, parse

GENERATE = ["generate", "./DIR", "hello"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file, which is still to be written."""
    path = tmp_path / "config.toml"
    monkeypatch.setenv("MOETIER_CONFIG", str(path))
    path.touch()
    return path


def test_nothing_is_set() -> None:
    arguments, settings = parse(GENERATE)
    assert (arguments.context, arguments.configured, settings) == (None, {}, [])


def test_each_place_goes_before_the_next(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the last to the first."""
    config.write_text("[general]\ncontext = 1\n")
    arguments, (setting,) = parse(GENERATE)
    assert (arguments.context, arguments.configured, setting.source) == (1, {"context": 1}, "file")
    config.write_text("[general]\ncontext = 1\n[generate]\ncontext = 2\n")
    assert parse(GENERATE)[0].context == 2
    assert parse(["trace", "DIR", "--prompts", "F", "-o", "T"])[0].context == 1
    monkeypatch.setenv("MOETIER_CONTEXT", "3")
    assert parse(GENERATE)[0].context == 3
    monkeypatch.setenv("MOETIER_GENERATE_CONTEXT", "4")
    arguments, (setting,) = parse(GENERATE)
    assert (arguments.context, setting.source, setting.where) == (4, "environment", "MOETIER_GENERATE_CONTEXT")
    assert parse([*GENERATE, "--context", "5"])[0].context == 5
    monkeypatch.setenv("MOETIER_GENERATE_CONTEXT", "")
    assert parse(GENERATE)[0].context == 3


def test_values_are_what_the_option_makes_of_them(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text(
        "[general]\nlearn = true\nram = 1000\nspeculate = 'off'\n"
        "[generate]\ndaemon = ['a', 'b:1']\ntemperature = 1\ntoken-file = 'secret/token'\ntls-ca = '~/ca.pem'\n"
        "[quality]\nbits = [4, 3]\n"
    )
    monkeypatch.setenv("MOETIER_EXACT", "yes")
    found = vars(parse(GENERATE)[0])
    expected = {"learn": True, "ram": "1000", "speculate": "off", "daemon": "a,b:1", "temperature": 1.0, "exact": True}
    assert {name: found[name] for name in expected} == expected
    assert (found["token_file"], found["tls_ca"]) == (config.parent / "secret/token", Path.home() / "ca.pem")
    assert parse(["quality", "SRC", "--text", "F"])[0].bits == [4, 3]
    assert parse([*GENERATE, "--no-learn"])[0].learn is False


def test_a_general_key_is_for_options_of_its_type(config: Path) -> None:
    config.write_text("[general]\npolicy = 'lru'\nram = '1GiB'\ndevice = 'cpu'\ndaemon = 'none'\nexact = true\n")
    for words in (["generate", "DIR"], ["chat", "DIR"], ["serve", "DIR"], ["quality", "SRC", "--text", "F"]):
        found = parse(words)[0]
        values = found.policy, found.ram, found.device, found.daemon, found.exact
        assert values == ("lru", "1GiB", "cpu", "none", True), words
    assert (parse(["daemon", "DIR"])[0].policy, parse(["daemon", "DIR"])[0].ram) == ("lru", "1GiB")
    assert (parse(["plan", "SRC"])[0].ram, parse(["plan", "SRC"])[0].device) == ("1GiB", "cpu")
    assert parse(["replay", "T.npz"])[0].policy is None  # names of several, there


@pytest.mark.parametrize(
    ("text", "cause", "fix"),
    [
        ("[general", "is not TOML", "Correct"),
        ("ram = '1'", "ram stands outside of a section", "below [general]"),
        ("[genrate]", "no section [genrate]", "[generate]"),
        (
            "[generate]\nmax-new-token = 1",
            "[generate] has no key 'max-new-token'",
            "The most similar key is max-new-tokens.",
        ),
        ("[general]\nbits = 3", "[general] has no key 'bits'", "below [plan] or [pull] or [convert] or [quality]"),
        ("[convert]\nram = '1'", "[convert] has no key 'ram'", "below [general]"),
        ("[ps]\njson = true", "moetier ps has no settings", "[ps]"),
        ("[bench]\nrounds = 1", "moetier bench has no settings", "[bench]"),
        ("[general]\ncontext = 'many'", "[general] context is 'many'", "Set context to a whole number."),
        ("[general]\nspeculate = 'on'", "[general] speculate is 'on'", "to one of auto, off, always"),
        ("[general]\nspeculate = false", "[general] speculate is false", "to one of auto, off, always"),
        ("[general]\nlearn = 'perhaps'", "[general] learn is 'perhaps'", "true or false"),
        ("[general]\nram = 2020-01-01", "[general] ram is ", "to a value that --ram accepts"),
        ("[general]\nram = '6GX'", "[general] ram: '6GX' is not an amount of memory", "Give a size"),
        ("[general]\ncontext = 0", "[general] context: 0 is out of range.", "Give 1 to 2^31 - 1."),
        (f"[general]\ncontext = '{'9' * 400}'", "9 is out of range.", "Give 1 to 2^31 - 1."),
    ],
)
def test_mistakes_name_the_file_the_key_and_the_fix(
    text: str, cause: str, fix: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(text)
    assert main(GENERATE) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert cause in said[0]
    assert fix in said[1]
    assert str(config) in "".join(said)


@pytest.mark.parametrize(
    ("name", "value", "cause", "fix"),
    [
        ("MOETIER_CONTEXT", "x", "MOETIER_CONTEXT is 'x'", "whole number"),
        ("MOETIER_RAM", "6GX", "MOETIER_RAM: '6GX' is not an amount of memory", '"6GiB"'),
        ("MOETIER_DEVICE", "gpu", "MOETIER_DEVICE: 'gpu' is not a device", '"cuda"'),
        ("MOETIER_DAEMON", "a,,b", "MOETIER_DAEMON: 'a,,b' has a comma without a daemon", "single commas"),
        (
            "MOETIER_CONFIG",
            "/nonexistent/c.toml",
            "/nonexistent/c.toml, which MOETIER_CONFIG names, is missing",
            "unset MOETIER_CONFIG",
        ),
        ("MOETIER_CONFIG", "/", "/ can't be read", "MOETIER_CONFIG"),
        ("MOETIER_LOG", "loud", "MOETIER_LOG is 'loud'", "debug, info"),
    ],
)
def test_mistakes_in_the_environment(
    name: str, value: str, cause: str, fix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert main(GENERATE) == 1
    said = capsys.readouterr().err.splitlines()
    assert cause in said[0]
    assert fix in said[1]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("MOETIER_RAMM", "MOETIER_RAM"),
        ("MOETIER_RMA", "MOETIER_RAM"),
        ("MOETIER_CONVERT_BIT", "MOETIER_CONVERT_BITS"),
        ("MOETIER_DEBUGG", "MOETIER_DEBUG"),
        ("MOETIER_MAX_NEW_TOKENS", " or ".join(f"MOETIER_{c}_MAX_NEW_TOKENS" for c in ("GENERATE", "CHAT", "TRACE"))),
        ("MOETIER_VERSION", None),
        ("MOETIER_IMAGE_TAG", None),
    ],
)
def test_an_unknown_variable_is_a_warning(
    name: str, meant: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(name, "1")
    assert parse(GENERATE)[1] == []
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    ignored = f"{name} in the environment is not a setting of moetier, and is ignored."
    assert record.getMessage() == ignored + (f" Did you mean {meant}?" if meant else "")


def test_variables_of_others_are_let_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes sets these for a service that is called moetier."""
    for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_80_TCP_ADDR"):
        monkeypatch.setenv(f"MOETIER_{name}", "10.0.0.1")
    assert parse(GENERATE)[1] == []


def test_a_home_that_cannot_be_looked_into_has_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOETIER_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/dev/null")
    assert parse(GENERATE)[1] == []


def test_help_and_commands_without_settings_need_no_file(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text("[general")
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--help"])
    assert stop.value.code == 0
    assert main(["ps"]) == 0


def test_what_is_set_gives_way_to_a_daemon(config: Path) -> None:
    """Its memory is its own; and of a daemon of this host no token is asked."""
    config.write_text("[general]\nram = '6GiB'\npolicy = 'lru'\nlearn = true\n[generate]\ntoken-file = 'token'\n")

    def found(*more: str) -> dict[str, Any]:
        return resources_of(parse([*GENERATE, *more])[0])

    own = found("--daemon", "none")
    assert (own["ram"], own["policy"], own["learn"], own["credentials"].token_file) == ("6GiB", "lru", True, None)
    mapped = found("--daemon", "work")
    assert (mapped["ram"], mapped["policy"], mapped["learn"]) == (None, "lrfu", False)
    remote = found("--daemon", "host:1")
    assert (remote["ram"], remote["credentials"].token_file) == ("6GiB", config.parent / "token")
    with pytest.raises(ConfigError, match=r"Give `ram` to the daemon"):
        found("--daemon", "work", "--ram", "5GiB")


def test_quality_of_a_checkpoint_ignores_settings_of_tiers(
    config: Path, tinymix: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which refuses --ram for a checkpoint: here it goes on to what is wrong otherwise."""
    config.write_text("[general]\nram = '6GiB'\n")
    assert main(["quality", str(tinymix), "--text", "/nonexistent"]) == 1
    assert "/nonexistent" in capsys.readouterr().err
    assert main(["quality", str(tinymix), "--text", "/nonexistent", "--ram", "5GiB"]) == 1
    assert "without tiers" in capsys.readouterr().err


def test_the_file_is_where_xdg_has_it() -> None:
    assert config_file({"XDG_CONFIG_HOME": "/etc/xdg"}) == Path("/etc/xdg/moetier/config.toml")
    for base in ({}, {"XDG_CONFIG_HOME": "relative"}):
        assert config_file(base) == Path.home() / ".config/moetier/config.toml"
    assert config_file({"MOETIER_CONFIG": "/a.toml", "XDG_CONFIG_HOME": "/etc"}) == Path("/a.toml")


def test_an_environment_without_settings() -> None:
    found = without_settings({"MOETIER_RAM": "1", "MOETIER_CONVERT_FAST": "1", "MOETIER_DEBUG": "1", "PATH": "/bin"})
    assert found == {"MOETIER_CONFIG": "/dev/null", "MOETIER_DEBUG": "1", "PATH": "/bin"}


@pytest.mark.parametrize(("value", "is_named"), [("0", False), ("1.5", False), ("here.local", True), (0, False)])
def test_an_error_names_a_setting_by_its_text_and_not_by_a_number(value: object, is_named: bool) -> None:
    error = ConfigError("Other machines can reach here.local and 127.0.0.1, which took 1.5 s.", "Leave it out.")
    said = mentioned([Setting("keep-alive", value, "environment", "MOETIER_SERVE_KEEP_ALIVE")], error)
    assert said == (" (keep-alive is set by MOETIER_SERVE_KEEP_ALIVE.)" if is_named else "")
