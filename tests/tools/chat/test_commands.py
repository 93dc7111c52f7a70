"""Commands with a conversation of their own, and answers from a list."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moetier.runtime.generation.conversation import Conversation
from moetier.tiers.errors import ConfigError
from moetier.tools.chat.answer import INTERRUPTED, ChatReply
from moetier.tools.chat.commands import KEYS, Commands, edited
from moetier.tools.chat.dialogue import Dialogue
from moetier.tools.chat.options import AnswerOptions
from moetier.tools.chat.state import KeptConversation, read_messages
from moetier.tools.cli.report import Timing


class Answers:
    """Gives a list of answers; an empty one is an interrupted one."""

    def __init__(self, *texts: str) -> None:
        self.texts = [*texts]
        self.limits: list[int] = []

    def answer(self, ids: list[int], *, most: int, is_interrupted: Any, echo: bool) -> ChatReply:
        self.limits.append(most)
        text = self.texts.pop(0)
        return ChatReply(text, "stop" if text else INTERRUPTED, len(ids), 0, Timing(len(ids), 1, 0.1, 0.1), 0, 0)


class Letters:
    """A tokenizer whose tokens are letters."""

    chat_template = ""
    all_special_ids = ()

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [*map(ord, text)]}

    def apply_chat_template(self, messages: Any, **_: Any) -> str:
        if any("refused" in message["content"] for message in messages):
            raise ValueError("No such word.")
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages)


class Chat:
    """A dialogue of ``answers`` that saves in ``folder``."""

    def __init__(self, folder: Path, *answers: str) -> None:
        self.conversation = Conversation(Letters(), system=None, context=1000, answer_tokens=100)
        self.answers = Answers(*answers)
        self.folder = folder
        self.dialogue = Dialogue(
            self.conversation,
            self.answers,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            options=AnswerOptions({"max_new_tokens": 90}),
            kept=KeptConversation(folder),
            title="a model",
            as_json=False,
            status=True,
        )
        self.commands = Commands(self.dialogue)

    @property
    def said(self) -> list[str]:
        return [message["content"] for message in self.conversation.messages]

    @property
    def kept(self) -> list[str]:
        (path,) = (self.folder / "conversations").iterdir()
        return [message["content"] for message in read_messages(path)]


def test_the_last_message_is_answered_again(tmp_path: Path) -> None:
    chat = Chat(tmp_path, "one", "two", "three", "", "four")
    with pytest.raises(ConfigError, match="no message yet"):
        chat.commands.run("/retry")
    for text in ("first", "second"):
        chat.dialogue.answer(text)
    chat.commands.run("/retry")
    assert chat.said == chat.kept == ["first", "one", "second", "three"]
    chat.commands.run("/retry")  # interrupted before its first word
    assert chat.said == chat.kept == ["first", "one", "second", "three"]
    chat.commands.run("/edit other words")
    assert chat.said == chat.kept == ["first", "one", "other words", "four"]


def test_a_message_that_cannot_be_answered_leaves_the_last_one(tmp_path: Path) -> None:
    chat = Chat(tmp_path, "one")
    chat.dialogue.answer("first")
    for text in ("refused", "long " * 400):
        with pytest.raises(ConfigError):
            chat.commands.run(f"/edit {text}")
        assert chat.said == ["first", "one"]


def test_without_a_text_the_last_message_is_changed_in_an_editor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(tmp_path, "one", "two")
    chat.dialogue.answer("first\nline")
    monkeypatch.setenv("VISUAL", "sed -i s/first/second/")
    with pytest.raises(ConfigError, match="no editor"):  # without a terminal
        chat.commands.run("/edit")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    chat.commands.run("/edit")
    assert chat.said == ["second\nline", "two"]
    monkeypatch.setenv("VISUAL", "truncate -s 0")
    chat.commands.run("/edit")
    assert "nothing is sent" in capsys.readouterr().err
    monkeypatch.setenv("VISUAL", "true")
    chat.commands.run("/edit")
    assert "unchanged, and nothing is sent" in capsys.readouterr().err
    for editor in ("false", "/nonexistent"):
        monkeypatch.setenv("VISUAL", editor)
        with pytest.raises(ConfigError, match=r"editor|nothing is sent"):
            chat.commands.run("/edit")
    assert chat.said == ["second\nline", "two"]


def test_the_system_prompt_changes_within_a_conversation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(tmp_path, "one")
    chat.dialogue.answer("first")
    chat.commands.run("/system Be\nbrief.")
    assert chat.said == ["Be\nbrief.", "first", "one"]
    with pytest.raises(ConfigError):
        chat.commands.run("/system refused")
    capsys.readouterr()
    chat.commands.run("/system")
    assert capsys.readouterr().err == "Be\nbrief.\n"
    chat.commands.run('/system ""')
    assert chat.said == ["first", "one"]


def test_options_hold_for_the_next_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(tmp_path, "one", "two", "three")
    chat.dialogue.answer("first")
    chat.commands.run("/set max_new_tokens 7")
    chat.dialogue.answer("second")
    chat.commands.run("/set max_new_tokens")
    chat.dialogue.answer("third")
    assert chat.answers.limits == [90, 7, 90]
    for line in ("/set heat 5", "/set temperature hot"):
        with pytest.raises(ConfigError):
            chat.commands.run(line)
    capsys.readouterr()
    chat.commands.run("/set")
    assert "max_new_tokens 90" in capsys.readouterr().err


def test_a_saved_conversation_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(tmp_path, "one", "two")
    chat.commands.run("/system Be brief.")
    chat.dialogue.answer("first")
    file = tmp_path / "saved.json"
    chat.commands.run(f"/save {file}")
    chat.commands.run("/reset")
    chat.commands.run("/system Be long.")
    chat.commands.run(f"/load {file}")
    assert chat.said == ["Be brief.", "first", "one"]
    chat.dialogue.answer("second")
    capsys.readouterr()
    chat.commands.run("/show")
    shown = capsys.readouterr().err
    for words in ("a model", "1,000 tokens", "Be brief.", "max_new_tokens 90", "messages 4", "user: second", "two"):
        assert words in shown
    said = chat.said
    for wrong in ([{"role": "assistant", "content": "a"}], [{"role": "user", "content": "a"}]):
        file.write_text(json.dumps(wrong))
        with pytest.raises(ConfigError, match="alternately"):
            chat.commands.run(f"/load {file}")
    for line in ("/load", f"/load {tmp_path}/none"):
        with pytest.raises(ConfigError):
            chat.commands.run(line)
    assert chat.said == said


def test_the_help_names_all_commands(tmp_path: Path) -> None:
    commands = {line.split()[0] for line in KEYS.splitlines() if line.startswith("/")}
    assert commands == {*Chat(tmp_path).commands._commands, "/exit"}


def test_ctrl_c_is_for_the_editor_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An editor that handles it goes on; so it must not be ignored there, and the chat must not end the editor."""
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\ntrap 'echo changed > \"$1\"' INT\nkill -INT $PPID\nsleep 0.2\nkill -INT $$\n")
    editor.chmod(0o755)
    monkeypatch.setenv("VISUAL", str(editor))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    handler = signal.getsignal(signal.SIGINT)
    assert edited("text") == "changed"
    assert signal.getsignal(signal.SIGINT) is handler
