"""Finds out whether a client changes something near the beginning of its prompts, in every request.

Then nothing behind that place is reused, though it is the same each time: a header with a number, a date, a count.
"""

from __future__ import annotations

import logging
import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence

LEAST = 512  # tokens of prompts that are compared; less is computed soon
EARLY = 0.25  # share of a prompt that is its beginning
WINDOW = 256  # tokens after the difference in which the prompts must become alike again
ALIKE = 64  # so many tokens must be alike then
MAX_USERS = 64  # of which prompts are kept
KEPT = 4  # prompts of each: a client may have several conversations at a time

_log = logging.getLogger(__name__)


class EarlyDifference:
    """Compares prompts of one user with each other, and logs once if they differ early and are alike behind it.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards: ``_prompts``, ``_is_logged``
        self._prompts = OrderedDict[str, deque[Sequence[int]]]()
        self._is_logged = False

    def note(self, user: str, ids: Sequence[int]) -> None:
        """Compare a prompt's token ids with those of the user's latest KEPT prompts, and keep them for the next."""
        if self._is_logged or len(ids) < LEAST:
            return
        with self._lock:
            earlier = self._prompts.setdefault(user, deque(maxlen=KEPT))
            self._prompts.move_to_end(user)
            if len(self._prompts) > MAX_USERS:
                self._prompts.popitem(last=False)
            places = [place for other in earlier if (place := difference(other, ids)) is not None]
            is_new = all(_common(other, ids) < EARLY * len(ids) for other in earlier)
            earlier.append(array("i", ids))
            if not places or not is_new or self._is_logged:
                return
            self._is_logged = True
            self._prompts.clear()
        _log.warning(
            "the prompts of a client differ from token %s on, and are the same again soon after it. All that follows "
            "is computed anew each time. If the client writes a header or a number there, --leave-out can leave it out "
            "of the prompts: see docs/serve.md.",
            f"{max(places):,}",
        )


def difference(some: Sequence[int], others: Sequence[int]) -> int | None:
    """Return where two prompts differ early and become alike again soon afterwards; None if they do not."""
    place, length = _common(some, others), min(len(some), len(others))
    if length < LEAST or place >= EARLY * length:
        return None
    sample = tuple(some[place + ALIKE : place + 2 * ALIKE])  # behind what was changed
    window = others[place : place + WINDOW + ALIKE]
    is_alike = any(tuple(window[at : at + ALIKE]) == sample for at in range(len(window) - ALIKE + 1))
    return place if is_alike else None


def _common(some: Sequence[int], others: Sequence[int]) -> int:
    pairs = zip(some, others, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(some), len(others)))
