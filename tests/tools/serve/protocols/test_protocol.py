"""Server-sent events."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')

from moetier.tools.serve.protocols.protocol import event


def test_an_event_is_one_line_for_every_client() -> None:
    """Some take other characters for the end of a line than those of server-sent events."""
    text = "a" + "".join(map(chr, [*range(0x21), *range(0x7F, 0xA1), 0x2028, 0x2029, 0xFEFF, 0x1F600]))
    name, data, end = event({"text": text}, "delta").splitlines()
    assert (name, end) == ("event: delta", "")
    assert json.loads(data.removeprefix("data: ")) == {"text": text}
