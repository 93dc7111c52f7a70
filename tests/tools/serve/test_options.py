"""The options of a server: what a command line gives, and the checked ServeConfig that is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moetier.runtime.config import Size
from moetier.tiers.errors import ConfigError
from moetier.tools.main import parse
from moetier.tools.ray.options import parsed
from moetier.tools.serve.options import OF_REPLICA, SERVE_OPTIONS, ServeConfig, alias, duration


def config_of(*words: str) -> ServeConfig:
    return ServeConfig.of(vars(parse(["serve", "model", *words])[0]))


def test_options_are_checked() -> None:
    assert alias("gpt-4o=Qwen/Qwen3:4bit") == ("gpt-4o", "Qwen/Qwen3:4bit")
    for text in ("gpt-4o", "=x", "x=", ""):
        with pytest.raises(ConfigError):
            alias(text)
    assert [duration(text) for text in ("5m", "90s", "1.5h", "30", "0", "-1", "-5m", "100ms")] == [
        300, 90, 5400, 30, 0, None, None, 0.1,
    ]  # fmt: skip
    for text in ("", "m", "5 m", "5d", "nan", "1e3"):
        with pytest.raises(ConfigError, match="is not a time"):
            duration(text)


def test_the_command_line_gives_each_option_and_each_default() -> None:
    assert config_of() == ServeConfig()
    words = [
        "--host=0.0.0.0", "--port=1", "--keep-alive=5m", "--name=n", "--api-key-file=/k", "--api-keys=/ks",
        "--leave-out=^x", "--parallel=2", "--queue=3", "--kv-cache-dir=/kv", "--kv-cache-disk=1GiB", "--kv-cache-ttl=2",
    ]  # fmt: skip
    assert len(words) == len(SERVE_OPTIONS)
    config = config_of(*words)
    assert config == ServeConfig(
        "0.0.0.0", 1, 300.0, "n", Path("/k"), Path("/ks"), "^x", 2, 3, Path("/kv"), Size(1 << 30), 2.0
    )
    assert config.most_requests == 5


def test_a_replica_has_the_options_that_do_not_depend_on_how_requests_arrive() -> None:
    options = vars(parsed({"model": "m", "parallel": 3, "kv_cache_disk": "10%"}))
    assert options.keys() & SERVE_OPTIONS.keys() == {*OF_REPLICA}
    config = ServeConfig.of(options)
    assert (config.parallel, config.kv_cache_disk) == (3, Size.parse("10%"))


def test_the_folder_on_disk_is_made_for_this_user_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_of().open_disk() is None
    monkeypatch.chdir(tmp_path)
    disk = config_of("--kv-cache-dir", "kv", "--kv-cache-disk", "1GiB", "--kv-cache-ttl", "0.5").open_disk()
    assert disk is not None
    assert (disk.folder, disk.size, disk.seconds) == (tmp_path / "kv", 1 << 30, 43_200.0)
    assert disk.folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is not a folder"):
        config_of("--kv-cache-dir", "file").open_disk()


def test_a_relative_folder_in_the_settings_file_starts_at_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[serve]\nkv-cache-dir = "kv"\n')
    monkeypatch.setenv("MOETIER_CONFIG", str(file))
    assert config_of().kv_cache_dir == tmp_path / "kv"


@pytest.mark.parametrize(
    ("options", "cause"), [({"parallel": 0}, "`parallel` is 0"), ({"leave_out": "("}, "not a regular expression")]
)
def test_a_value_that_is_not_allowed_is_an_error(options: dict[str, object], cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        ServeConfig.of(options)
