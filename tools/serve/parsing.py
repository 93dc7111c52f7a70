"""Tell text, reasoning and tool calls of an answer apart, with transformers' parser for the model's form of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from transformers.cli.serving.utils import ToolCall, get_response_template, response_events_to_chunks
from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import ResponseTemplate, load_response_template

from moetier.runtime.libraries.transformers_internals import parsed_field, parsed_length, parsed_text

CALLS = "tool_calls"  # field of a response template that holds tool calls

_log = logging.getLogger(__name__)


class AnswerForm:
    """How a model writes reasoning and tool calls: its response template in transformers."""

    def __init__(self, template: ResponseTemplate, special: Mapping[int, str]) -> None:
        """``special`` has the text of each special token of the tokenizer, by id."""
        self.template = template
        self._textual = dataclasses.replace(
            template, fields={name: field for name, field in template.fields.items() if name != CALLS}
        )
        fields = template.fields.values()
        marks = [each.pattern for field in fields for each in (field.open_re, field.close_re) if each is not None]
        literal = re.sub(r"\\(.)", r"\1", "\n".join(marks), flags=re.DOTALL)  # without backslashes of escapes
        self.special = special
        self.unmarked = frozenset(number for number, text in special.items() if text not in literal)

    def parser(self, prefill: str, tools: Sequence[Any] | None, *, is_formed: bool = False) -> AnswerParser:
        """Return a parser for one answer, whose beginning ``prefill`` is the end of the prompt.

        Without ``tools``, tool calls stay part of the text. If the text ``is_formed``, no mark is in it.
        """
        return AnswerParser(self, self.template if tools else self._textual, prefill, tools, is_formed=is_formed)


def form_of(model: Any, tokenizer: Any) -> AnswerForm | None:
    """Return the form of a model's answers; None if neither its tokenizer has one nor transformers for its type."""
    found = get_response_template(tokenizer, model)
    if found is None:
        return None
    try:
        template = load_response_template(found)
    except (ValueError, TypeError, AttributeError) as error:
        _log.warning("The tokenizer's response_template can't be used: reasoning and tool calls stay text (%s).", error)
        return None
    added = tokenizer.added_tokens_decoder
    return AnswerForm(template, {number: token.content for number, token in added.items() if token.special})


class AnswerParser:
    """Parser of one answer. Its parts are strings, and transformers' ReasoningText and ToolCall objects.

    If transformers' parser fails, as for a malformed tool call, the rest of the answer is plain text, from the mark
    that began the call. The parts depend on the answer's text alone, not on the pieces in which it comes.
    """

    def __init__(
        self,
        form: AnswerForm,
        template: ResponseTemplate,
        prefill: str,
        tools: Sequence[Any] | None,
        *,
        is_formed: bool = False,
    ) -> None:
        self._parser: ResponseParser | None = _begun(template, prefill, list(tools or ()))
        self._form = form
        self._template = template
        self._is_formed = is_formed
        self._start = len(parsed_text(self._parser))  # place in the parser's text where the rest would begin
        self.region = parsed_field(self._parser)  # field that the prompt has begun

    @property
    def skipped(self) -> Container[int]:
        """Ids of special tokens that are no part of the answer's text."""
        return self._form.special if self._parser is None else self._form.unmarked

    def feed(self, text: str) -> list[Any]:
        """Return the parts that are complete with ``text``, the next text of the answer."""
        parts = list[Any]()
        for place, letter in enumerate(text):
            if self._parser is None:
                parts.append(text[place:])
                break
            try:  # letter by letter, as the parser loses what a piece has in front of a malformed call
                parts += _parts(self._parser.feed(letter))
            except Exception as error:  # any, as the parser evaluates what a model wrote
                parts += self._rest(error)
            else:
                if parsed_field(self._parser) != CALLS:
                    self._start = parsed_length(self._parser)
                if self._is_formed and any(type(part) is str and part.strip() for part in parts):
                    parts.append(self._unparsed)
                    self._parser = None
        return [part for _, like in itertools.groupby(parts, type) for part in _joined(like)]

    def finish(self) -> list[Any]:
        """Return the last parts, after the last text. A tool call that has no end is plain text."""
        if self._parser is None:
            return []
        try:
            events = self._parser.finalize()[1]
            if any(event["type"] == "region_close" and not self._is_ended(event["field"]) for event in events):
                raise ValueError("a tool call has no end")
            return _parts(events)
        except Exception as error:
            return self._rest(error, self._form.special.values())

    def _is_ended(self, name: str) -> bool:
        """Return whether the answer has the end mark of a field. True if it is not CALLS, or has no end mark."""
        end = self._template.fields[name].close_re
        return name != CALLS or end is None or end.search(self._unparsed) is not None

    def _rest(self, error: Exception, ends: Iterable[str] = ()) -> list[str]:
        """Return the text from the failed call on, without the marks ``ends``, of which one may have ended it."""
        _log.info("the rest of an answer is plain text: its parser failed with %s", type(error).__name__)
        rest, self._parser = self._unparsed, None
        for mark in ends:
            rest = rest.removesuffix(mark)
        return [rest] if rest else []

    @property
    def _unparsed(self) -> str:
        assert self._parser is not None
        return parsed_text(self._parser)[self._start :]


def _begun(template: ResponseTemplate, prefill: str, tools: list[Any]) -> ResponseParser:
    """Return transformers' parser in the state after ``prefill``, the beginning of an answer."""
    fresh = ResponseParser(template, prefix="", tools=tools)
    try:
        parser = ResponseParser(template, prefix=prefill, tools=tools)
    except Exception:  # any, as in feed; a request may have a say in what its template writes
        return fresh
    changes = [event for event in parser.initial_events if event["type"] in ("region_open", "region_close")]
    is_within = changes and changes[-1]["type"] == "region_open" and changes[-1]["field"] != template.implicit
    return parser if is_within else fresh  # outside of all marks, only the fresh one holds no text of the prompt back


def _joined(like: Iterable[Any]) -> list[Any]:
    """Return parts of one type: texts as one text, others as they are."""
    parts = list(like)
    return [type(parts[0])("".join(parts))] if isinstance(parts[0], str) else parts


def _parts(events: Iterable[Mapping[str, Any]]) -> list[Any]:
    return [part for event in events for part in _parts_of(event)]


def _parts_of(event: Mapping[str, Any]) -> list[Any]:
    if event["type"] == "region_close" and event["field"] == CALLS:
        value = event["value"]
        return [_call(each) for each in (value if isinstance(value, list) else [value])]
    found: list[Any] = response_events_to_chunks([dict(event)])
    return found


def _call(value: Any) -> ToolCall:
    """Return a parsed tool call. Raises an exception if it has no name, or its arguments are not a JSON object."""
    name, arguments = value["function"]["name"], value["function"]["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, allow_nan=False)
    if not isinstance(name, str) or not isinstance(json.loads(text), dict):
        raise TypeError("not a name and an object")
    return ToolCall(name, text)
