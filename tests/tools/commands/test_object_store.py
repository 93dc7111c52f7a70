"""Commands on addresses in an object store."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_servers import FolderServer, served_folder

from moetier.tools.commands import doctor
from moetier.tools.main import main
from moetier.tools.plan import cold

pytest.importorskip("obstore")


@pytest.fixture
def server(tinymix_4bit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FolderServer]:
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 0.05)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with served_folder(tinymix_4bit) as running:
        yield running


def test_inspect_needs_no_weights(server: FolderServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", server.address, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["records"] > 0
    assert not server.records
    assert not (tmp_path / "cache").exists()


def test_verify_reads_all_and_fills_the_cache(
    server: FolderServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", server.address, "--store-cache", str(tmp_path / "own")]
    assert main(arguments) == 0
    assert "all good" in capsys.readouterr().out
    count = len(server.gets)
    assert main(arguments) == 0, "now it is an ordinary model directory"
    assert len(server.gets) == count
    assert not (tmp_path / "cache").exists()


def test_verify_names_what_is_altered(server: FolderServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.fault = lambda name: "altered" if "/c/1/" in name else ""
    assert main(["verify", server.address]) == 1
    said, advice = capsys.readouterr()
    assert "/c/1/0/0" in said
    assert "8 bad" in said, "each expert of the block"
    assert "push the original there again" in advice
    assert "conversion" not in advice


def test_doctor_names_the_address(server: FolderServer, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether experts are still to be fetched or not."""
    for _ in range(2):
        assert main(["doctor", server.address, "--json"]) == 0
        (found,) = [each for each in json.loads(capsys.readouterr().out)["findings"] if each["name"] == "store"]
        assert f"(moetier verify {server.address} reads them)" in found["found"]
        assert main(["verify", server.address]) == 0
        capsys.readouterr()


@pytest.mark.usefixtures("short_probes")
def test_plan_says_how_long_a_cold_start_takes(
    server: FolderServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold, "SECONDS", 0.05)
    arguments = ["plan", server.address, "--disk", "1", "--into", str(tmp_path), "--json"]
    assert main([*arguments, "--store-cache", "my cache", "--store-cache-size", "1GiB"]) == 0
    words = shlex.split(json.loads(capsys.readouterr().out)["recommended"]["chat"])
    assert words[2:7] == [server.address, "--store-cache", "my cache", "--store-cache-size", "1GiB"]
    assert main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert "--store-cache" not in plan["recommended"]["chat"]
    start = plan["cold_start"]
    assert start["address"] == server.address
    assert start["experts_s"] == pytest.approx(start["experts_bytes"] / start["bytes_per_s"])
    assert start["trunk_bytes"] > 0
    assert main(["verify", server.address]) == 0
    capsys.readouterr()
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["cold_start"] is None, "it is all here"


@pytest.mark.parametrize("address", ["s3:/bucket/model", "s3://", "https://", "ftp://host/model"])
@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_an_address_of_another_scheme_is_refused(
    command: str, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, address]) == 1
    cause, fix = capsys.readouterr().err.splitlines()
    assert cause == f"moetier: {address} is not an address that moetier knows."
    assert "s3://BUCKET/NAME" in fix


@pytest.mark.parametrize(
    "words",
    [
        *("inspect {}", "verify {}", "doctor {}", "plan {}", "generate {} x", "chat {}", "serve {}", "daemon {}"),
        *("link {}", "pull {}", "convert {} DST", "mirror {} FOLDER", "push DIR {}", "push {} file:///x", "ray {}"),
        *("trace {} FILE", "bench decode {}", "quality {} --text x", "generate DIR x --daemon {}", "stats {}"),
        *("replay {}", "mirror DIR {}", "convert DIR {}", "convert DIR DST --mirror {}"),
        *("ps {}", "generate DIR x --ram {}", "generate {} x --no-such-option"),
    ],
)
def test_no_command_prints_a_secret_or_keeps_it(
    words: str, tinymix_4bit: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    addresses = ["https://user:SECRET@host/model", "s3://KEY:SECRET@bucket/model", "https://host/model?sig=SECRET"]
    addresses += ["s3:/KEY:SECRET@bucket/model", "https://host/model?sig='SECRET"]
    addresses += ["user:SECRET@host"] if words.split()[0] in ("inspect", "verify", "pull", "replay", "push") else []
    addresses += ["ftp://user:SECRET@host/model", *(["user:SECRET@host:7000"] if "--daemon" in words else [])]
    for address in addresses:
        try:
            status = main([word.format(address).replace("DIR", str(tinymix_4bit)) for word in words.split()])
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 1
        said = "".join(capfd.readouterr())
        assert status != 0
        assert said
        assert "SECRET" not in said.replace("AWS_SECRET_ACCESS_KEY", "")
        kept = [path for path in tmp_path.rglob("*") if path.is_file()]  # compiled kernels, if a model was loaded
        assert not [path for path in kept if "SECRET" in path.name or b"SECRET" in path.read_bytes()]


def test_push_copies_to_an_address(
    tinymix_4bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    address = f"file://{tmp_path / 'there'}"
    assert main(["push", str(tinymix_4bit), address]) == 0
    assert main(["generate", address, "Once upon a time", "--max-new-tokens", "4", "--daemon", "none"]) == 0
    assert main(["push", str(tinymix_4bit), "nowhere"]) == 2
    assert "is not an address" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_an_error(
    server: FolderServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moetier.tiers.objects.client.RETRY_SECONDS", 0.1)
    server.stop()
    assert main(["inspect", server.address]) == 1
    cause, fix = capsys.readouterr().err.splitlines()
    assert server.address in cause
    assert "Check the address" in fix


def test_a_trunk_that_is_altered_is_refused(server: FolderServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.fault = lambda name: "altered" if name.startswith("trunk-") else ""
    assert main(["verify", server.address]) == 1
    assert "checksum mismatch" in capsys.readouterr().err
