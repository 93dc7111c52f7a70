"""A person and a model by turns, and what else the person asks for."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from moetier.runtime.generation.conversation import Conversation
from moetier.tiers.errors import ConfigError, MoetierError, TargetError
from moetier.tools.cli.daemon_reads import DaemonWatch
from moetier.tools.cli.failure import as_options, plain
from moetier.tools.cli.report import Timing, run_json, run_report

from .answer import Answering
from .chat_input import QUOTES, ChatInput, Entry
from .interrupt import Interrupt, Leave

if TYPE_CHECKING:
    from moetier.runtime.model.tiers import Tiers

EXIT = ("/exit", "/bye", "/quit")
ALIASES = {"/clear": "/reset", "/?": "/help"}  # as ollama and llama.cpp have them
KEYS = f"""\
/stats      what each tier did since the start
/reset      forget what was said, but for the system prompt (also /clear)
/save FILE  write what was said: a JSON list of messages
/help       this (also /?)
/exit       leave, as Ctrl-D does (also /bye and /quit)

{QUOTES} begins a message of several lines, and {QUOTES} at the end of a line ends it.
A space before / makes it part of a message.
Ctrl-C stops an answer. At the prompt it clears the line, and twice on an empty one leaves."""


class Dialogue:
    """Answers are at most ``most`` tokens long. ``as_json``: one line for each, and for /stats; ``status``: says on
    standard error what an answer took."""

    def __init__(
        self,
        conversation: Conversation,
        answering: Answering,
        tiers: Tiers,
        watch: DaemonWatch,
        *,
        most: int,
        as_json: bool,
        status: bool,
    ) -> None:
        self._conversation = conversation
        self._answering = answering
        self._tiers = tiers
        self._watch = watch
        self._most = most
        self._json = as_json
        self._status = status
        self._spent = Timing(0, 0, 0.0, 0.0, 0)
        self._commands: dict[str, Callable[[str], None]] = {
            "/stats": self._stats,
            "/reset": self._reset,
            "/save": self._save,
            "/help": lambda _: print(KEYS, file=sys.stderr),
        }

    def say(self, text: str) -> None:
        """Print a line to standard error, if status lines are wanted."""
        if self._status:
            print(plain(text), file=sys.stderr, flush=True)

    def talk(self, source: ChatInput) -> None:
        """To the end. On a terminal what goes wrong is said, and the dialogue goes on; with a pipe it is raised."""
        warned = False
        while True:
            try:
                entry = source.read()
                warned = False
                if entry.is_command and entry.text.strip() in EXIT:
                    return
                self.take(entry, Interrupt(), by_hand=source.is_terminal)
            except EOFError:
                if source.is_terminal:
                    print()
                return
            except KeyboardInterrupt as pressed:
                if isinstance(pressed, Leave) or not source.is_terminal:
                    raise
                print()
                if source.was_empty():
                    if warned:
                        return
                    warned = True
                    print("Ctrl-C again, Ctrl-D or /exit leaves.", file=sys.stderr)
            except MoetierError as error:
                if not source.is_terminal:
                    raise
                print(f"{plain(as_options(error.cause))}\n  {plain(as_options(error.fix))}", file=sys.stderr)

    def take(self, entry: Entry, interrupt: Interrupt, *, by_hand: bool) -> None:
        """A command, or a message to the model, which Ctrl-C interrupts if ``by_hand``. Raises MoetierError."""
        if entry.is_command:
            name, _, rest = entry.text.strip().partition(" ")
            command = self._commands.get(ALIASES.get(name, name))
            if command is None:
                raise ConfigError(f"There is no {name}.", "/help says what there is; a message may begin with a space.")
            command(rest.strip())
        elif entry.text.strip():
            with interrupt if by_hand else contextlib.nullcontext():
                self._turn(entry.text, interrupt)

    def _turn(self, text: str, interrupt: Interrupt) -> None:
        before = self._conversation.left_out
        ids = self._conversation.prompt(text)
        if (out := self._conversation.left_out) > before:
            print(f"[the context is full: the model no longer sees the first {out} turns]", file=sys.stderr, flush=True)
        most = min(self._most, self._conversation.context - len(ids))
        answer = self._answering.answer(ids, most=most, interrupt=interrupt, echo=not self._json)
        self._spent += answer.timing
        if self._json:
            print(json.dumps(answer.to_json()), flush=True)
        self.say(answer.line())
        if answer.text:  # else nobody said anything, and templates want turns
            self._conversation.add(text, answer.text)

    def _stats(self, _: str) -> None:
        if self._json:
            print(json.dumps(run_json(self._spent, self._tiers, self._watch.end())), flush=True)
        else:
            print(run_report(self._spent, self._tiers, self._watch.end()), file=sys.stderr)

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._answering.kept.clear()

    def _save(self, name: str) -> None:
        from moetier.tiers.store.atomic import write_durably

        if not name:
            raise ConfigError("/save lacks a file.", "Name one: /save FILE.")
        path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path raises where there is no home
        if path.exists():
            raise TargetError(f"{path} is there already.", "Name another file, or remove it.")
        try:
            write_durably(path, json.dumps(self._conversation.messages, ensure_ascii=False, indent=1).encode() + b"\n")
        except OSError as error:
            raise TargetError(f"{path} can't be written ({error.strerror}).", "Name another file.") from error
        self.say(f"{path}: {len(self._conversation.messages)} messages")
