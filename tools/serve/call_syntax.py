"""How a model writes tool calls, taken from the response template by which they are parsed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_parsing.response_templates import ResponseTemplate, ResponseTemplateField

from .parsing import CALLS

BLANK, NAME, KEY, VALUE = "\0blank", "\0name", "\0key", "\0value"  # parts that are no text
_PART = re.compile(
    r"(?P<blank>\\s[*+?])"
    r"|\(\?P<(?P<group>\w+)>(?:\[(?:\\.|[^\]\\])+\]|\\.|[^()\[\]\\])+\)"
    r"|\\(?P<escaped>[^\w])"
    r"|(?P<plain>[^\\()\[\]{}.*+?|^$])",
    re.DOTALL,
)

Parts = tuple[str, ...]  # texts, and BLANK, NAME, KEY and VALUE


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """How a tool call is written.

    Attributes:
        open: what stands before the arguments.
        close: what stands after them.
        keys: keys of the function's name and of the arguments in the JSON object of a call; None if there is no such
            object, as ``open`` has the name.
        argument: an argument; None if the arguments are a JSON object.
    """

    open: Parts
    close: Parts
    keys: tuple[str, str] | None = None
    argument: Parts | None = None


def syntax_of(template: ResponseTemplate) -> CallSyntax | None:
    """Return how tool calls are written; None if the template is of another kind than those that are known here."""
    field = template.fields.get(CALLS)
    transform = None if field is None or field.transform_each else field.transform
    function = transform.get("function") if isinstance(transform, Mapping) else None
    if field is None or function is None or field.content not in ("json", "xml-inline"):
        return None
    name, arguments = ("{content.name}", "{content.arguments}") if function == "{content}" else _named(function)
    opens, closes = marks_of(field)
    groups = {name[1:-1]: NAME}
    begin, end = parts_of(opens[0], groups) if opens else None, parts_of(closes[0], {}) if closes else None
    if begin is None or end is None or not end:
        return None
    begin = begin[1:] if begin[0] == BLANK else begin
    if not begin or begin[0] in (BLANK, NAME):
        return None
    return _with_arguments(field, begin, end, name, arguments)


def _with_arguments(
    field: ResponseTemplateField, begin: Parts, end: Parts, name: str, arguments: str
) -> CallSyntax | None:
    keys = [found[1] for each in (name, arguments) if (found := re.fullmatch(r"\{content\.(\w+)\}", each))]
    options = {key for key, value in field.content_args.items() if value}
    if field.content == "json" and not options <= {"allow_non_json"}:
        return None
    if field.content == "json" and len(keys) == 2 and NAME not in begin:
        return CallSyntax(begin, end, (keys[0], keys[1]))
    if arguments != "{content}" or NAME not in begin:
        return None
    if field.content == "json":
        return CallSyntax(begin, end)
    argument = parts_of(str(field.content_args.get("tag_pattern")), {"key": KEY, "value": VALUE})
    if options != {"tag_pattern"} or argument is None or not {KEY, VALUE} <= {*argument} or argument[-1] == VALUE:
        return None
    return CallSyntax(begin, end, argument=argument)


def _named(function: Any) -> tuple[str, str]:
    if not isinstance(function, Mapping):
        return "", ""
    return str(function.get("name", "")), str(function.get("arguments", ""))


def marks_of(field: ResponseTemplateField) -> tuple[Sequence[str], Sequence[str]]:
    """Return regular expressions for what opens and for what closes a field; none where it has no such mark."""
    pairs = (field.open_literals, field.open_re), (field.close_literals, field.close_re)
    opens, closes = (
        [re.escape(each) for each in literals] if literals else [] if pattern is None else [pattern.pattern]
        for literals, pattern in pairs
    )
    return opens, closes


def parts_of(pattern: str, groups: Mapping[str, str]) -> Parts | None:
    """Return the parts of a simple regular expression, in which ``groups`` has the part for each named group.

    Returns None if it has other things than texts, white space and these groups.
    """
    parts, place = list[str](), 0
    while place < len(pattern):
        found = _PART.match(pattern, place)
        if found is None or (found["group"] is not None and found["group"] not in groups):
            return None
        place = found.end()
        if found["blank"]:
            parts.append(BLANK)
        elif found["group"]:
            parts.append(groups[found["group"]])
        else:
            letter = found["escaped"] or found["plain"]
            if parts and not parts[-1].startswith("\0"):
                parts[-1] += letter
            else:
                parts.append(letter)
    return (*parts,)
