"""Messages of a request as chat templates take them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

KEPT = ("tool_calls", "tool_call_id", "reasoning_content")


def for_template(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages, in OpenAI's form, with the fields that chat templates know; their content is one text.

    An answer keeps its reasoning, and what it says beside tool calls: the template decides what the model sees of them.
    """
    return [
        {"role": message["role"], "content": _text(message.get("content"))}
        | {name: message[name] for name in KEPT if message.get(name)}
        for message in messages
    ]


def _text(content: Any) -> str:
    """Return the content of a message, a string or a list of text parts, as one text."""
    return content if isinstance(content, str) else " ".join(part["text"] for part in content or ())
