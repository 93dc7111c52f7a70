"""Remove secrets from texts: user information and queries of addresses are not printed."""

from __future__ import annotations

import re

# user information in a text: up to an "@", or after a ":" that no port follows, as secret keys may have slashes. A user
# may have typed one slash, which is also what a path makes of two, or no scheme
USER = re.compile(r"(?<=:/)(/?)(?:[^/\s@]*@|[^/\s:@\[]*:(?!\d{1,5}(?:[^\w@]|$))[^\s@]*@)")
_BARE = re.compile(r"(?<![^\s'\"(</])[^\s'\":/@]+:(?!/)[^\s@]+@")
# a query, to the end of the word, but for what may follow an address in a text
_QUERY = re.compile(r"(:/{1,2}[^\s?]*)\?\S*?(?=[\"'<>).,:;]*(?:\s|$))")


def redacted(text: str) -> str:
    """Return ``text`` with "***" in place of user information and queries of the addresses in it."""
    return _QUERY.sub(r"\1?***", _BARE.sub("***@", USER.sub(r"\1***@", text)))


def redacted_error(error: BaseException) -> Exception:
    """Return an exception to chain in place of a library's: its text without secrets, which tracebacks print."""
    return RuntimeError(f"{type(error).__module__}.{type(error).__name__}: {redacted(str(error))}")
