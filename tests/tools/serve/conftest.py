"""Servers' applications for tests of the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def app(tinymix_4bit: Path) -> Iterator[Any]:
    """An application with a model, whose context has 400 tokens."""
    from application_client import TEXT, answer_of
    from http_servers import serving

    with serving(tinymix_4bit, context=400) as (found, _):
        answer_of(found, TEXT, {"prompt": "Uno"})  # whatever thread it needs is there now
        yield found


@pytest.fixture(scope="module")
def engine(tinymix_4bit: Path) -> Iterator[Any]:
    """An answer service, with a context that limits no body."""
    from http_servers import serving

    with serving(tinymix_4bit, context=1 << 20) as (_, found):
        yield found
