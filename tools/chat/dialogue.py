"""The dialogue between a person and a model: messages, answers and commands by turns."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from moetier.runtime.generation.conversation import Conversation
from moetier.tiers.errors import MoetierError
from moetier.tools.cli.daemon_reads import DaemonWatch
from moetier.tools.cli.failure import as_options, plain
from moetier.tools.cli.report import Timing

from .answer import Answering, Leave, interruptible
from .chat_input import ChatInput
from .options import AnswerOptions
from .state import KeptConversation

if TYPE_CHECKING:
    from moetier.runtime.model.tiers import Tiers

EXIT = ("/exit", "/bye", "/quit")  # commands that end the chat
ROOM = 4  # a prompt leaves 1/ROOM of the context to the answer, or max_new_tokens if that is less


class Dialogue:
    """Loop of a conversation, which reads messages and commands, answers the messages and runs the commands.

    If ``as_json``, print each answer, and the output of /stats, as one line of JSON. If ``status``, report each
    answer's tokens, speed and hit ratio in a line on standard error. ``title`` says what the model is. The conversation
    is saved in ``kept`` after each answer.
    """

    def __init__(
        self,
        conversation: Conversation,
        answering: Answering,
        tiers: Tiers,
        watch: DaemonWatch,
        *,
        options: AnswerOptions,
        kept: KeptConversation,
        title: str,
        as_json: bool,
        status: bool,
    ) -> None:
        self.conversation = conversation
        self.tiers = tiers
        self.watch = watch
        self.options = options
        self.title = title
        self.as_json = as_json
        self.spent = Timing(0, 0, 0.0, 0.0, 0)
        self._answering = answering
        self._kept = kept
        self._status = status
        self._is_interruptible = False

    def say(self, text: str) -> None:
        """Print a line to standard error if ``status`` is True."""
        if self._status:
            print(plain(text), file=sys.stderr, flush=True)

    def talk(self, source: ChatInput, run_command: Callable[[str], object]) -> None:
        """Answer messages and run commands until the input ends or the user leaves.

        Errors are printed if the input is a terminal; otherwise they are raised.
        """
        self._is_interruptible = source.is_terminal
        warned = False
        while True:
            try:
                text, is_command = source.read()
                warned = False
                if is_command and text.strip() in EXIT:
                    return
                if is_command:
                    run_command(text.strip())
                elif text.strip():
                    self.answer(text)
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

    def answer(self, text: str, *, in_place_of_last: bool = False) -> None:
        """Answer a message, and add both to the conversation; to the end, or in place of the last message and answer.

        If there is no text of an answer, the conversation stays as it is. Raises MoetierError if the message can't be
        answered.
        """
        with interruptible() if self._is_interruptible else nullcontext(lambda: False) as is_interrupted:
            taken = self.conversation.take_back() if in_place_of_last else []
            is_added = False
            try:
                is_added = self._add_turn(text, is_interrupted)
            finally:
                if not is_added:
                    self.conversation.put_back(taken)
        self._kept.save(self.conversation.messages)

    def _add_turn(self, text: str, is_interrupted: Callable[[], bool]) -> bool:
        """Answer a message. Return whether it and its answer were added to the conversation."""
        conversation, most = self.conversation, self.options.max_new_tokens
        before = conversation.left_out
        conversation.answer_tokens = min(most, conversation.context // ROOM)
        ids = conversation.prompt(text)
        if (out := conversation.left_out) > before:
            print(f"[the context is full: the model no longer sees the first {out} turns]", file=sys.stderr, flush=True)
        most = min(most, conversation.context - len(ids))
        if self.spent.new_tokens and not (self._is_interruptible or self.as_json):
            print()  # between two answers that go through a pipe
        answer = self._answering.answer(ids, most=most, is_interrupted=is_interrupted, echo=not self.as_json)
        self.spent += answer.timing
        if self.as_json:
            print(json.dumps(answer.to_json()), flush=True)
        self.say(answer.line())
        if not answer.text:  # leave out the question, too: templates require that questions and answers alternate
            return False
        conversation.add(text, answer.text, answer.ids)
        return True
