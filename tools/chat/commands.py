"""Commands of a chat: lines that begin with /."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from moetier.tiers.errors import ConfigError, TargetError
from moetier.tools.cli.failure import plain, readable
from moetier.tools.cli.foreground import run_in_foreground
from moetier.tools.cli.report import run_json, run_report

from .chat_input import QUOTES
from .dialogue import Dialogue
from .state import messages_text, read_messages

ALIASES = {"/clear": "/reset", "/?": "/help"}  # names of commands in ollama and llama.cpp
KEYS = f"""\
/retry            answer the last message again
/edit [TEXT]      send TEXT in place of the last message; without TEXT, change it in $EDITOR
/system [TEXT]    replace the system prompt; "" removes it; without TEXT, print it
/set NAME VALUE   set an option of the next answers, such as temperature; without VALUE, as it was at the start
/show             print the model, the system prompt, the options and the last messages
/stats            print the counters of each tier since the start
/reset            forget all messages but the system prompt (also /clear)
/save FILE        write the messages to a file, as a JSON list
/load FILE        go on with the messages of such a file
/help             print this text (also /?)
/exit             end the chat, as Ctrl-D does (also /bye and /quit)

{QUOTES} begins a message of several lines, also behind /edit and /system, and {QUOTES} at the end of a line ends it.
If a message begins with /, type a space before it.
Ctrl-C stops an answer. At the prompt it clears the line; on an empty line, pressing it twice ends the chat."""
SHOWN = 200  # letters of a message that /show prints


class Commands:
    """Runs the commands of a dialogue."""

    def __init__(self, dialogue: Dialogue) -> None:
        self._dialogue = dialogue
        self._commands: dict[str, Callable[[str], None]] = {
            "/retry": lambda _: self._replace(None),
            "/edit": self._edit,
            "/system": self._system,
            "/set": self._set,
            "/show": self._show,
            "/stats": self._stats,
            "/reset": lambda _: dialogue.conversation.reset(),
            "/save": self._save,
            "/load": self._load,
            "/help": lambda _: print(KEYS, file=sys.stderr),
        }

    def run(self, line: str) -> None:
        """Run a command. Raises MoetierError if there is none of this name, or it fails."""
        name, _, rest = line.partition(" ")
        command = self._commands.get(ALIASES.get(name, name))
        if command is None:
            raise ConfigError(
                f"There is no command {name}.", "/help lists the commands. If this is a message, begin it with a space."
            )
        command(rest.strip())

    def _replace(self, text: str | None) -> None:
        """Answer ``text`` in place of the last message; without a text, answer that message again."""
        self._dialogue.answer(self._last() if text is None else text, in_place_of_last=True)

    def _last(self) -> str:
        """Return the last message of the user. Raises ConfigError if there is none."""
        messages = self._dialogue.conversation.messages
        if not messages or messages[-1]["role"] != "assistant":
            raise ConfigError("There is no message yet that was answered.", "Send one.")
        return messages[-2]["content"]

    def _edit(self, text: str) -> None:
        changed = text or edited(last := self._last())
        if not changed.strip():
            self._dialogue.say("the message is empty, and nothing is sent")
        elif not text and changed == last.strip("\n"):
            self._dialogue.say("the message is unchanged, and nothing is sent (/retry sends it again)")
        else:
            self._replace(changed)

    def _system(self, text: str) -> None:
        conversation = self._dialogue.conversation
        if text:
            conversation.set_system(None if text in ('""', "''") else text)
        else:
            print(readable(conversation.system or "there is no system prompt"), file=sys.stderr)

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        options = self._dialogue.options
        if name:
            options.set(name, value.strip())
        print(options, file=sys.stderr)

    def _show(self, _: str) -> None:
        dialogue = self._dialogue
        conversation = dialogue.conversation
        messages = conversation.messages
        lines = [
            f"model    {dialogue.title}",
            f"context  {conversation.context:,} tokens",
            f"system   {json.dumps(conversation.system, ensure_ascii=False) if conversation.system else 'none'}",
            f"options  {dialogue.options}",
            f"messages {sum(message['role'] != 'system' for message in messages)}",
        ]
        for message in messages[-2:]:
            if message["role"] != "system":
                text = " ".join(message["content"].split())
                lines.append(f"{message['role']}: {text if len(text) <= SHOWN else text[:SHOWN] + ' ...'}")
        print("\n".join(map(plain, lines)), file=sys.stderr)

    def _stats(self, _: str) -> None:
        dialogue = self._dialogue
        if dialogue.as_json:
            print(json.dumps(run_json(dialogue.spent, dialogue.tiers, dialogue.watch.end())), flush=True)
        else:
            print(run_report(dialogue.spent, dialogue.tiers, dialogue.watch.end()), file=sys.stderr)

    def _save(self, name: str) -> None:
        from moetier.tiers.store.atomic import write_durably

        path = _path(name, "/save")
        if path.exists():
            raise TargetError(f"{path} exists already.", "Name another file, or remove this one.")
        messages = self._dialogue.conversation.messages
        try:
            write_durably(path, messages_text(messages).encode())
        except OSError as error:
            raise TargetError(f"{path} can't be written ({error.strerror}).", "Name another file.") from error
        self._dialogue.say(f"{path}: {len(messages)} messages saved")

    def _load(self, name: str) -> None:
        path = _path(name, "/load")
        self._dialogue.conversation.load(read_messages(path))
        self._dialogue.say(f"{path}: {len(self._dialogue.conversation.messages)} messages loaded")


def _path(name: str, command: str) -> Path:
    if not name:
        raise ConfigError(f"{command} needs the name of a file.", f"Name one: {command} FILE.")
    return Path(os.path.expanduser(name))  # noqa: PTH111 - Path raises if there is no home folder


def edited(text: str) -> str:
    """Return ``text`` as the user's editor leaves it. Raises ConfigError if there is no editor, or it fails."""
    command = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi")
    if not sys.stdin.isatty() or not command or shutil.which(command[0]) is None:
        raise ConfigError("There is no editor to change the message in.", "Set EDITOR, or give the text: /edit TEXT.")
    with tempfile.TemporaryDirectory() as folder:  # only the user can enter it
        path = Path(folder) / "message.txt"
        path.write_text(f"{text}\n")
        if status := run_in_foreground([*command, str(path)]):
            raise ConfigError(f"{command[0]} ended with {status}, and nothing is sent.", "Try /edit again.")
        return path.read_text(errors="replace").strip("\n")
