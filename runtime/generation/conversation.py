"""A conversation with a model: its messages, and prompts that fit the context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moetier.runtime.model.context import counted, first_ids
from moetier.tiers.errors import ConfigError

Message = dict[str, str]

# for models without a chat template; it looks like the text of a play
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('system', 'developer') %}{{ message.role | capitalize }}:\n{% endif %}"
    "{{ message.content | trim }}\n\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
PLAIN_STOP = "\n\nUser:"  # where a model with this template begins to write the user's part


class Conversation:
    """Messages of a system, a user and an assistant, as transformers' chat templates take them.

    A *turn* is a message of the user and the answer to it.

    A prompt has fewer than ``context`` tokens. If the next prompt would leave fewer than ``answer_tokens`` tokens for
    an answer, its oldest turns are left out until half of the context is free. So turns are seldom left out. At all
    other times, a prompt begins with the previous prompt and its answer, whose keys and values are kept. The system
    prompt is never left out, and ``messages`` keeps all turns.
    """

    def __init__(self, tokenizer: Any, *, system: str | None, context: int, answer_tokens: int) -> None:
        self._tokenizer = tokenizer
        self.context = context
        self.answer_tokens = answer_tokens
        self._system = _system_messages(system)
        self._said: list[Message] = []  # of the user and the assistant alternately
        self._out = 0  # number of messages, from the first on, that prompts leave out
        self._last = "", 0  # text and number of tokens of the last prompt
        # text and tokens of a prompt and its answer: the same text may have other tokens than the model has sampled
        self._computed: tuple[str, list[int]] | None = None
        self.is_plain = not tokenizer.chat_template
        self._encode([{"role": "user", "content": "."}])  # raises now if the template refuses the system prompt

    @property
    def messages(self) -> list[Message]:
        """All messages so far, the system prompt first."""
        return [*self._system, *self._said]

    @property
    def left_out(self) -> int:
        """Number of turns that the last prompt left out."""
        return self._out // 2

    def prompt(self, text: str) -> list[int]:
        """Return the token ids of a prompt for an answer to the user's ``text``.

        The text becomes a part of the conversation only if ``add`` is called with it and the answer. Raises ConfigError
        if the text does not fit into the context, or if the chat template refuses it.
        """
        question: Message = {"role": "user", "content": text}
        out, ids = self._out, self._encode([*self._said[self._out :], question])
        if len(ids) + self.answer_tokens > self.context:
            while len(ids) > self.context // 2 and out < len(self._said):
                out += 2
                ids = self._encode([*self._said[out:], question])
        if len(ids) >= self.context:
            raise ConfigError(
                f"The prompt takes {counted(len(ids), self.context)} tokens, "
                f"but the context has only {self.context:,}.",
                "Shorten the message, or give a longer --context, if the model supports it.",
            )
        self._out = out
        self._last = self._render([*self._said[out:], question]), len(ids)
        return ids

    def add(self, text: str, answer: str, ids: Sequence[int] = ()) -> None:
        """Append the user's ``text`` and the model's ``answer`` to the conversation.

        ``ids`` are the tokens of the last prompt and the answer, if the next prompt may begin with them. Raises
        ConfigError, and appends nothing, if the chat template refuses the answer: it would refuse every later prompt,
        too.
        """
        turn: list[Message] = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        try:
            self._render([*self._said[self._out :], *turn, {"role": "user", "content": "."}])
        except ConfigError as error:
            raise ConfigError(
                f"This turn is left out of the conversation, because of the answer. {error.cause}",
                "Ask again, in other words.",
            ) from error
        self._said += turn
        tokens = [*ids]
        ends = getattr(self._tokenizer, "all_special_ids", ())
        while tokens and tokens[-1] in ends:  # the end, which the template writes
            tokens.pop()
        prompt, count = self._last
        is_same = len(tokens) > count and self._tokenizer.decode(tokens[count:]) == answer
        self._computed = (prompt + answer, tokens) if is_same else None

    def reset(self) -> None:
        """Remove all messages but the system prompt."""
        self._said, self._out, self._computed = [], 0, None

    @property
    def system(self) -> str | None:
        """The system prompt; None: there is none."""
        return self._system[0]["content"] if self._system else None

    def set_system(self, system: str | None) -> None:
        """Replace the system prompt. Raises ConfigError, and changes nothing, if the chat template refuses it."""
        self._replace(_system_messages(system), self._said)

    def load(self, messages: Sequence[Message]) -> None:
        """Replace all messages. A system prompt stays if ``messages`` have none.

        Raises ConfigError, and changes nothing, if they are not questions and answers alternately, behind a system
        prompt or none, or if the chat template refuses them.
        """
        system = [message for message in messages[:1] if message["role"] == "system"]
        said = [*messages[len(system) :]]
        if [message["role"] for message in said] != ["user", "assistant"] * (len(said) // 2):
            raise ConfigError(
                "The messages are not questions of the user and answers of the assistant alternately.",
                "Give a conversation that ends with an answer.",
            )
        self._replace(system or self._system, said)
        self._out, self._computed = 0, None

    def take_back(self) -> list[Message]:
        """Remove the last turn, and return its two messages; none if there is no turn."""
        taken = self._said[-2:]
        self._said = self._said[:-2]
        self._out = min(self._out, len(self._said))
        return taken

    def put_back(self, taken: Sequence[Message]) -> None:
        """Add what ``take_back`` has returned."""
        self._said += taken

    def _replace(self, system: list[Message], said: list[Message]) -> None:
        before = self._system, self._said
        self._system, self._said = system, said
        try:
            self._render([*said, {"role": "user", "content": "."}])
        except ConfigError:
            self._system, self._said = before
            raise

    def _encode(self, said: Sequence[Message]) -> list[int]:
        text = self._render(said)
        if self._computed is not None and text.startswith(self._computed[0]):
            rest = text.removeprefix(self._computed[0])
            return [*self._computed[1], *first_ids(self._tokenizer, rest, self.context, add_special_tokens=False)]
        return first_ids(self._tokenizer, text, self.context, add_special_tokens=self.is_plain)

    def _render(self, said: Sequence[Message]) -> str:
        import jinja2

        messages = [*self._system, *said]
        template = PLAIN_TEMPLATE if self.is_plain else None
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, tokenize=False
            )
        except (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise ConfigError(
                f"The model's chat template refuses this conversation: {_first_line(error)}",
                "Leave out --system." if self._system else "See chat_template.jinja in the model directory.",
            ) from error
        return text


def _system_messages(system: str | None) -> list[Message]:
    return [] if system is None else [{"role": "system", "content": system}]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
