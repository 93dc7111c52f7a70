"""Generated text on a terminal: nothing in it is obeyed, and a pipe gets it as it is."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pty
import sys
import tty
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import TextIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from threads import Task

from moetier.tools.cli.failure import readable
from moetier.tools.cli.loading import loaded
from moetier.tools.main import main

HOSTILE = {  # what stands for each letter of the model's text, and how a terminal gets it
    "e": ("\x1b]52;c;aGk=\x07", "?]52;c;aGk=?"),  # writes to the clipboard
    "t": ("\x9b2J", "?2J"),  # CSI as one character of C1: clears the screen
    "o": ("\rx\b\x7f", "x??"),  # writes over the line
    "a": ("\u202ea\u2066", "?a?"),  # turns what follows round
    "s": ("\x1b", "?"),  # begins a sequence that the next token ends
    "n": ("\x1bP\x9c\x90\x0c\x0b\x0e", "?P?????"),
    "i": ("\n\té\u200d\u3042\u200f", "\n\té\u200d\u3042\u200f"),  # stays
}


@pytest.fixture(scope="module")
def hostile(tinymix_4bit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tinymix with a tokenizer that decodes letters to control sequences."""
    folder = tmp_path_factory.mktemp("hostile") / "model"
    copytree(tinymix_4bit, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    marks = {letter: chr(0xE000 + number) for number, letter in enumerate(HOSTILE)}  # so that no text is replaced twice
    steps = [(case, mark) for letter, mark in marks.items() for case in (letter, letter.upper())]
    steps += [(marks[letter], text) for letter, (text, _) in HOSTILE.items()]
    replacing = [{"type": "Replace", "pattern": {"String": found}, "content": text} for found, text in steps]
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [tokenizer["decoder"], *replacing]}
    path.write_text(json.dumps(tokenizer))
    return folder


@contextlib.contextmanager
def terminal() -> Iterator[tuple[TextIO, bytearray]]:
    """A terminal that changes nothing, and what has been written to it once it is closed."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    written = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # no descriptor of the terminal is open any more
            while True:
                written.extend(os.read(master, 4096))

    reader = Task(read, "terminal")
    try:
        with os.fdopen(slave, "w", encoding="utf-8") as stream:
            yield stream, written
        reader.result()
    finally:
        os.close(master)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_terminal_obeys_nothing_and_a_pipe_gets_all(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    (tmp_path / "in").write_text("What is the matter with the lord?\n")
    options = [command, str(hostile), "--daemon", "none", "--max-new-tokens", "40"]

    def run(stdout: TextIO) -> None:
        with (tmp_path / "in").open() as stdin, monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", stdin)
            patch.setattr(sys, "stdout", stdout)
            assert main(options) == 0

    with (tmp_path / "out").open("w", encoding="utf-8", newline="") as stdout:
        run(stdout)
    piped = (tmp_path / "out").read_bytes().decode()
    with terminal() as (stdout, written):
        run(stdout)
    shown = written.decode()
    expected = piped
    for text, harmless in sorted(HOSTILE.values(), key=lambda pair: -len(pair[0])):
        assert text in piped
        expected = expected.replace(text, harmless)
    assert shown == expected == readable(piped)
    assert not {letter for letter in shown if ord(letter) < 32 or 127 <= ord(letter) < 160} - {"\n", "\t"}


@given(st.text(), st.data())
def test_a_text_may_come_in_pieces(text: str, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(text)))
    assert readable(text[:cut]) + readable(text[cut:]) == readable(text)


def test_what_libraries_say_of_a_models_files_is_readable(tinymix_4bit: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = io.StringIO()
    with loaded(tinymix_4bit, {"ram": None, "daemon": None, "context": 64}), caplog.at_level("WARNING", "transformers"):
        found = logging.getLogger("transformers").handlers
        (handler,) = [each for each in found if type(each) is logging.StreamHandler]
        stream = handler.setStream(said)
        try:
            logging.getLogger("transformers.models.any").warning("two\nlines\x1b]52;c;aGk=\x07 of %s", "\x9bJ")
        finally:
            handler.setStream(stream)
    assert said.getvalue() == "two\nlines?]52;c;aGk=? of ?J\n"
