"""What a look at one thing found, and what to do about it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from typing import Any

from moetier.tiers.errors import MoetierError
from moetier.tools.cli.failure import as_options, plain


class State(StrEnum):
    """Severity of a finding."""

    OK = "ok"
    WARN = "warn"  # it works, and could work better
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """``advice`` is "" where there is nothing to do."""

    name: str
    state: State
    found: str
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON."""
        return asdict(self)


def ok(name: str, found: str) -> Finding:
    """Return a finding with nothing to do."""
    return Finding(name, State.OK, found)


def warn(name: str, found: str, advice: str) -> Finding:
    """Return a finding of something that works but could work better, and how."""
    return Finding(name, State.WARN, as_options(found), as_options(advice))


def fail(name: str, found: str, advice: str) -> Finding:
    """Return a finding of something that does not work, and its remedy."""
    return Finding(name, State.FAIL, as_options(found), as_options(advice))


def look(name: str, at: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What a look finds; whatever breaks it is a finding too, so that the next things are looked at."""
    try:
        yield from at()
    except MoetierError as error:
        yield fail(name, error.cause, error.fix)
    except Exception as error:  # a library that is broken, a kernel that has no such file
        said = " ".join(str(error).split())
        yield fail(name, f"{type(error).__name__}: {said}", "See what is wrong with that; it could not be looked at.")


def lines_of(findings: Iterable[Finding], width: int) -> Iterator[str]:
    """For people; lines of up to ``width`` characters. The advice stands below."""
    for each in findings:
        head = f"{each.state:<4}  {each.name:<12}  "
        indent = " " * len(head)
        wrap = partial(
            textwrap.wrap, width=width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        yield from map(plain, wrap(each.found, initial_indent=head))
        if each.advice:
            yield from map(plain, wrap(each.advice, initial_indent=f"{indent[3:]}-> "))
