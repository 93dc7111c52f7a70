"""Models that were pulled, by their names: in every command that takes a directory, and in list and rm."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from daemons import running_daemon
from http_servers import ServerProcess
from prepared import Prepared
from removals import IN_CHILD
from terminals import Terminal

import moetier
from moetier.runtime.model.names import checkpoint_or_model, model_directory, models_folder, name_of, pulled
from moetier.tiers.errors import IncompleteStoreError, StoreFormatError
from moetier.tiers.store.folder import GROUP, METADATA, PLAN, read_manifest, replacement_folder
from moetier.tools.cli.parser import directory, file_or_address, walk
from moetier.tools.convert.model_files import disk_bytes
from moetier.tools.main import build_parser, main
from moetier.tools.ray.options import model

MAIN = "import sys; from moetier.tools.main import main; sys.exit(main(sys.argv[1:]))"
NAME = "acme/tinymix:4bit"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for them, which children inherit."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data" / "moetier" / "models"


@pytest.fixture
def tinymix_there(models: Path, tinymix_4bit: Path) -> Path:
    return Path(shutil.copytree(tinymix_4bit, models / "acme--tinymix" / "4bit"))


def place(models: Path, *names: str) -> None:
    """As much of a model as has a name."""
    for name in names:
        hub_id, _, tag = name.partition(":")
        (models / hub_id.replace("/", "--") / tag / GROUP).mkdir(parents=True)


# names


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


def test_a_name_is_a_folder_and_a_folder_that_is_there_goes_before(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(models, "acme/a:4bit", "acme/b:4bit", "acme/b:3bit-trunk8bit", "alone:2bit")
    assert models_folder() == models
    assert list(pulled()) == ["acme/a:4bit", "acme/b:3bit-trunk8bit", "acme/b:4bit", "alone:2bit"]
    assert model_directory("acme/a:4bit") == model_directory("acme/a") == models / "acme--a" / "4bit"
    assert model_directory("alone") == models / "alone" / "2bit"
    assert name_of(models / "acme--b" / "4bit") == "acme/b:4bit"
    assert name_of(tmp_path / "else") == "else"
    assert checkpoint_or_model("acme/a:4bit") == str(models / "acme--a" / "4bit")  # of plan and quality
    assert checkpoint_or_model("acme/a") == "acme/a"  # which is the hub's
    with pytest.raises(StoreFormatError, match="with several tags") as caught:
        model_directory("acme/b")
    assert caught.value.fix == "Give one of them: acme/b:3bit-trunk8bit or acme/b:4bit."
    for path in ("/not/there", "./acme/a", "../x", "a/b/c", str(tmp_path / "nothing")):
        assert model_directory(path) == Path(path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "a").mkdir(parents=True)
    assert model_directory("acme/a") == Path("acme/a")


def test_a_name_that_nothing_has_is_said_with_those_that_are_near(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place(models, "mistralai/Mixtral-8x7B-v0.1:4bit")
    assert main(["inspect", "mistralai/Mixtral-8x7b:3bit"]) == 1
    cause, fix = capsys.readouterr().err.splitlines()
    there = Path.cwd() / "mistralai/Mixtral-8x7b:3bit"
    assert cause == f"moetier: There is no folder {there}, and no pulled model mistralai/Mixtral-8x7b:3bit."
    assert "`moetier list` has mistralai/Mixtral-8x7B-v0.1" in fix
    assert fix.endswith("pull it: moetier pull mistralai/Mixtral-8x7b --bits 3")
    assert main(["inspect", "./mistralai/Mixtral-8x7B-v0.1"]) == 1  # a path
    assert capsys.readouterr().err.startswith(
        f"moetier: There is no folder {Path.cwd()}/mistralai/Mixtral-8x7B-v0.1.\n"
    )
    assert main(["generate", "nobody/nothing", "x"]) == 1
    assert capsys.readouterr().err.endswith("  Pull it: moetier pull nobody/nothing\n")
    assert main(["generate", "nosuch", "x"]) == 1
    said = capsys.readouterr().err  # no model of the hub is called so
    assert f"There is no folder {Path.cwd()}/nosuch, and no pulled model nosuch." in said
    assert "moetier pull" not in said


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


# list


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


def test_what_it_takes_is_said_while_files_come_and_go(tmp_path: Path) -> None:
    (tmp_path / "stays").write_bytes(b"1" * 5000)
    ended = threading.Event()

    def convert() -> None:
        while not ended.is_set():
            for number in range(100):
                (tmp_path / f"{number}.partial").touch()
            for number in range(100):
                (tmp_path / f"{number}.partial").rename(tmp_path / str(number))
            for number in range(100):
                (tmp_path / str(number)).unlink()

    with ThreadPoolExecutor(1) as pool:
        converting = pool.submit(convert)
        try:
            for _ in range(100):
                assert disk_bytes(tmp_path) == 8192
        finally:
            ended.set()
        converting.result()


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


# rm


def test_rm_removes_all_that_is_named_or_nothing(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place(models, "acme/a:4bit", "acme/a:3bit", "acme/b:4bit")
    partial = models / "acme--b" / "4bit" / "download" / "x" / "whole" / "y.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"1" * 5000)
    assert main(["rm", "acme/b", "acme/c"]) == 1
    assert (
        capsys.readouterr().err
        == "moetier: There is no pulled model acme/c.\n  Run moetier list to see the names of all pulled models.\n"
    )
    assert main(["rm", "./acme/b"]) == 1
    assert "There is no pulled model ./acme/b." in capsys.readouterr().err
    assert main(["rm", "acme/a"]) == 1
    assert "Give one of them" in capsys.readouterr().err
    assert len(pulled()) == 3
    assert main(["rm", "acme/b", "acme/a:3bit"]) == 0
    assert capsys.readouterr().out.startswith("acme/b:4bit: removed, ")
    assert list(pulled()) == ["acme/a:4bit"]
    assert [path.name for path in models.iterdir()] == ["acme--a"]


@pytest.mark.parametrize("level", ["model", "id", "root"])
def test_rm_removes_nothing_outside(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], level: str
) -> None:
    """Where a part of the way is a link, but for the folder of all models, which may be anywhere."""
    elsewhere = tmp_path / "elsewhere" / "acme--a" / "4bit"
    (elsewhere / GROUP).mkdir(parents=True)
    (elsewhere / GROUP / METADATA).write_text("{}")
    link = {"model": models / "acme--a" / "4bit", "id": models / "acme--a", "root": models}[level]
    link.parent.mkdir(parents=True)
    link.symlink_to({"model": elsewhere, "id": elsewhere.parent, "root": elsewhere.parents[1]}[level])
    status = main(["rm", "acme/a", "--yes"])
    if level == "root":
        assert status == 0
        assert not elsewhere.exists()
        return
    assert status == 1
    assert "moetier removes nothing outside of" in capsys.readouterr().err
    assert (elsewhere / GROUP / METADATA).exists()


def test_rm_follows_no_link_within_a_model(models: Path, tmp_path: Path) -> None:
    place(models, "acme/a:4bit")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / METADATA).write_text("mine")
    (models / "acme--a" / "4bit" / "download").symlink_to(tmp_path / "outside")
    shutil.rmtree(models / "acme--a" / "4bit" / GROUP)
    (models / "acme--a" / "4bit" / GROUP).symlink_to(tmp_path / "outside")
    assert main(["rm", "acme/a:4bit"]) == 0
    assert (tmp_path / "outside" / METADATA).read_text() == "mine"
    assert not (models / "acme--a").exists()


def test_rm_asks_at_a_terminal(models: Path) -> None:
    place(models, "acme/a:4bit", "acme/b:4bit")
    command = ["-m", "moetier.tools.main", "rm", "acme/a", "acme/b"]
    with Terminal(*command, XDG_DATA_HOME=str(models.parents[1])) as terminal:
        terminal.wait_for(r"Remove acme/a:4bit \(.*\)\? \[y/N\] ")
        terminal.type("\n")
        terminal.wait_for(r"Remove acme/b:4bit \(.*\)\? \[y/N\] ")
        terminal.type("y\n")
        terminal.wait_for("acme/b:4bit: removed")
    assert list(pulled()) == ["acme/a:4bit"]


def test_rm_looks_again_behind_the_answer(models: Path) -> None:
    """Somebody began to use it meanwhile."""
    place(models, "acme/a:4bit")
    (file := models / "acme--a" / "4bit" / "config.json").write_text("{}")
    command = ["-m", "moetier.tools.main", "rm", "acme/a"]
    with Terminal(*command, XDG_DATA_HOME=str(models.parents[1])) as terminal:
        terminal.wait_for(r"Remove acme/a:4bit \(.*\)\? \[y/N\] ")
        with file.open() as stream:
            user = subprocess.Popen(["sleep", "100"], stdin=stream)
        try:
            terminal.type("y\n")
            terminal.wait_for(rf"acme/a:4bit is in use by process {user.pid} \(sleep 100\)")
        finally:
            user.kill()
            user.wait()
    assert file.exists()


def test_rm_refuses_what_a_conversion_has_locked(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As one of another user does, whose files nobody sees."""
    place(models, "acme/a:4bit")
    store = models / "acme--a" / "4bit" / GROUP
    (store / METADATA).write_text("{}")
    lock = os.open(store, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["rm", "acme/a"]) == 1
    finally:
        os.close(lock)
    assert "acme/a:4bit is in use: a conversion is writing into it." in capsys.readouterr().err
    assert (store / METADATA).exists()
    assert main(["rm", "acme/a"]) == 0


def test_rm_removes_what_would_replace_the_model_too(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless a conversion is writing it."""
    place(models, "acme/a:4bit")
    new = replacement_folder(models / "acme--a" / "4bit") / GROUP
    new.mkdir(parents=True)
    assert list(pulled()) == ["acme/a:4bit"]
    lock = os.open(new, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["rm", "acme/a"]) == 1
    finally:
        os.close(lock)
    assert "a conversion is writing into it" in capsys.readouterr().err
    assert list(pulled()) == ["acme/a:4bit"]
    assert main(["rm", "acme/a"]) == 0
    assert not (models / "acme--a").exists()


REMOVED = """
import json, shutil
from moetier.runtime.model.names import models_folder, pulled
from moetier.tools.main import main
old, folder = sys.argv[1], models_folder() / 'acme--a' / '4bit'

def removed(kill_at=None):
    return in_child(lambda: main(['rm', 'acme/a:4bit']), kill_at)

shutil.copytree(old, folder)
status, steps = removed()
left = []
for step in range(1, steps + 1):
    shutil.copytree(old, folder)
    killed, _ = removed(step)
    files = sum(len(names) for _, _, names in os.walk(folder))
    names = list(pulled())
    again = removed()[0] if names else 0
    left.append([step, killed, files, names, again, folder.exists() and os.listdir(folder)])
    shutil.rmtree(folder, ignore_errors=True)
print(json.dumps([status, left]), file=sys.stderr)
"""


def test_rm_that_is_killed_leaves_nothing_without_a_name(models: Path, scripts: Prepared, tmp_path: Path) -> None:
    (array := tmp_path / "old" / GROUP / "records" / "c").mkdir(parents=True)
    (whole := tmp_path / "old" / "download" / "x" / "whole").mkdir(parents=True)
    files = [array / "0", array / "1", array.parents[1] / METADATA, whole / "y", *(tmp_path / "old" / n for n in "az")]
    for file in files:
        file.write_bytes(b"1")
    result = scripts.run(IN_CHILD + REMOVED, tmp_path / "old", environment=dict(os.environ))
    assert result.returncode == 0, result.stderr
    status, steps = json.loads(result.stderr)
    assert status == 0
    assert len(steps) > 10
    for step, killed, count, names, again, rest in steps:
        assert (killed, again) == (-9, 0), step
        assert not count or names == ["acme/a:4bit"], step
        assert not rest, step


def test_the_default_place_is_below_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for wrong in ("", "not/absolute"):
        monkeypatch.setenv("XDG_DATA_HOME", wrong)
        assert models_folder() == tmp_path / ".local" / "share" / "moetier" / "models"
