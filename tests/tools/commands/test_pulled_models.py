"""Models that were pulled, by their names: in every command that takes a directory."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from daemons import running_daemon
from http_servers import ServerProcess
from prepared import Prepared
from pulled_models import NAME

import moetier
from moetier.tiers.store.folder import GROUP, METADATA
from moetier.tools.cli.parser import directory, file_or_address, walk
from moetier.tools.main import build_parser, main
from moetier.tools.ray.options import model

MAIN = "import sys; from moetier.tools.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def tinymix_there(models: Path, tinymix_4bit: Path) -> Path:
    return Path(shutil.copytree(tinymix_4bit, models / "acme--tinymix" / "4bit"))


def test_every_command_that_takes_a_directory_takes_a_name() -> None:
    found = 0
    for path, parser in walk(build_parser()):
        for action in parser._actions:
            if action.metavar == "DIR" and not action.option_strings:
                # on Ray each node looks for the model itself, and a pulled model can't be linked
                other = {("ray",): model, ("link",): file_or_address}
                assert action.type is other.get(path, directory), path
                found += 1
    assert found >= 12


@pytest.mark.usefixtures("tinymix_there")
def test_models_run_by_name(scripts: Prepared, tmp_path: Path) -> None:
    def run(*words: str, text: str = "") -> str:
        result = scripts.run(MAIN, *words, input=text, environment=dict(os.environ))
        assert result.returncode == 0, result.stderr
        return result.stdout

    greedy = ("--temperature", "0", "--max-new-tokens", "8")
    made = run("generate", "acme/tinymix", "Once upon a time", "--json", *greedy)
    assert json.loads(made)["text"]
    assert run("chat", NAME, *greedy, text="Once upon a time\n").strip()
    assert json.loads(run("inspect", NAME, "--json"))["model"] == "tinymix"
    assert run("verify", NAME)
    model, tokenizer = moetier.load("acme/tinymix", daemon=None)
    with model.tiers:
        assert tokenizer is not None


def test_a_server_and_a_daemon_by_name_and_what_is_in_use_stays(
    models: Path, tinymix_there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # with ``env``, its command line is not that of a prepared process
    with running_daemon(Path(NAME), folder=tmp_path / "daemon", prefix=["env"]) as daemon:
        assert main(["rm", NAME]) == 1
        cause, fix = capsys.readouterr().err.splitlines()
        assert cause.startswith(f"moetier: {NAME} is in use by process {daemon.pid} (")
        assert f"daemon {NAME}" in cause
        assert fix == "  End every process that uses it, then try again."
        assert (tinymix_there / GROUP / METADATA).exists()
    (tmp_path / "server").mkdir()
    server = ServerProcess(Path(NAME), tmp_path / "server")
    try:
        with server.client() as client:
            assert [model.id for model in client.models.list()] == [NAME]
        assert main(["rm", NAME]) == 1
        assert f"process {server.process.pid} (" in capsys.readouterr().err
    finally:
        server.end()
    assert main(["rm", NAME]) == 0
    assert not models.joinpath("acme--tinymix").exists()
