"""What docs/deploy ships: commands that exist, settings that its tools understand."""

from __future__ import annotations

import configparser
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from moetier.tools.main import build_parser

DEPLOY = Path(__file__).parent.parent / "docs" / "deploy"
UNIT, SERVER = DEPLOY / "moetier.service", DEPLOY / "moetier-serve.service"


def unit(path: Path = UNIT) -> dict[str, str]:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # as configparser documents it
    parser.read_string(path.read_text())
    return dict(parser["Service"])


def compose() -> dict[str, Any]:
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert isinstance(found, dict)
    return found


def test_the_unit_starts_a_daemon() -> None:
    service = unit()
    _, *words = shlex.split(service["ExecStart"].replace("${RAM}", "24GiB"))
    arguments = build_parser().parse_args(words)
    assert arguments.command == "daemon"
    assert arguments.folder.startswith(f"/run/{service['RuntimeDirectory'].split()[0]}/")
    assert float(service["TimeoutStopSec"]) > arguments.drain
    assert (service["Type"], int(service["FileDescriptorStoreMax"]) > 0) == ("notify", True)


def test_the_other_unit_starts_a_server() -> None:
    service = unit(SERVER)
    _, *words = shlex.split(service["ExecStart"].replace("${RAM}", "24GiB"))
    arguments = build_parser().parse_args(words)
    assert (arguments.command, arguments.host) == ("serve", "127.0.0.1"), "without a key it is for this machine"
    assert service["MemoryDenyWriteExecute"] == "yes"


@pytest.mark.parametrize("unit", [UNIT, SERVER], ids=lambda path: path.name)
def test_systemd_understands_the_unit(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is missing")
    path = tmp_path / unit.name
    path.write_text(unit.read_text().replace("/opt/moetier/bin/moetier", shutil.which("true") or "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["daemon", "generate"])
def test_the_containers_run_commands(name: str) -> None:
    service = compose()["services"][name]
    words = [*service.get("entrypoint", ["moetier"])[1:], *service["command"]]
    words = [word.replace("${RAM:-8GiB}", "8GiB").replace("${METRICS:-}", "") for word in words]
    arguments = build_parser().parse_args(words)
    assert arguments.command == name
    assert name != "daemon" or arguments.metrics == "", "off unless it is said"
    if check := service.get("healthcheck"):
        assert build_parser().parse_args(check["test"][2:]).command == "stats"


def test_what_watches_finds_its_files(tmp_path: Path) -> None:
    """And Prometheus understands its own, where it is found."""
    found = compose()
    watching = [found["services"][name] for name in ("prometheus", "grafana")]
    assert all(service["profiles"] == ["watch"] for service in watching), "on demand"
    targets = {each["source"]: each["target"] for service in watching for each in service["configs"]}
    assert targets.keys() == found["configs"].keys()
    for name, config in found["configs"].items():
        path = tmp_path / Path(targets[name]).name
        path.write_text(config["content"] if "content" in config else (DEPLOY / config["file"]).read_text())
        assert yaml.safe_load(path.read_text())
    rules = yaml.safe_load(found["configs"]["prometheus"]["content"])
    assert {f"/etc/prometheus/{file}" for file in rules["rule_files"]} == {targets["alerts"]}
    assert rules["scrape_configs"][0]["static_configs"][0]["targets"] == ["daemon:9400"]
    assert "METRICS=0.0.0.0:9400" in (DEPLOY / "compose.yaml").read_text()
    provider = yaml.safe_load(found["configs"]["dashboards"]["content"])["providers"][0]
    assert Path(targets["dashboard"]).parent == Path(provider["options"]["path"])
    if (promtool := shutil.which("promtool")) is not None:
        command = [promtool, "check", "config", str(tmp_path / "prometheus.yml")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_compose_understands_the_file() -> None:
    if (docker_compose := shutil.which("docker-compose")) is None:
        pytest.skip("docker-compose is missing")
    command = [docker_compose, "-f", DEPLOY / "compose.yaml", "config", "--quiet"]
    done = subprocess.run(
        command, env={"MODEL": "/srv/model", "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
