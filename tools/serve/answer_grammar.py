"""Lark grammars of answers that may have reasoning and tool calls, in llguidance's variant of Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers.utils.chat_parsing.response_templates import ResponseTemplate

from moetier.runtime.engine.grammar import Grammar

from .call_syntax import BLANK, KEY, NAME, VALUE, CallSyntax, Parts, marks_of, parts_of
from .parsing import CALLS

ANY_OBJECT = {"type": "object"}
JSON_TYPES = {"integer", "number", "boolean", "object", "array", "null"}  # whose values are written as JSON
TERMINALS = [r"TEXT: /(.|\n)*/", r"BLANK: /[ \t\r\n]{1,4}/"]


class AnswerGrammar:
    """Grammar of the answers of one model, which is made of rules.

    Marks of reasoning and of calls are added tokens of the tokenizer, or written by letters. Such tokens may also stand
    between texts, but not in JSON. A lazy rule ends at the first place that it matches.
    """

    def __init__(self, template: ResponseTemplate | None, added: Mapping[str, int]) -> None:
        """``added`` has the ids of the added tokens that no text matches, by their texts."""
        fields = {} if template is None else template.fields
        marks = {name: marks_of(field) for name, field in fields.items()}
        written = re.sub(r"\\(.)", r"\1", "\n".join(mark for pair in marks.values() for each in pair for mark in each))
        self._added = {token: number for token, number in added.items() if token}
        self._split = re.compile("|".join(map(re.escape, sorted(self._added, key=len, reverse=True))) or "(?!)")
        self._other = self._token_without(written)
        self._regions = dict[str, tuple[Parts, Parts]]()  # what opens and what closes each that has reasoning
        for name, (opens, closes) in marks.items():
            if name != CALLS and opens and closes:
                begin, end = parts_of(opens[0], {}), parts_of(closes[0], {})
                if begin and end and BLANK not in (begin[0], end[0]):
                    self._regions[name] = begin, end
        self._rules = dict[str, str]()  # names of rules by what they are
        self._parts = dict[str, Grammar]()

    def free(self, region: str | None, syntax: CallSyntax, functions: Iterable[Mapping[str, Any]]) -> Grammar:
        """Return the grammar of answers whose calls are those of ``functions``, and which may be any text besides.

        ``region`` is the field of the template in which the answer begins.
        """
        pairs = self._regions.values()
        opened = [f"{self._until(begin)} {self._inside(end)}" for begin, end in pairs]
        called = f"{self._until(syntax.open[:1])} {self._called(syntax, functions)}"
        items = " | ".join(filter(None, [self._other, *opened, called]))
        # an answer may end while it reasons
        ends = " | ".join(["TEXT", *(f"{self._until(begin)} {self._thoughts(end)} TEXT" for begin, end in pairs)])
        start = f"({items})* ({ends})"
        if region in self._regions:
            end = self._regions[region][1]
            start = f"{self._inside(end)} {start} | {self._thoughts(end)} TEXT"
        return self._grammar(start)

    def formed(
        self,
        region: str | None,
        answer: Grammar | None,
        syntax: CallSyntax | None = None,
        functions: Sequence[Mapping[str, Any]] = (),
        *,
        one_call: bool = False,
    ) -> Grammar:
        """Return the grammar of an answer: reasoning, if any; then calls of ``functions``, or ``answer``."""
        bodies = list[str]()
        if syntax is not None and functions:
            call = f"{self._sequence(syntax.open[:1])} {self._called(syntax, functions)}"
            bodies.append(call if one_call else f"{call} (BLANK? {call})*")
        if answer is not None:
            bodies.append(self._part(answer))
        if region in self._regions:
            before = f"{self._inside(self._regions[region][1])} BLANK?"
        else:
            pairs = self._regions.values()
            thoughts = [f"{self._sequence(begin)} {self._inside(end)} BLANK?" for begin, end in pairs]
            before = f"({' | '.join(thoughts)})?" if thoughts else ""
        return self._grammar(f"{before} ({' | '.join(bodies)})")

    def _grammar(self, start: str) -> Grammar:
        rules = (f"{name}: {text}" for text, name in self._rules.items())
        return Grammar.lark("\n".join([f"start: {start}", *rules, *TERMINALS]), self._parts)

    def _rule(self, text: str, attribute: str = "") -> str:
        """Return the name of a rule for ``text``."""
        return self._rules.setdefault(text, f"r{len(self._rules)}{attribute}").removesuffix(attribute)

    def _part(self, grammar: Grammar) -> str:
        name = f"p{len(self._parts)}"
        self._parts[name] = grammar
        return f"@{name}"

    # -- marks ---------------------------------------------------------------------------------------------------------

    def _text(self, text: str) -> str:
        """Return an expression for a text. Each added token in it may be sampled as one token, or letter by letter."""
        found, place = list[str](), 0
        for token in self._split.finditer(text):
            found += [_quoted(text[place : token.start()]), f"(<[{self._added[token[0]]}]> | {_quoted(token[0])})"]
            place = token.end()
        return " ".join(filter(None, [*found, _quoted(text[place:])]))

    def _sequence(self, parts: Iterable[str], values: Mapping[str, str] | None = None) -> str:
        """Return an expression for the parts of a pattern. ``values``: those for parts other than text and BLANK."""
        known = {BLANK: "BLANK?", **(values or {})}
        return " ".join(known[part] if part.startswith("\0") else self._text(part) for part in parts)

    def _until(self, parts: Parts) -> str:
        """Return an expression for any text up to and with ``parts``. The first of these is a text."""
        first, rest = parts[0], self._sequence(parts[1:])
        lazy = self._rule(rf"/(.|\n)*{_escaped(first)}/", "[lazy]")
        token = self._split.match(first)
        if token is None:
            return f"{lazy} {rest}"
        after = self._text(first[token.end() :])
        return f"(TEXT <[{self._added[token[0]]}]> {after} | {lazy}) {rest}"

    def _token_without(self, marks: str) -> str:
        """Return an expression for a text and an added token not in ``marks``; "" if there is no such token."""
        others = [str(number) for token, number in self._added.items() if token not in marks]
        return f"TEXT <[{','.join(others)}]>" if others else ""

    def _thoughts(self, end: Parts) -> str:
        """Return an expression for texts and added tokens in turn, in a region that ends with ``end``."""
        other = self._token_without(end[0])
        return f"({other})*" if other else ""

    def _inside(self, end: Parts) -> str:
        """Return an expression for the rest of a region that ends with ``end``."""
        return self._rule(f"{self._thoughts(end)} {self._until(end)}")

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _called(self, syntax: CallSyntax, functions: Iterable[Mapping[str, Any]]) -> str:
        """Return an expression for a call, without the first part of its opening mark."""
        return self._rule(" | ".join(self._call(syntax, function) for function in functions))

    def _call(self, syntax: CallSyntax, function: Mapping[str, Any]) -> str:
        name = str(function["name"])
        values = {NAME: self._text(name)}
        begin, end = self._sequence(syntax.open[1:], values), self._sequence(syntax.close, values)
        if syntax.argument is not None:
            arguments = " ".join(self._arguments(syntax.argument, function))
            return f"{begin} BLANK? {arguments} {end}"
        schema = self._part(arguments_of(function))
        if syntax.keys is None:
            return f"{begin} BLANK? {schema} BLANK? {end}"
        head = json.dumps({syntax.keys[0]: name})[:-1] + f", {json.dumps(syntax.keys[1])}: "
        return f'{begin} BLANK? {_quoted(head)} {schema} "}}" BLANK? {end}'

    def _arguments(self, argument: Parts, function: Mapping[str, Any]) -> Iterable[str]:
        """Yield an expression for each argument of a function, in the order of its schema."""
        schema = function.get("parameters") or {}
        properties, required = schema.get("properties"), schema.get("required")
        properties = properties if isinstance(properties, Mapping) else {}
        required = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
        place = argument.index(VALUE)
        for name in dict.fromkeys([*properties, *required]):
            value = properties.get(name)
            begin = self._sequence(argument[:place], {KEY: self._text(name)})
            rest = f"{begin} {self._value(value, schema, argument[place + 1 :])} BLANK?"
            yield rest if name in required else f"({rest})?"

    def _value(self, value: Any, schema: Mapping[str, Any], end: Parts) -> str:
        """Return an expression for the value of an argument and its closing mark."""
        close = self._sequence(end)
        known = value if isinstance(value, Mapping) else {}
        types = known.get("type")
        if types and all(each in JSON_TYPES for each in (types if isinstance(types, list) else [types])):
            shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
            return f"{self._part(Grammar.json_schema({**shared, **known}, lenient=True))} {close}"
        choices = known.get("enum")
        if isinstance(choices, list) and choices and all(isinstance(choice, str) and choice for choice in choices):
            return f"({' | '.join(map(self._text, choices))}) {close}"
        return self._until(end[1:] if end[0] == BLANK else end)


def arguments_of(function: Mapping[str, Any]) -> Grammar:
    """Return the grammar of a function's arguments. If it is not strict, unknown keywords of its schema are ignored."""
    schema = {**(function.get("parameters") or {}), **ANY_OBJECT}
    return Grammar.json_schema(schema, lenient=not function.get("strict"))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _escaped(text: str) -> str:
    """Return a regular expression of Lark for a text."""
    return re.escape(text).replace("/", r"\/").replace("\\\n", r"\n")
