"""moetier rm removes what it is told to, and nothing else, whenever it is killed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from checkpoints import edit_tensors, save_checkpoint
from prepared import MAIN, Prepared
from pulled_models import place
from removals import IN_CHILD
from terminals import Terminal

from moetier.runtime.model.name_files import last_use, note_use, register_name, registered
from moetier.runtime.model.names import pulled
from moetier.tiers.store.folder import GROUP, METADATA, REPLACED, replacement_folder
from moetier.tools.main import main


def test_rm_removes_all_that_is_named_or_nothing(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place(models, "acme/a:4bit", "acme/a:3bit", "acme/b:4bit")
    partial = models / "acme--b" / "4bit" / "download" / "x" / "whole" / "y.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"1" * 5000)
    assert main(["rm", "acme/b", "acme/c"]) == 1
    assert (
        capsys.readouterr().err
        == "moetier: There is no model called acme/c.\n  Run moetier list to see the names of all models.\n"
    )
    assert main(["rm", "./acme/b"]) == 1
    assert "There is no model called ./acme/b." in capsys.readouterr().err
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
    """A link in the path is refused, except for the folder of all models, which may be a link."""
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


@pytest.fixture
def converted(models: Path, tmp_path: Path) -> Path:
    """Return a model directory outside of the folder of pulled models, as far as its name needs it."""
    folder = tmp_path / "own" / "tiny"
    (folder / GROUP / "records").mkdir(parents=True)
    (folder / GROUP / METADATA).write_text("{}")
    (folder / "config.json").write_text("{}")
    assert register_name(folder) == "tiny"
    return folder


def test_rm_of_a_converted_model_keeps_what_is_not_of_moetier(
    converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (converted / "notes" / "mine").mkdir(parents=True)
    (note := converted / "notes" / "a.txt").write_text("mine")
    assert main(["rm", "tiny"]) == 2, "there is no terminal to ask"
    assert (converted / GROUP / METADATA).exists()
    assert main(["rm", "tiny", "--yes"]) == 0
    assert f"{note}: stays, as it is not known to be of moetier" in capsys.readouterr().out
    assert list(converted.rglob("*")) == [note.parent, note]
    assert registered() == {}


def test_rm_keeps_files_that_only_look_like_moetiers(
    models: Path, tmp_path: Path, tinymix_4bit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tinymix_4bit, tmp_path / "tiny"))
    register_name(folder)
    (folder / "download" / ("a" * 40) / "whole").mkdir(parents=True)
    (folder / "download" / ("a" * 40) / "whole" / "x.safetensors").write_bytes(b"1")
    users = [folder / name for name in ("NOTICE.md", "chat_template.json", "download/mine.txt", "tokenizer.json")]
    for path in users:
        path.write_text("mine")
    assert main(["rm", "tiny", "--yes"]) == 0
    said = capsys.readouterr().out
    assert f" in {folder}\n" in said
    assert all(f"{path}: stays" in said for path in users)
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == users


def test_rm_finishes_a_replacement_that_was_interrupted(models: Path, tmp_path: Path, tinymix_4bit: Path) -> None:
    folder = Path(shutil.copytree(tinymix_4bit, tmp_path / "tiny"))
    shutil.copytree(tinymix_4bit, folder / REPLACED)
    (folder / REPLACED / "notes.txt").write_text("mine")
    register_name(folder)
    assert main(["rm", "tiny", "--yes"]) == 0
    assert list(folder.iterdir()) == [folder / "notes.txt"]


def test_rm_of_a_converted_model_removes_its_folder(converted: Path, scripts: Prepared) -> None:
    with Terminal(MAIN, "rm", "tiny", scripts=scripts) as terminal:
        terminal.wait_for(rf"Remove tiny in {converted} \(.*\)\? \[y/N\] ")
        terminal.type("y\n")
        terminal.wait_for("tiny: removed")
    assert not converted.exists()
    assert converted.parent.exists()
    assert registered() == {}


def test_a_conversion_that_has_failed_is_listed_and_removed(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_checkpoint(tmp_path / "src", shards=1)
    edit_tensors(source, lambda tensors: next(t for n, t in tensors.items() if "experts.2." in n).fill_(torch.nan))
    assert main(["convert", str(source), str(tmp_path / "tiny"), "--fast"]) == 1
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert f"incomplete: moetier convert {source} {tmp_path / 'tiny'} --bits 4 --fast resumes it" in out
    assert main(["rm", "tiny", "--yes"]) == 0
    assert not (tmp_path / "tiny").exists()
    assert registered() == {}


def test_rm_follows_no_link_in_place_of_a_converted_model(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = converted.rename(converted.with_name("elsewhere"))
    converted.symlink_to(elsewhere)
    assert main(["rm", "tiny", "--yes"]) == 1
    assert "leads through a link" in capsys.readouterr().err
    assert (elsewhere / GROUP / METADATA).exists()


def test_rm_forgets_what_is_gone_and_what_was_linked(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint := tmp_path / "checkpoint").mkdir()
    assert register_name(checkpoint) == "checkpoint"
    note_use("checkpoint")
    shutil.rmtree(converted)
    assert main(["rm", "tiny", "checkpoint"]) == 0
    assert f"nothing was removed of {converted}, which is gone" in capsys.readouterr().out
    assert checkpoint.exists()
    assert registered() == {}
    assert last_use("checkpoint") is None
