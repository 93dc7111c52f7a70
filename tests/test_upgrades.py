"""Stores, settings files, daemons and clients of a former release work with those of this one, both ways round."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from daemons import DaemonProcess
from prepared import MAIN, Prepared, prepared
from threads import Task, wait_until

ROOT = Path(__file__).parent.parent
COMMIT = "f517865c12ee77379391eabacc760b91735ce0e9"  # of the former release
# its folders, each after a folder to put it in, which make the package moetier, as in its wheel
CONTENTS = (("", "moetier"), ("moetier/", "proto", "tiers", "runtime", "tools"))
# what its commands import, without hqq, which transformers would import, and with it torch's compiler
FORMER_MODULES = (
    "without_hqq",
    "moetier.tools.convert",
    "moetier.tools.conversion",
    "moetier.tools.generate",
    "moetier.runtime.registration",
    "transformers.models.mixtral.modeling_mixtral",
)
PROMPT = "def read_lines(path):"
RELEASES = ("former", "this")
# in a process that lives on while its daemon is replaced
CLIENT = """
import sys, time
from pathlib import Path
import moetier
store, daemon, marks = sys.argv[1:]
model, tokenizer = moetier.load(store, daemon=daemon)
inputs = tokenizer("def read_lines(path):", return_tensors="pt")
def say():
    print(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist(), flush=True)
say()
Path(marks, "first").touch()
while not Path(marks, "go on").exists():
    time.sleep(.01)
say()
"""


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source tree of the former release, from its commit."""
    if not shutil.which("git"):
        pytest.skip("git is missing")
    git = ["git", "-C", str(ROOT)]
    if subprocess.run([*git, "cat-file", "-e", f"{COMMIT}^{{commit}}"], check=False, capture_output=True).returncode:
        pytest.skip(f"commit {COMMIT[:7]} is not in the history of this source tree")
    source = tmp_path_factory.mktemp("former")
    for prefix, *folders in CONTENTS:
        archive = [*git, "archive", f"--prefix={prefix}", COMMIT, *folders]
        subprocess.run(["tar", "-x", "-C", source], input=subprocess.check_output(archive), check=True)
    (source / "without_hqq.py").write_text("import sys\n\nsys.modules['hqq'] = None\n")
    return source


@dataclass
class Release:
    """Runs commands of one release; ``store``: what it made of tinymix."""

    environment: dict[str, str]
    scripts: Prepared
    store: Path

    def __call__(self, *arguments: object, **environ: str) -> str:
        done = self.scripts.run(MAIN, *arguments, environment=environ)
        assert not done.returncode, done.stderr
        return done.stdout

    def text(self, store: Path, *options: object) -> str:
        """Generate with --exact: without it, the last bits of two releases may differ."""
        return self("generate", store, PROMPT, "--max-new-tokens", 12, "--temperature", 0, "--exact", *options)

    @contextlib.contextmanager
    def daemon(self, store: Path, folder: Path, *options: str) -> Iterator[DaemonProcess]:
        """Its daemon, with room for half of the experts."""
        command = [sys.executable, "-m", "moetier.tools.main", "daemon", store, "--folder", folder, "--ram", "8MiB"]
        log = folder.parent / f"{folder.name}.log"
        daemon = DaemonProcess([*map(str, command), *options], folder, log, os.environ | self.environment)
        try:
            yield daemon
        finally:
            daemon.end()


@pytest.fixture(scope="module")
def releases(
    former: Path, scripts: Prepared, tinymix: Path, tinymix_4bit: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Release]]:
    store = tmp_path_factory.mktemp("former-store") / "4bit"
    # else the package in the current directory, which is this release's, is found first
    environment = {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(former)}
    with prepared(*FORMER_MODULES, commands=(), **environment) as former_scripts:
        release = Release(environment, former_scripts, store)
        release("convert", tinymix, store, "--bits", 4, "--fast")
        yield {"former": release, "this": Release({}, scripts, tinymix_4bit)}


def other(release: str) -> str:
    return RELEASES[1 - RELEASES.index(release)]


def runtime_folder(base: Path) -> Path:
    """For a daemon that ``ps`` finds where ``base`` is $XDG_RUNTIME_DIR."""
    (base / "moetier").mkdir(mode=0o700)
    return base / "moetier" / "daemon"


def test_the_former_release_is_what_is_compared(releases: dict[str, Release], former: Path) -> None:
    where = "import moetier.tools.main as m; print(m.__file__)"
    files = [release.scripts.run(where).stdout for release in releases.values()]
    assert len(set(files)) == 2
    assert str(former) in files[0]


@pytest.mark.parametrize("reader", RELEASES)
def test_a_store_is_verified_by_the_other_release(releases: dict[str, Release], reader: str) -> None:
    releases[reader]("verify", releases[other(reader)].store)


@pytest.mark.parametrize("reader", [pytest.param("former", marks=pytest.mark.slow), "this"])
def test_a_store_is_read_by_the_other_release(releases: dict[str, Release], reader: str) -> None:
    store = releases[other(reader)].store
    assert releases[reader].text(store, "--ram", "4MiB") == releases[other(reader)].text(store)


@pytest.mark.slow
@pytest.mark.parametrize("client", RELEASES)
def test_a_daemon_serves_clients_of_the_other_release(
    releases: dict[str, Release], client: str, tmp_path: Path
) -> None:
    """Through memory that is mapped, and over the network. Commands that ask about it are answered, too."""
    store = releases["former"].store
    expected = releases["former"].text(store)
    (tmp_path / "token").write_text("s3cret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = f"127.0.0.1:{server.getsockname()[1]}"
    network = ("--token-file", str(tmp_path / "token"), "--insecure")
    folder = runtime_folder(tmp_path)
    with releases[other(client)].daemon(store, folder, "--listen", there, *network) as daemon:
        assert releases[client].text(store, "--daemon", folder) == expected
        assert daemon.stats().host.hits > 0
        assert releases[client].text(store, "--daemon", there, "--ram", "4MiB", *network) == expected
        assert daemon.stats().fetches > 0
        for address in ((folder,), (there, *network)):
            (model,) = json.loads(releases[client]("stats", *address, "--json"))["models"]
            assert model["fetches"] > 0
        (listed,) = json.loads(releases[client]("ps", "--json", XDG_RUNTIME_DIR=str(tmp_path)))
        assert listed["pid"] == daemon.pid
        assert daemon.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("client", RELEASES)
@pytest.mark.parametrize("second", RELEASES)
def test_a_daemon_is_replaced_by_one_of_the_other_release(
    releases: dict[str, Release], client: str, second: str, tmp_path: Path
) -> None:
    """While a client lives: the new daemon takes the records back from its memory, and the client goes on."""
    store, folder = releases["former"].store, runtime_folder(tmp_path)
    with releases[other(second)].daemon(store, folder) as daemon:
        script = Task(lambda: releases[client].scripts.run(CLIENT, store, folder, tmp_path))
        try:
            wait_until(lambda: (tmp_path / "first").exists() or not script.thread.is_alive())
            daemon.kill()
            with releases[second].daemon(store, folder) as after:
                assert after.wait_for("clients == 1").recovered > 0
                (tmp_path / "go on").touch()
                done = script.result()
                assert not done.returncode, done.stderr
                first, again = done.stdout.splitlines()
                assert first == again
                assert after.stats().requests > 0
        finally:
            (tmp_path / "go on").touch()
            script.result()


@pytest.mark.slow
@pytest.mark.parametrize("reader", RELEASES)
def test_what_is_recorded_is_read_by_the_other_release(
    releases: dict[str, Release], reader: str, tmp_path: Path
) -> None:
    """A trace, and the counts of experts that ``--learn`` keeps."""
    store, writer = releases["former"].store, releases[other(reader)]
    (tmp_path / "prompts").write_text(PROMPT)
    trace = tmp_path / "t.npz"
    writer("trace", store, "--prompts", tmp_path / "prompts", "-o", trace, "--max-new-tokens", 8)
    assert releases[reader]("replay", trace, "--json") == writer("replay", trace, "--json")

    learn = ("generate", store, PROMPT, "--max-new-tokens", 8, "--ram", "8MiB", "--learn", "--json")
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert json.loads(writer(*learn, **cache))["tiers"]["host"]["warmed"] == 0
    assert json.loads(releases[reader](*learn, **cache))["tiers"]["host"]["warmed"] > 0


def settings(release: Release, file: Path | str = os.devnull) -> dict[str, dict[str, Any]]:
    """Section -> key -> value."""
    shown = json.loads(release("config", "show", "--json", MOETIER_CONFIG=str(file)))
    assert not shown["faults"]
    return {
        section: {key: setting["value"] for key, setting in keys.items()} for section, keys in shown["settings"].items()
    }


def as_toml(value: object) -> str:
    return json.dumps(value)  # of strings, numbers and truth values both write the same


@pytest.mark.parametrize("reader", RELEASES)
def test_a_settings_file_is_read_by_the_other_release(
    releases: dict[str, Release], reader: str, tmp_path: Path
) -> None:
    """With every key that both have. This release may not lose one, in the section where it was written."""
    written, read = settings(releases[other(reader)]), settings(releases[reader])

    def is_known(section: str, key: str) -> bool:
        return section in read and (key in read[section] or key in read["general"])

    if reader == "this":
        assert not [(section, key) for section in written for key in written[section] if not is_known(section, key)]
    written["general"] |= {"ram": "3GiB", "device-memory": "1GiB", "context": 1234, "exact": True, "policy": "lru"}
    if reader == "this":
        written["generate"]["look-ahead"] = 2
    common = {
        section: {key: value for key, value in keys.items() if is_known(section, key) and (value or value is False)}
        for section, keys in written.items()
        if section in read
    }
    lines = []
    for section, keys in common.items():
        lines += [f"[{section}]", *(f"{key} = {as_toml(value)}" for key, value in keys.items())]
    file = tmp_path / "config.toml"
    file.write_text("\n".join(lines))
    found = settings(releases[reader], file)
    shown = {
        section: {key: found[section].get(key, found["general"].get(key)) for key in keys}
        for section, keys in common.items()
    }
    assert shown == common
