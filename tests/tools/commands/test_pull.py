"""A model is pulled from a hub: what comes of it, what is on the disk meanwhile, and what goes wrong on the way."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from checkpoints import edit_json, reshard, save_checkpoint, tree
from faults import mounted
from hubs import READ_SETTINGS, REVISION, Hub, serve_hub
from prepared import Prepared
from safetensors.torch import load_file, save_file
from threads import wait_until

from moetier.tiers.store.folder import JOURNAL
from moetier.tools.convert.api import convert
from moetier.tools.convert.conversion_plan import stages
from moetier.tools.main import main

Converted = Callable[..., dict[str, bytes]]
MAIN = "import sys; from moetier.tools.main import main; sys.exit(main(sys.argv[1:]))"
OFFLINE = "import huggingface_hub.constants as constants; constants.HF_HUB_OFFLINE = True\n"  # read when it is imported
NOTED = """
import os, sys
from pathlib import Path
from moetier.tools.main import main
Path(sys.argv[1]).write_text(str(os.getpid()))
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixtral of 3 blocks of 8 experts, in 3 files."""
    return save_checkpoint(tmp_path_factory.mktemp("small") / "src")


@pytest.fixture(scope="module")
def tinymix_12(tinymix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 blocks of 8 experts in 12 files: most files have parts of two blocks, and most blocks lie in three."""
    return reshard(tinymix, tmp_path_factory.mktemp("12") / "tinymix", 12)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def served(place: Path) -> Iterator[Hub]:
    with serve_hub({}, place / "cache") as hub:
        yield hub


@pytest.fixture
def hub(served: Hub, models: Path) -> Iterator[Hub]:
    """Each test pulls into a folder of its own, and takes its faults back."""
    served.asked.clear()
    yield served
    for faults in (served.refused, served.cut, served.tampered, served.instead, served.watched):
        faults.clear()


@pytest.fixture(scope="module")
def scripts(scripts: Prepared, served: Hub) -> Prepared:
    return scripts.extended(READ_SETTINGS, **served.settings)


def offer(hub: Hub, name: str, folder: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    hub.repositories[name] = files
    return files


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """Return a function that converts a checkpoint in huggingface_hub's cache, once for each set of options."""

    @cache
    def make(name: str, folder: Path, **options: Any) -> dict[str, bytes]:
        place = tmp_path_factory.mktemp("converted")
        snapshot = place / f"models--{name.replace('/', '--')}" / "snapshots" / REVISION
        shutil.copytree(folder, snapshot)
        convert(snapshot, place / "dst", **options)
        return tree(place / "dst")

    return make


def disk_bytes(folder: Path) -> int:
    found = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            found += path.lstat().st_blocks * 512
    return found


def shards_asked(hub: Hub) -> list[str]:
    return [path.rpartition("/")[2] for path in hub.asked if path.endswith(".safetensors")]


# what is made


@pytest.mark.parametrize("options", [pytest.param([], marks=pytest.mark.slow), ["--trunk-bits", "8"]])
def test_it_is_what_convert_makes_and_files_go_as_it_does(
    hub: Hub,
    scripts: Prepared,
    converted: Converted,
    models: Path,
    tinymix_12: Path,
    tmp_path: Path,
    options: list[str],
) -> None:
    name = "acme/tinymix"
    files = offer(hub, name, tinymix_12)
    largest = max(len(data) for file, data in files.items() if file.endswith(".safetensors"))
    total = sum(len(data) for file, data in files.items() if file.endswith(".safetensors"))
    folder = models / name.replace("/", "--") / ("4bit" if not options else "4bit-trunk8bit")
    begun, taken = list[str](), list[int]()
    hub.watched.extend([begun.append, lambda _: taken.append(disk_bytes(folder / "download"))])
    result = scripts.run(MAIN, "pull", name, "--fast", "--json", *options)
    assert result.returncode == 0, result.stderr
    assert begun == sorted(file for file in files if file.endswith(".safetensors"))
    staying = 9 << 20  # tensors of the trunk, which are 7 MiB, and pages of samples
    assert max(taken) <= 3 * largest + staying < total / 2
    made = tree(folder)
    assert made == converted(name, tinymix_12, fast=True, trunk_bits=8 if options else 16)
    assert json.loads(made["origin.json"]) == {"id": name, "revision": REVISION}
    assert not (folder / "download").exists()
    again = scripts.run(MAIN, "pull", name, "--fast", "--json", *options)
    assert json.loads(again.stdout)["was_complete"]
    assert tree(folder) == made
    assert len(begun) == 12
    assert "55.07 MiB will be downloaded; at most 13.89 MiB on the disk at any one time" in result.stderr


def test_files_go_where_the_folder_of_models_is_behind_a_link(
    hub: Hub, scripts: Prepared, converted: Converted, small: Path, tmp_path: Path
) -> None:
    """And its path has a `..` in it."""
    offer(hub, "acme/small", small)
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    data, there = tmp_path / "real" / ".." / "linked", list[int]()
    hub.watched.append(lambda _: there.append(len(list((tmp_path / "real").rglob("whole/*.safetensors")))))
    result = scripts.run(MAIN, "pull", "acme/small", "--fast", environment={"XDG_DATA_HOME": str(data)})
    assert result.returncode == 0, result.stderr
    assert len(there) == 4
    assert max(there) <= 2
    made = tree(tmp_path / "real" / "moetier" / "models" / "acme--small" / "4bit")
    assert made == converted("acme/small", small, fast=True)


def test_a_model_of_one_file(
    hub: Hub, scripts: Prepared, converted: Converted, models: Path, small: Path, tmp_path: Path
) -> None:
    one = reshard(small, tmp_path / "one", 1)
    offer(hub, "acme/one", one)
    result = scripts.run(MAIN, "pull", "acme/one", "--bits", "3")
    assert result.returncode == 0, result.stderr
    assert tree(models / "acme--one" / "3bit") == converted("acme/one", one, bits=3)


def test_what_is_kept_is_in_the_cache_and_read_there(
    hub: Hub, scripts: Prepared, converted: Converted, place: Path, models: Path, small: Path, tmp_path: Path
) -> None:
    """A second width downloads nothing then, and needs no network."""
    files = offer(hub, "acme/kept", small)
    result = scripts.run(MAIN, "pull", "acme/kept", "--keep-source")
    assert result.returncode == 0, result.stderr
    assert "kept in" in result.stderr
    snapshot = place / "cache" / "models--acme--kept" / "snapshots" / REVISION
    shards = {name: data for name, data in files.items() if name.endswith(".safetensors")}
    assert {path.name: path.read_bytes() for path in snapshot.glob("*.safetensors")} == shards
    hub.asked.clear()
    result = scripts.run(OFFLINE + MAIN, "pull", "acme/kept", "--bits", "2")
    assert result.returncode == 0, result.stderr
    refused = scripts.run(OFFLINE + MAIN, "pull", "acme/never-seen")
    assert hub.asked == []
    assert tree(models / "acme--kept" / "2bit") == converted("acme/kept", small, bits=2)
    assert {path.name for path in snapshot.glob("*.safetensors")} == set(shards)
    assert "The hub could not be reached for a model with the id acme/never-seen: " in failed(refused)


# ahead

SLOW = """
import sys, time
from pathlib import Path
import moetier.tools.convert.conversion, transformers.models.mixtral.modeling_mixtral
from moetier.tools.main import main
from moetier.tools.convert.encoder import Encoder
begun, encode, first = Path(sys.argv[1]), Encoder._encode, True

def patient(self, *arguments):
    global first
    deadline = time.monotonic() + 60
    while first and not begun.exists():  # the first of all experts, until another download is under way
        assert time.monotonic() < deadline, "nothing is downloaded meanwhile"
        time.sleep(0.01)
    first = False
    return encode(self, *arguments)

Encoder._encode = patient
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def apart(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, each block in a file of its own, and what is beside the blocks in the last."""
    return by_block(small, tmp_path_factory.mktemp("apart") / "src", files=3)


def by_block(checkpoint: Path, folder: Path, *, files: int) -> Path:
    """Each block in a file of its own, what is beside them in the last of the ``files``."""
    shutil.copytree(checkpoint, folder)
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    layers = {name: int(found[1]) if (found := re.search(r"layers\.(\d)", name)) else files - 1 for name in tensors}
    names = {name: f"model-{layer + 1:05}-of-{files:05}.safetensors" for name, layer in layers.items()}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in tensors if names[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def test_the_next_file_is_downloaded_while_blocks_are_made(
    hub: Hub, scripts: Prepared, converted: Converted, models: Path, apart: Path, tmp_path: Path
) -> None:
    """The first expert waits until the second file is under way, whose end waits until the first block is written."""
    offer(hub, "acme/apart", apart)
    folder = models / "acme--apart" / "4bit"
    begun, there = list[str](), list[int]()

    def watch(file: str) -> None:
        begun.append(file)
        whole = folder / "download" / REVISION / "whole"
        there.append(len([*whole.rglob("*.safetensors"), *whole.rglob("*.incomplete")]))
        if len(begun) == 2:
            (tmp_path / "begun").touch()
            wait_until(lambda: "0" in json.loads((folder / JOURNAL).read_bytes())["errors"])

    hub.watched.append(watch)
    result = scripts.run(SLOW, tmp_path / "begun", "pull", "acme/apart", "--fast")
    assert result.returncode == 0, result.stderr
    assert begun == [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    assert max(there) == 2
    assert tree(folder) == converted("acme/apart", apart, fast=True)


PATIENT = """
import sys, threading
import moetier.tools.convert.conversion, transformers.models.mixtral.modeling_mixtral
from moetier.tools.main import main
from moetier.tools.convert.encoder import Encoder
encode = Encoder._encode

def patient(self, *arguments):
    for thread in threading.enumerate():
        if thread.name == "moetier-download":  # the next file is whole before a block is
            thread.join()
    return encode(self, *arguments)

Encoder._encode = patient
sys.exit(main(sys.argv[1:]))
"""


def test_a_file_that_no_block_needs_comes_behind_those_that_came_ahead(
    hub: Hub, scripts: Prepared, converted: Converted, models: Path, small: Path, tmp_path: Path
) -> None:
    source = by_block(small, tmp_path / "src", files=4)
    offer(hub, "acme/beside", source)
    result = scripts.run(PATIENT, "pull", "acme/beside", "--fast")
    assert result.returncode == 0, result.stderr
    assert tree(models / "acme--beside" / "4bit") == converted("acme/beside", source, fast=True)


# cut


LATE = """
import os, signal, sys, threading
from pathlib import Path
from moetier.tools.convert.api import convert_from_hub
from moetier.tools.convert.options import Options
from moetier.tools.convert import streaming
from moetier.tools.convert.streaming import Download
streaming.DOWNLOAD_GRACE, check_sum = 0, Download._check_sum

def late(self, found, remote, name):
    check_sum(self, found, remote, name)
    if threading.current_thread().name == "moetier-download":
        os.kill(os.getpid(), signal.SIGINT)
        self._halted.wait()

Download._check_sum = late
try:
    convert_from_hub("acme/late", Path(sys.argv[1]), Options(fast=True), ["pull", "acme/late"])
except KeyboardInterrupt:
    pass
for thread in threading.enumerate():
    if thread.name == "moetier-download":
        thread.join()
"""


def test_a_download_ahead_that_was_not_waited_for_says_nothing_of_its_file(
    hub: Hub, scripts: Prepared, apart: Path, tmp_path: Path
) -> None:
    """The directory may be another conversion's by then."""
    offer(hub, "acme/late", apart)
    result = scripts.run(LATE, tmp_path / "dst")
    assert result.returncode == 0, result.stderr
    (shards,) = (tmp_path / "dst" / "download").rglob("shards")
    assert not (shards / "model-00002-of-00003.safetensors").exists()


def test_interrupted_in_a_download_ahead_it_goes_on(
    hub: Hub, scripts: Prepared, converted: Converted, models: Path, apart: Path, tmp_path: Path
) -> None:
    offer(hub, "acme/apart", apart)
    folder, begun = models / "acme--apart" / "4bit", list[str]()

    def interrupt(file: str) -> None:
        begun.append(file)
        if len(begun) == 2:
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGINT)

    hub.watched.append(interrupt)
    result = scripts.run(NOTED, tmp_path / "pid", "pull", "acme/apart", "--fast")
    assert (result.returncode, "Traceback" in result.stderr) == (128 + signal.SIGINT, False), result.stderr
    assert "stopped. Run the same command again" in result.stderr
    result = scripts.run(MAIN, "pull", "acme/apart", "--fast")
    assert result.returncode == 0, result.stderr
    assert begun.count(begun[0]) == 1
    assert tree(folder) == converted("acme/apart", apart, fast=True)


SYNCED = """
import os, sys
from moetier.tools.main import main
real, said = os.fsync, open(sys.argv[1], 'w')

def synced(descriptor):
    real(descriptor)
    print('sync', os.readlink(f'/proc/self/fd/{descriptor}'), file=said)

def hook(event, arguments):
    if event == 'os.rename': print('name', os.path.abspath(arguments[1]), file=said)

os.fsync = synced
sys.addaudithook(hook)
status = main(sys.argv[2:])
said.close()
sys.exit(status)
"""


def test_a_file_is_on_the_disk_before_a_link_says_that_it_is_whole(
    hub: Hub, scripts: Prepared, small: Path, models: Path, tmp_path: Path
) -> None:
    files = offer(hub, "acme/small", small)
    result = scripts.run(SYNCED, tmp_path / "said", "pull", "acme/small", "--fast")
    assert result.returncode == 0, result.stderr
    said = (tmp_path / "said").read_text().splitlines()
    place = models.resolve() / "acme--small" / "4bit" / "download" / REVISION
    for file in (file for file in files if file.endswith(".safetensors")):
        before = said[: said.index(f"name {place}/shards/{file}")]
        assert f"sync {place}/whole/{file}" in before
        assert f"sync {place}/whole" in before[before.index(f"sync {place}/whole/{file}") :]
        assert f"sync {place}" in before


def test_killed_in_a_download_it_goes_on_and_fetches_nothing_twice(
    hub: Hub, scripts: Prepared, converted: Converted, models: Path, tinymix_12: Path, tmp_path: Path
) -> None:
    """While the seventh file is on its way."""
    offer(hub, "acme/tinymix", tinymix_12)
    folder, begun = models / "acme--tinymix" / "4bit", list[str]()

    def kill(file: str) -> None:
        begun.append(file)
        if len(begun) == 7:
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)

    hub.watched.append(kill)
    result = scripts.run(NOTED, tmp_path / "pid", "pull", "acme/tinymix", "--fast")
    assert result.returncode == -signal.SIGKILL
    assert len(begun) == 7
    listed = scripts.run(MAIN, "list")
    (line,) = [line for line in listed.stdout.splitlines() if line.startswith("acme/tinymix:4bit")]
    assert "incomplete: moetier pull acme/tinymix --bits 4 --fast resumes it" in line
    incomplete = scripts.run(MAIN, "inspect", "acme/tinymix:4bit")
    assert incomplete.returncode == 1
    assert "Resume it: moetier pull acme/tinymix --bits 4 --fast" in incomplete.stderr
    assert list(folder.rglob("*.incomplete"))
    result = scripts.run(MAIN, "pull", "acme/tinymix", "--fast")
    assert result.returncode == 0, result.stderr
    assert "resumed: " in result.stderr
    assert begun[7:] == sorted(set(begun))[6:]  # the seventh again, and what comes behind it
    assert tree(folder) == converted("acme/tinymix", tinymix_12, fast=True)


LESS = """
from moetier.tools.convert.streaming import Download
keep = Download.keep_tensors
Download.keep_tensors = lambda self, names: keep(self, [name for name in names if 'self_attn' not in name])
"""


def test_what_another_version_did_not_keep_is_fetched_anew(
    hub: Hub, scripts: Prepared, converted: Converted, models: Path, small: Path, tmp_path: Path
) -> None:
    """It took attention for what is not read behind the blocks, and was killed while the last file was on its way."""
    files = offer(hub, "acme/small", small)
    *_, last = sorted(file for file in files if file.endswith(".safetensors"))

    def kill(file: str) -> None:
        if file == last:
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)

    hub.watched.append(kill)
    result = scripts.run(LESS + NOTED, tmp_path / "pid", "pull", "acme/small", "--fast")
    assert result.returncode == -signal.SIGKILL
    folder = models / "acme--small" / "4bit"
    assert [path for path in folder.rglob("shards/*.safetensors") if not path.is_symlink()]
    hub.watched.clear()
    result = scripts.run(MAIN, "pull", "acme/small", "--fast")
    assert result.returncode == 0, result.stderr
    assert tree(folder) == converted("acme/small", small, fast=True)


STEPS = """
import json, os, signal, sys
from pathlib import Path
import moetier.tools.convert.conversion, transformers.models.mixtral.modeling_mixtral
from moetier.tools.convert.api import convert_from_hub
from moetier.tools.convert.options import Options
name, work, every = sys.argv[1:]

def in_child(target, kill_at=None):
    if not (pid := os.fork()):
        done = 0
        def hook(event, arguments):
            global steps
            nonlocal done
            if event in ('os.rename', 'os.remove', 'os.symlink', 'shutil.rmtree', 'os.truncate') and (
                any(str(target) in str(each) for each in arguments)
            ):
                done += 1
                if done == kill_at: os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        convert_from_hub(name, target, Options(fast=True), ["pull", name])
        Path(work, 'steps').write_text(str(done))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert in_child(Path(work, 'count')) == 0
steps = int(Path(work, 'steps').read_text())
print(steps)
for step in range(1, steps + 1, int(every)):
    print(json.dumps([step, in_child(Path(work, str(step)), step), in_child(Path(work, str(step)))]))
"""


def test_killed_at_any_step_it_goes_on(
    hub: Hub, scripts: Prepared, converted: Converted, small: Path, tmp_path: Path
) -> None:
    """Each change of a name in the target, or a few of them."""
    offer(hub, "acme/small", small)
    work = tmp_path / "work"
    work.mkdir()
    result = scripts.run(STEPS, "acme/small", work, 15)
    assert result.returncode == 0, result.stderr
    steps, *runs = map(json.loads, result.stdout.splitlines())
    assert steps > 30
    wanted = converted("acme/small", small, fast=True)
    for step, killed, again in runs:
        assert (killed, again) == (-signal.SIGKILL, 0), step
        assert tree(work / str(step)) == wanted, step


def test_a_commit_stays_what_it_was_begun_with(hub: Hub, scripts: Prepared, small: Path, models: Path) -> None:
    """And another is another model."""
    offer(hub, "acme/moves", small)
    assert scripts.run(MAIN, "pull", "acme/moves", "--fast", "--revision", REVISION).returncode == 0
    edit_json(models / "acme--moves" / "4bit" / "origin.json", revision="f" * 40)
    result = scripts.run(MAIN, "pull", "acme/moves", "--fast")
    assert result.returncode == 1
    assert "its manifest differs in source_digest" in result.stderr
    assert "--overwrite" in result.stderr
    before = tree(models / "acme--moves" / "4bit")
    with (models / "acme--moves" / "4bit" / "config.json").open() as stream:
        user = subprocess.Popen(["sleep", "100"], stdin=stream)
        try:
            said = failed(scripts.run(MAIN, "pull", "acme/moves", "--fast", "--replace-first"))
        finally:
            user.kill()
            user.wait()
    assert f"process {user.pid} (sleep 100)" in said
    assert tree(models / "acme--moves" / "4bit") == before
    result = scripts.run(MAIN, "pull", "acme/moves", "--fast", "--replace-first")
    assert result.returncode == 0, result.stderr
    assert f"{models / 'acme--moves' / '4bit'}: removing the old conversion first" in result.stderr


def test_a_replacement_is_resumed_with_its_commit_and_listed_under_its_name(
    hub: Hub, scripts: Prepared, converted: Converted, small: Path, models: Path, tmp_path: Path
) -> None:
    """Until it is complete, the old model stays. A resumed run does not ask where the branch is now."""
    files = offer(hub, "acme/small", small)
    assert scripts.run(MAIN, "pull", "acme/small", "--fast").returncode == 0
    folder = models / "acme--small" / "4bit"
    edit_json(folder / "origin.json", revision="f" * 40)
    before = tree(folder)
    last = max(file for file in files if file.endswith(".safetensors"))

    def kill(file: str) -> None:
        if file == last:
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)

    hub.watched.append(kill)
    result = scripts.run(NOTED, tmp_path / "pid", "pull", "acme/small", "--fast", "--overwrite")
    assert result.returncode == -signal.SIGKILL
    hub.watched.clear()
    listed = json.loads(scripts.run(MAIN, "list", "--json").stdout)
    found = [(model["name"], model["complete"]) for model in listed if "small" in model["name"]]
    assert found == [("acme/small:4bit", True)]
    assert {name: data for name, data in tree(folder).items() if not name.startswith("download/")} == before
    hub.asked.clear()
    result = scripts.run(MAIN, "pull", "acme/small", "--fast", "--overwrite")
    assert result.returncode == 0, result.stderr
    assert hub.asked
    assert not [path for path in hub.asked if "/main" in path]
    assert tree(folder) == converted("acme/small", small, fast=True)
    assert [path.name for path in folder.parent.iterdir()] == ["4bit"]


# faults


def test_a_connection_that_breaks_is_taken_up_again(
    hub: Hub, scripts: Prepared, converted: Converted, small: Path, models: Path, tmp_path: Path
) -> None:
    files = offer(hub, "acme/small", small)
    first = min(file for file in files if file.endswith(".safetensors"))
    hub.cut[first] = [len(files[first]) // 3]
    result = scripts.run(MAIN, "pull", "acme/small", "--fast")
    assert result.returncode == 0, result.stderr
    assert tree(models / "acme--small" / "4bit") == converted("acme/small", small, fast=True)


@pytest.mark.parametrize(
    ("name", "start", "refusal", "said"),
    [
        (
            "acme/unknown",
            "/api/models/",
            (404, "RepoNotFound"),
            "The hub did not give a model with the id acme/unknown: ",
        ),
        ("acme/asks", "/api/models/", (401, "GatedRepo"), "log in with `hf auth login`"),
        ("acme/licence", f"/acme/licence/resolve/{REVISION}/model-00002", (403, "GatedRepo"), "accept its licence"),
        ("acme/lacks", f"/acme/lacks/resolve/{REVISION}/model-00002", (404, "EntryNotFound"), "404 Client Error"),
        (
            "acme/ails",
            f"/acme/ails/resolve/{REVISION}/model-00002",
            (500, ""),
            "did not give model-00002-of-00004.safetensors of acme/ails: ",
        ),
        (
            "acme/ails-too",
            f"/api/models/acme/ails-too/revision/{REVISION}",
            (500, ""),
            "did not give the list of files of acme/ails-too: ",
        ),
    ],
)
def test_what_the_hub_refuses_is_reported_in_two_lines_and_nothing_is_made(
    hub: Hub, scripts: Prepared, small: Path, models: Path, name: str, start: str, refusal: tuple[int, str], said: str
) -> None:
    offer(hub, name, small)
    hub.refused[start] = refusal
    result = scripts.run(MAIN, "pull", name)
    assert said in failed(result)
    assert not (models / name.replace("/", "--")).exists()


def failed(result: subprocess.CompletedProcess[str]) -> str:
    """The two lines of its error."""
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    cause, fix = result.stderr.splitlines()[-2:]
    assert cause.startswith("moetier: ")
    assert fix.startswith("  ")
    return f"{cause}\n{fix}"


def test_a_revision_that_there_is_not_and_ids_that_are_none(
    hub: Hub, scripts: Prepared, small: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(hub, "acme/revised", small)
    assert "it has no such revision" in failed(scripts.run(MAIN, "pull", "acme/revised", "--revision", "v9"))
    hub.asked.clear()
    for name in ("..", "../../x", "a/b/c", "a--b/c", "acme/revised:4bit", "/etc"):
        assert main(["pull", name]) == 1
        cause, fix = capsys.readouterr().err.splitlines()
        assert "is not an id on the Hugging Face hub" in cause
        assert fix.startswith("  ")
    assert not hub.asked
    assert not (models.parent / "x").exists()


def test_a_file_that_never_comes_whole_can_come_later(
    hub: Hub, scripts: Prepared, converted: Converted, apart: Path, models: Path, tmp_path: Path
) -> None:
    """First it is cut each time; then the hub's storage has another byte than the hub says. It is downloaded ahead."""
    files = offer(hub, "acme/apart", apart)
    *_, last = sorted(file for file in files if file.endswith(".safetensors"))
    hub.refused[f"/acme/apart/resolve/{REVISION}/{last}"] = (500, "")
    assert "malformed" not in failed(scripts.run(MAIN, "pull", "acme/apart", "--fast"))
    hub.refused.clear()
    hub.tampered.add(last)
    said = failed(scripts.run(MAIN, "pull", "acme/apart", "--fast"))
    assert (
        f"{last} of acme/apart was damaged during the download: its sha256 is not the one that the hub gives." in said
    )
    assert "run the same command again" in said.lower()
    hub.tampered.clear()
    hub.asked.clear()
    result = scripts.run(MAIN, "pull", "acme/apart", "--fast")
    assert result.returncode == 0, result.stderr
    assert set(shards_asked(hub)) == {last}
    assert tree(models / "acme--apart" / "4bit") == converted("acme/apart", apart, fast=True)


@pytest.mark.parametrize("size", ["6m", "52m"])
def test_a_disk_that_is_too_small_is_found_before_anything_is_downloaded(
    hub: Hub, scripts: Prepared, tinymix_12: Path, tmp_path: Path, size: str
) -> None:
    """52 MiB take the store, and what passes, but not the whole checkpoint beside it."""
    name = f"acme/disk-{size}"
    offer(hub, name, tinymix_12)
    begun: list[str] = []
    hub.watched.append(begun.append)
    with mounted("tmpfs", tmp_path / "disk", f"size={size}") as disk:
        result = scripts.run(MAIN, "pull", name, "--fast", environment={"XDG_DATA_HOME": str(disk)})
        if size == "52m":
            assert result.returncode == 0, result.stderr
            return
        said = failed(result)
        assert "bytes more, " in said
        assert "of them for files of the checkpoint; " in said
        assert " are free." in said
        assert not list(disk.iterdir())
        kept = scripts.run(MAIN, "pull", name, "--keep-source", environment={"XDG_DATA_HOME": str(disk)})
        assert "of them for files of the checkpoint" not in failed(kept)
    assert not begun


@pytest.mark.parametrize(
    ("file", "error"),
    [
        ("../../../outside.safetensors", "names a file outside itself"),
        ("/etc/passwd.safetensors", "names a file outside itself"),
        ("pytorch_model.bin", "not safetensors"),
        ("model-00009.safetensors", "lacks model-00009.safetensors"),
    ],
)
def test_a_hostile_index_is_refused(
    hub: Hub, scripts: Prepared, small: Path, models: Path, file: str, error: str
) -> None:
    files = offer(hub, "acme/hostile", small)
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"] |= {next(iter(index["weight_map"])): file}
    name = f"acme/hostile-{zlib.crc32(file.encode())}"
    hub.repositories[name] = files | {"model.safetensors.index.json": json.dumps(index).encode()}
    assert error in failed(scripts.run(MAIN, "pull", name))
    assert not (models / name.replace("/", "--")).exists()


def test_code_and_pickle_are_refused(hub: Hub, scripts: Prepared, small: Path, tmp_path: Path) -> None:
    files = offer(hub, "acme/code", small)
    config = json.loads(files["config.json"]) | {"auto_map": {"AutoConfig": "modeling_x.X"}}
    files |= {"config.json": json.dumps(config).encode(), "modeling_x.py": b"raise SystemExit(77)"}
    assert "auto_map" in failed(scripts.run(MAIN, "pull", "acme/code"))
    assert scripts.run(MAIN, "pull", "acme/code", "--fast", "--ignore-code").returncode == 0
    files = offer(hub, "acme/pickle", small)
    hub.repositories["acme/pickle"] = {"config.json": files["config.json"], "pytorch_model.bin": b"pickle"}
    assert "as pickle (pytorch_model.bin)" in failed(scripts.run(MAIN, "pull", "acme/pickle"))


def test_headers_that_are_others_in_the_file_are_refused(hub: Hub, scripts: Prepared, small: Path) -> None:
    """The hub shows one header to who asks for the beginning, and gives another file."""
    files = offer(hub, "acme/two-faced", small)
    *_, file = sorted(file for file in files if file.endswith(".safetensors"))
    data = files[file]
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    one, other = [name for name in header if "experts" in name][:2]
    header[one]["data_offsets"], header[other]["data_offsets"] = (
        header[other]["data_offsets"],
        header[one]["data_offsets"],
    )
    changed = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    hub.instead[file] = data[:8] + changed + data[8 + size :]
    said = failed(scripts.run(MAIN, "pull", "acme/two-faced", "--fast"))
    assert "does not have the tensors that the hub listed" in said


# where files lie


def test_blocks_are_made_in_the_order_of_files() -> None:
    """By number they would hold all of the files, where these are ordered by name. One is downloaded ahead where that
    makes two."""
    a, b, c = (Path(name) for name in "abc")
    by_name = {0: {a}, 1: {a}, 2: {b, c}, 3: {c}, 10: {a, b}, 11: {b}}
    route = stages({block: frozenset(files) for block, files in by_name.items()})
    assert [stage.blocks for stage in route] == [(0, 1), (10,), (11,), (2,), (3,)]
    assert [stage.present for stage in route] == [{a}, {a, b}, {b}, {b, c}, {c}]
    assert [stage.at_once for stage in route] == [{a, b}, {a, b}, {b, c}, {b, c}, {c}]
    spread = stages({0: frozenset({a}), 1: frozenset({b}), 2: frozenset({a, c})})
    assert [stage.present for stage in spread] == [{a}, {a, b}, {a, c}]
    assert [stage.ahead for stage in spread] == [b, None, None]
