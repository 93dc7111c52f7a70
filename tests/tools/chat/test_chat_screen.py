"""A chat as a person sees it: every command, another size, Ctrl-C, and what later chats find after a crash."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import signal
import stat
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from prepared import MAIN, Prepared
from screens import DrawnTerminal
from terminals import CTRL_C, CTRL_D, UP

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("readline") is None or "libedit" in (importlib.import_module("readline").__doc__ or ""),
    reason="this Python is built without GNU readline",
)

OPTIONS = ("--daemon", "none", "--ram", "32MiB", "--max-new-tokens", "6", "--temperature", "0")
PROMPT, MORE = ">>>", "..."


@pytest.fixture(scope="module")
def endless(tinymix_4bit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tinymix that never ends by itself."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    copytree(tinymix_4bit, folder)
    for name, changes in {
        "config.json": {"eos_token_id": None, "max_position_embeddings": 1_000_000},
        "generation_config.json": {"eos_token_id": None},
    }.items():
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


class Chat(DrawnTerminal):
    """A chat in a terminal of ``columns`` and 50 lines."""

    def __init__(
        self, scripts: Prepared, model: Path, state: Path, *options: str, columns: int = 110, **environment: str
    ) -> None:
        words = ("chat", str(model), *OPTIONS, *options)
        environment |= {"XDG_STATE_HOME": str(state)}
        super().__init__(MAIN, *words, columns=columns, lines=50, scripts=scripts, **environment)
        self.waits("/help lists the commands")

    @property
    def current(self) -> str:
        """The line that has the cursor."""
        return self._screen.display[self._screen.cursor.y].rstrip()

    def waits(self, *words: str, prompt: str = PROMPT) -> str:
        """Wait until the words are on the screen and the chat waits for a line. Return the text."""
        self.shows_that(
            lambda: self.current == prompt and all(word in self.text for word in words), f"{words} and a prompt"
        )
        return self.text

    def run(self, line: str, *words: str, prompt: str = PROMPT) -> str:
        """Type a line on an empty screen, and wait for the words and the next prompt."""
        self._screen.reset()
        self._stream.feed(f"{PROMPT} ".encode())
        self.type(line + "\n")
        self.shows_that(lambda: self.current != f"{PROMPT} {line}", "the end of the line")
        return self.waits(*words, prompt=prompt)


def test_every_command(scripts: Prepared, endless: Path, tmp_path: Path) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nsed -i "s/king/queen/" "$1"\n')
    editor.chmod(0o755)
    saved = tmp_path / "saved.json"
    with Chat(scripts, endless, tmp_path / "state", EDITOR=str(editor)) as chat:
        assert re.search(r"\[6 tokens, cut short, [\d.]+ tokens/s; first after", chat.run("To be?", "cut short"))
        chat.run("/set max_new_tokens 4", "max_new_tokens 4")
        chat.run("/retry", "[4 tokens, cut short")
        chat.run("/set max_new_tokens", "max_new_tokens 6")
        chat.run("/set heat 5", "There is no option heat.")
        chat.run("/edit Where is the king?", "[6 tokens, cut short")
        chat.run("/edit", "[6 tokens, cut short")  # in the editor
        assert "messages 2" in chat.run("/show", "user: Where is the queen?")
        for first, last in (('"""Who is', 'there?"""'), ('/system """A play', 'of kings."""')):
            chat.run(first, prompt=MORE)
            chat.type(f"{last}\n")
            chat.waits(last)
        assert "messages 4" in chat.run("/show", "user: Who is there?")
        chat.run("/system", "of kings.")
        chat.run(f"/save {saved}", "5 messages saved")
        chat.run("/reset")
        chat.run('/system ""')
        chat.run("/show", "messages 0", "system   none")
        chat.run(f"/load {saved}", "5 messages loaded")
        chat.resize(48, 50)
        line = "And what does she say to all of that, and to us?"
        chat.run(line, f"{PROMPT} {line[:44]}\n{line[44:]}", "[6 tokens")  # the line is as wide as the terminal is now
        chat.resize(110, 50)
        chat.run("/show", "messages 6", "A play\\nof kings.")
        chat.run("/stats", "first token after", "hit ratio")
        chat.run("/help", "/retry", "/load FILE")
        chat.run("/nothing", "There is no command /nothing.")
        chat.type("/exit\n")
        assert chat.status() == 0
    assert [message["role"] for message in json.loads(saved.read_text())] == ["system", *["user", "assistant"] * 2]


def test_ctrl_c_in_a_prompt_and_in_an_answer(scripts: Prepared, endless: Path, tmp_path: Path) -> None:
    """A long prompt has a bar, which fits the terminal whatever its size becomes."""
    talk = tmp_path / "talk.json"
    words = "What news, my lord, of the war? " * 6000
    talk.write_text(json.dumps([{"role": "user", "content": words}, {"role": "assistant", "content": "None."}]))
    options = ("--context", "200000", "--max-new-tokens", "90000")
    with Chat(scripts, endless, tmp_path / "state", *options, columns=200) as chat:
        chat.run(f"/load {talk}", "2 messages loaded")
        chat.type("And of the king?\n")
        bar = re.compile(r"prompt of [\d,]+ tokens: +\d+%.*computed")
        chat.shows_that(lambda: bool(bar.search(chat.text)), "a bar")
        chat.resize(60, 50)
        before = len(chat.written)
        chat.shows_that(lambda: len(re.findall(r"\r *prompt of", chat.written[before:])) >= 3, "a new bar")
        drawn = re.findall(r"\r(prompt of[^\r\n]*)", chat.written[before:])
        assert all(len(line.rstrip()) <= 60 for line in drawn[1:])
        chat.type(CTRL_C)
        chat.waits("no tokens, interrupted after")
        chat.run("/reset")
        chat.type("Who is there?\n")
        chat.shows_that(lambda: len(chat.text.split("Who is there?")[-1].split()) > 20, "an answer")
        chat.type(CTRL_C)
        chat.waits("tokens, interrupted, ", "tokens/s; first after")
        chat.type("a line that is cleared")
        chat.shows("is cleared")
        chat.interrupt()
        chat.waits()
        chat.run('"""a message that is not sent', prompt=MORE)
        chat.interrupt()
        chat.waits()
        assert "Press Ctrl-C again" not in chat.text
        chat.interrupt()
        chat.waits("Press Ctrl-C again")
        chat.interrupt()
        assert chat.status() == 0


def test_lines_and_the_conversation_outlive_a_crash(scripts: Prepared, endless: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with Chat(scripts, endless, state) as chat:
        chat.run("To be, or not to be?", "cut short")
        chat.run("/set top_k 5", "top_k 5")
        chat.send(signal.SIGKILL)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (state / "moetier/chat").rglob("*")}
    assert modes.pop("conversations") == 0o700
    assert set(modes.values()) == {0o600}
    with Chat(scripts, endless, state, "--resume") as chat:
        assert "resumed: 2 messages" in chat.text
        for line in ("/set top_k 5", "To be, or not to be?"):
            chat.type(UP)
            chat.shows_that(lambda line=line: chat.current == f"{PROMPT} {line}", line)  # type: ignore[misc]
        chat.interrupt()
        chat.waits()
        chat.run("/show", "user: To be, or not to be?", "messages 2")
        chat.type(CTRL_D)
        assert chat.status() == 0
    with Chat(scripts, endless, tmp_path / "other", "--no-history") as chat:
        chat.run("Nothing of this is kept.", "cut short")
        chat.type(CTRL_D)
        assert chat.status() == 0
    assert not (tmp_path / "other").exists()


def test_a_pipe_keeps_nothing_and_resumes(
    endless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moetier.tools.chat.state import KeptConversation, last_conversation
    from moetier.tools.main import main

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    said: list[Any] = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A king."}]
    lines = tmp_path / "lines"
    lines.write_text("And then?\n")
    folder = tmp_path / "moetier/chat"
    with lines.open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        assert main(["chat", str(endless), *OPTIONS]) == 0
        assert not folder.exists()
        assert main(["chat", str(endless), *OPTIONS, "--resume"]) == 1
        assert "no conversation to resume" in capsys.readouterr().err
        KeptConversation(folder).save(said)
        stream.seek(0)
        assert main(["chat", str(endless), *OPTIONS, "--resume", "--system", "A play."]) == 0
    contents = [message["content"] for message in last_conversation(folder)]
    assert contents[:-1] == ["A play.", "Who?", "A king.", "And then?"]
