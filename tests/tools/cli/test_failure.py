from __future__ import annotations

import ast
import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from places import ROOT
from users import as_nobody

from moetier.tools.cli.failure import EXIT_ERROR, EXIT_FAULT, as_options, failure_of
from moetier.tools.cli.parser import commands_of
from moetier.tools.commands.doctor import findings
from moetier.tools.doctor.machine import State
from moetier.tools.main import build_parser, main


def raised(work: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is
        work()
    return caught.value


def test_what_the_system_says_is_a_cause_with_its_path(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "loop").symlink_to("loop")
    works = {
        errno.ENOENT: (tmp_path / "nothing").read_bytes,
        errno.EISDIR: tmp_path.read_bytes,
        errno.ENOTDIR: (file / "below").read_bytes,
        errno.ENAMETOOLONG: (tmp_path / ("x" * 300)).read_bytes,
        errno.ELOOP: (tmp_path / "loop").read_bytes,
    }
    for number, work in works.items():
        said, code = failure_of(raised(work))
        assert (code, str(tmp_path) in said.cause, os.strerror(number) in said.cause) == (EXIT_ERROR, True, True)
        assert "DEBUG" not in said.fix


def test_both_paths_are_named(tmp_path: Path) -> None:
    said, _ = failure_of(raised(lambda: (tmp_path / "one").rename(tmp_path / "two")))
    assert f"{tmp_path / 'one'} -> {tmp_path / 'two'}: " in said.cause


def test_a_full_disk() -> None:
    def fill() -> None:
        with Path("/dev/full").open("wb", buffering=0) as stream:
            stream.write(b"x")

    said, code = failure_of(raised(fill))
    assert (code, "No space left" in said.cause, "space" in said.fix) == (EXIT_ERROR, True, True)


def test_others_that_a_user_can_mend() -> None:
    for work, words in (
        (lambda: __import__("no_such_library"), "no_such_library"),
        (lambda: b"\xff".decode(), "UTF-8"),
        (lambda: bytearray(1 << 62), "Memory could not be allocated."),
    ):
        said, code = failure_of(raised(work))
        assert (code, words in said.cause) == (EXIT_ERROR, True)


def test_a_fault_says_where_it_was_raised() -> None:
    said, code = failure_of(raised(lambda: {}["key"]))
    assert code == EXIT_FAULT == 70
    assert said.cause.startswith("KeyError: 'key' (test_failure.py:")
    assert "MOETIER_DEBUG=1" in said.fix


PLACES = ("nothing", "file/below", "loop", "x" * 300)


@pytest.mark.parametrize("name", ["x.gguf", "no/x.gguf", "/no/x.gguf"])
@pytest.mark.parametrize(
    "words", [["generate"], ["serve"], ["daemon"], ["verify"], ["inspect"], ["link"], ["plan"], ["convert"], ["doctor"]]
)
def test_a_gguf_file_that_is_missing_is_no_folder(
    words: list[str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more = {"convert": ["DST"], "generate": ["to be"], "serve": ["--port", "0"]}
    assert main([*words, name, *more.get(words[0], [])]) == 1
    said = "".join(capsys.readouterr())
    assert re.search(rf"There is no file \S*{name}\.", said), said
    assert "Check the path of the GGUF file." in said
    assert "folder" not in said.partition("There is no file")[2]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[:10])
def test_no_command_shows_a_traceback_for_a_wrong_path(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    path, out = str(tmp_path / place), str(tmp_path / "out")
    for words in (
        ["plan", path, "--disk", "1"],
        ["convert", path, out],
        ["generate", path, "hello"],
        ["chat", path],
        ["serve", path, "--port", "0"],
        ["verify", path],
        ["inspect", path],
        ["quality", path, "--text", path],
        ["trace", path, "--prompts", path, "-o", out],
        ["replay", path],
        ["plot", "hits", path, "-o", f"{out}.png"],
        ["daemon", path, "--folder", out],
        ["stats", path],
        ["bench", "disk", path],
        ["bench", "kernels", path],
        ["bench", "decode", path],
        ["bench", "prefill", path],
        ["bench", "convert", path],
    ):
        code, said = main(words), capsys.readouterr().err.splitlines()
        assert (code in (1, 2), len(said)) == (True, 2), (words, said)  # 2: a name that can be no address
        assert said[0].startswith("moetier: ")
        assert said[1].startswith("  ")


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[:10])
def test_doctor_says_what_is_wrong_with_a_path(place: str, tmp_path: Path) -> None:
    """In its line of the store, and looks no further; the machine is looked at all the same."""
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (found,) = [each for each in findings(tmp_path / place, seconds=0.01) if each.state is State.FAIL]
    assert (found.name, str(tmp_path) in found.found, bool(found.advice)) == ("store", True, True)


def test_no_permission_is_reported(tmp_path: Path, tinymix_4bit: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "closed").mkdir(mode=0o700)
    as_nobody(lambda: main(["inspect", str(tmp_path / "closed" / "model")]))
    said = capfd.readouterr().err.splitlines()
    assert [line[:9] for line in said] == ["moetier: ", said[1][:9]]
    assert str(tmp_path / "closed") in said[0]


def test_what_an_error_calls_a_parameter_is_an_option_of_the_command_line() -> None:
    """Of every parameter that a text in tiers/ or runtime/ names."""
    root = ROOT
    texts = [
        node.value
        for folder in ("tiers", "runtime")
        for path in sorted((root / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "``" not in node.value
    ]
    named = {name for text in texts for name in re.findall(r"`[a-z_.]+`", text)}
    assert {"`ram`", "`device`", "`credentials.ca`", "`credentials.token_file`"} <= named
    described = commands_of(build_parser())["generate"].format_help()
    of_python = {"`dtype`", "`attn_implementation`"}
    options = {*re.findall(r"^  (?:-\w(?: \S+)?, )?(--[\w-]+)", described, re.MULTILINE)}
    assert {as_options(name) for name in named - of_python} <= options
    assert as_options("`dtype` is 16; see `moetier list`.") == "`dtype` is 16; see `moetier list`."


@pytest.mark.parametrize("folder", ["tiers", "runtime"])
def test_no_error_of_load_names_an_option(folder: str) -> None:
    """But where a command is named, or in what a command alone says."""
    of_commands = {"options", "daemon_config", "process", "control_server", "metrics", "address", "conversation"}
    root = ROOT
    for path in sorted((root / folder).rglob("*.py")):
        if path.stem in of_commands or path.parent.name in ("checkpoint", "formats"):  # the converter's
            continue
        tree = ast.parse(path.read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        raised = [call for call in calls if ast.unparse(call.func).endswith("Error")]
        for text in (ast.unparse(part) for node in raised for part in node.args):
            options = re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)
            assert not options or re.search(r"moetier|command\(|daemon|convert", text), f"{path.name}: {text}"


SHORTAGES = """
import ctypes, json, mmap, os, resource, sys, threading
import torch
from moetier.runtime.machine.memory import shortage_in
from moetier.tools.cli.failure import failure_of

def load_library():
    try:
        ctypes.CDLL(sys.argv[1])
    except OSError as error:
        raise OSError("Could not find the library.") from error

attempts = [
    lambda: bytes(1 << 30),
    lambda: mmap.mmap(-1, 1 << 30),
    lambda: torch.empty(1 << 28),
    lambda: torch.from_file(sys.argv[2], size=1 << 28, dtype=torch.float32),
    lambda: threading.Thread(target=print).start(),
    load_library,
]
with open("/proc/self/statm") as file:
    taken = int(file.read().split()[0]) * mmap.PAGESIZE
threading.stack_size(512 << 20)
resource.setrlimit(resource.RLIMIT_AS, (taken + (64 << 20),) * 2)
for attempt in attempts:
    try:
        attempt()
    except Exception as error:
        said, code = failure_of(error)
        print(json.dumps([code, said.cause, said.fix]))
    else:
        print(json.dumps([0, "", ""]))
"""


def test_memory_that_cannot_be_allocated_is_no_bug(tmp_path: Path) -> None:
    """Whatever reports it: Python, the system, torch, a thread's start or the loader of a library."""
    large = tmp_path / "large"
    with large.open("wb") as stream:
        stream.truncate(1 << 30)
    place = importlib.util.find_spec("llvmlite")
    assert place is not None
    assert place.origin is not None
    library = Path(place.origin).parent / "binding" / "libllvmlite.so"  # larger than the room that is left
    command = [sys.executable, "-c", SHORTAGES, library, large]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(found) == 6
    for code, cause, fix in found:
        assert code == EXIT_ERROR
        assert cause.startswith("Memory could not be allocated")
        assert "ulimit -v" in fix


def test_a_command_under_a_limit_on_address_space(tinymix_4bit: Path) -> None:
    command = [sys.executable, "-m", "moetier.tools.main", "generate", str(tinymix_4bit), "To be", "--daemon", "none"]
    limit = 300 << 20  # less than torch's library has
    ended = subprocess.run(["prlimit", f"--as={limit}", *command], capture_output=True, text=True, check=False)
    assert ended.returncode == EXIT_ERROR
    cause, fix = ended.stderr.splitlines()
    assert cause.startswith("moetier: Memory could not be allocated: lib")
    assert "(ulimit -v), which is 300 MiB" in fix
