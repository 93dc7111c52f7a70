"""The dialogue between a person and a model: input, commands and answers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from moetier.runtime.generation.conversation import Conversation
from moetier.tiers.errors import ConfigError, MoetierError, TargetError
from moetier.tools.cli.daemon_reads import DaemonWatch
from moetier.tools.cli.failure import as_options, plain
from moetier.tools.cli.parser import check_utf8
from moetier.tools.cli.report import Timing, run_json, run_report

from .answer import Answering, Leave, interruptible

if TYPE_CHECKING:
    from moetier.runtime.model.tiers import Tiers

QUOTES = '"""'
PROMPT, MORE = ">>> ", "... "
EXIT = ("/exit", "/bye", "/quit")
ALIASES = {"/clear": "/reset", "/?": "/help"}  # names of commands in ollama and llama.cpp
KEYS = f"""\
/stats      print the counters of each tier since the start
/reset      forget all messages but the system prompt (also /clear)
/save FILE  write the messages to a file, as a JSON list
/help       print this text (also /?)
/exit       end the chat, as Ctrl-D does (also /bye and /quit)

{QUOTES} begins a message of several lines, and {QUOTES} at the end of a line ends it.
If a message begins with /, type a space before it.
Ctrl-C stops an answer. At the prompt it clears the line; on an empty line, pressing it twice ends the chat."""


class ChatInput:
    """Reader of standard input. On a terminal it shows a prompt and, if Python has readline, lets lines be edited."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdin.isatty()
        self._prompts = (PROMPT, MORE) if self.is_terminal else ("", "")
        self._in_block = False
        self._buffer: Callable[[], str] = str  # returns the text typed so far
        if self.is_terminal and sys.stdout.isatty():
            with suppress(ImportError):
                import readline  # importing it turns editing on

                self._buffer = readline.get_line_buffer

    def read(self) -> tuple[str, bool]:
        """Return the next message or command, and whether it is a command: a line that begins with /.

        Triple quotes at the beginning of a line begin a block, a message of several lines. Triple quotes at the end of
        a line end the block. Raises EOFError at the end of the input, KeyboardInterrupt for Ctrl-C, and ConfigError if
        the input is not UTF-8 text or ends within a block.
        """
        first, more = self._prompts
        self._in_block = False
        line = _line(first)
        if not line.startswith(QUOTES):
            return line, line.startswith("/")
        self._in_block = True
        line = line.removeprefix(QUOTES)
        while not line.rstrip().endswith(QUOTES):
            try:
                line += "\n" + _line(more)
            except EOFError:
                raise ConfigError(
                    f"A message that began with {QUOTES} did not end.", f"End its last line with {QUOTES}."
                ) from None
        return line.rstrip().removesuffix(QUOTES).strip("\n"), False

    def was_empty(self) -> bool:
        """True if the line that Ctrl-C interrupted was empty, and not in a block."""
        return not self._in_block and not self._buffer()


def _line(prompt: str) -> str:
    if prompt and not sys.stdout.isatty():  # only answers go to standard output
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        return check_utf8(input(prompt), "Standard input")  # in the C locale, Python accepts any bytes
    except UnicodeDecodeError:
        raise ConfigError("Standard input is not UTF-8 text.", "Convert it, for example with iconv -t UTF-8.") from None


class Dialogue:
    """Loop of a conversation, which reads messages and commands, answers the messages and runs the commands.

    Answers have at most ``most`` tokens. If ``as_json``, print each answer, and the output of /stats, as one line of
    JSON. If ``status``, report each answer's tokens, speed and hit ratio in a line on standard error.
    """

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
        """Print a line to standard error if ``status`` is True."""
        if self._status:
            print(plain(text), file=sys.stderr, flush=True)

    def talk(self, source: ChatInput) -> None:
        """Answer messages and run commands until the input ends or the user leaves.

        Errors are printed if the input is a terminal; otherwise they are raised.
        """
        warned = False
        while True:
            try:
                text, is_command = source.read()
                warned = False
                if is_command and text.strip() in EXIT:
                    return
                if is_command:
                    self._run(text.strip())
                elif text.strip():
                    with interruptible() if source.is_terminal else nullcontext(lambda: False) as is_interrupted:
                        self._turn(text, is_interrupted)
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
                    print("Press Ctrl-C again or Ctrl-D, or type /exit, to end the chat.", file=sys.stderr)
            except MoetierError as error:
                if not source.is_terminal:
                    raise
                print(f"{plain(as_options(error.cause))}\n  {plain(as_options(error.fix))}", file=sys.stderr)

    def _run(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        command = self._commands.get(ALIASES.get(name, name))
        if command is None:
            raise ConfigError(
                f"There is no command {name}.", "/help lists the commands. If this is a message, begin it with a space."
            )
        command(rest.strip())

    def _turn(self, text: str, is_interrupted: Callable[[], bool]) -> None:
        before = self._conversation.left_out
        ids = self._conversation.prompt(text)
        if (out := self._conversation.left_out) > before:
            print(f"[the context is full: the model no longer sees the first {out} turns]", file=sys.stderr, flush=True)
        most = min(self._most, self._conversation.context - len(ids))
        answer = self._answering.answer(ids, most=most, is_interrupted=is_interrupted, echo=not self._json)
        self._spent += answer.timing
        if self._json:
            print(json.dumps(answer.to_json()), flush=True)
        self.say(answer.line())
        if answer.text:  # else leave out the question, too: templates require that questions and answers alternate
            self._conversation.add(text, answer.text, answer.ids)

    def _stats(self, _: str) -> None:
        if self._json:
            print(json.dumps(run_json(self._spent, self._tiers, self._watch.end())), flush=True)
        else:
            print(run_report(self._spent, self._tiers, self._watch.end()), file=sys.stderr)

    def _reset(self, _: str) -> None:
        self._conversation.reset()

    def _save(self, name: str) -> None:
        from moetier.tiers.store.atomic import write_durably

        if not name:
            raise ConfigError("/save needs the name of a file.", "Name one: /save FILE.")
        path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path raises if there is no home folder
        if path.exists():
            raise TargetError(f"{path} exists already.", "Name another file, or remove this one.")
        try:
            write_durably(path, json.dumps(self._conversation.messages, ensure_ascii=False, indent=1).encode() + b"\n")
        except OSError as error:
            raise TargetError(f"{path} can't be written ({error.strerror}).", "Name another file.") from error
        self.say(f"{path}: {len(self._conversation.messages)} messages saved")
