"""Decide whether speculation pays for the present workload, by decoding alternately with and without it.

A step decodes one token. Its duration depends mostly on how many experts it misses. This number varies by chance, which
would hide the gain or loss of speculation for hundreds of steps. So a ghost cache counts the misses that each step
would have without speculation. A trial compares pairs of windows of steps, one with speculation and one without. It
fits a line to the pairs: the difference of their times as a function of the difference of their misses. The value of
the line at equal misses is the gain of speculation. This is an analysis of covariance (Fisher 1932).

The module does no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from statistics import fmean, median
from typing import NamedTuple

from moetier.tiers.cache.policies import DEFAULT_POLICY, POLICIES
from moetier.tiers.layout import ExpertKey

SPAN = 4  # number of steps in a window
FEWEST, MOST = 8, 24  # smallest and largest number of pairs of windows in a trial
CLEAR = 4  # number of pairs after which a trial may end early if speculation clearly loses time
HOLD = {True: 1024, False: 256}  # steps for which a new verdict (for, against) holds; predictions improve by learning
LONGEST = 4096  # largest number of steps for which a verdict holds that was confirmed several times
WARM = 64  # steps before a trial during which the ghost cache fills
# Standard errors by which the gain must differ from 0 for a verdict: SURE for speculation, and against it in the first
# FEWEST pairs; UNSURE against it later, as a trial costs time while speculation loses.
SURE, UNSURE = 2.5, 1.0
ODD = 4.0  # a step is left out if it takes longer than this multiple of its window's median


class Window(NamedTuple):
    """Means over the steps of a window, or the numbers of one step."""

    seconds: float  # duration of a step
    misses: float  # misses of a step in the ghost cache


class Mode(Enum):
    """When to speculate: never, while it pays, or always."""

    OFF = "off"
    AUTO = "auto"
    ALWAYS = "always"


@dataclass(slots=True)
class Controller:
    """Turns speculation on and off. ``is_on`` applies to the next step, and ``step`` reports the result of a step.

    A *trial* alternates windows with and without speculation, in the order on, off, off, on, so that a drift affects
    both kinds equally. It ends as soon as it is clear which is faster, or after MOST pairs. Its verdict holds for a
    number of steps, which doubles each time that the next trial has the same verdict.
    """

    mode: Mode
    span: int = SPAN  # number of steps in a window
    is_on: bool = field(init=False)
    trials: int = field(init=False, default=0)  # number of trials that have ended
    steps_on: int = field(init=False, default=0)  # number of steps with speculation
    steps_off: int = field(init=False, default=0)  # number of steps without speculation
    _window: list[Window] = field(init=False, default_factory=list)  # steps of the present window
    _windows: dict[bool, list[Window]] = field(init=False, default_factory=lambda: {True: [], False: []})
    _left: int = field(init=False, default=0)  # steps for which the verdict still holds; 0 during a trial
    _held: int = field(init=False, default=0)  # steps for which the latest verdict holds in all
    _verdict: bool | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.is_on = self.mode is not Mode.OFF

    def step(self, seconds: float, misses: float = 0.0) -> None:
        """Report a step that was done with or without speculation according to ``is_on``.

        ``seconds`` is its duration, ``misses`` the number of its misses in the ghost cache.
        """
        if self.is_on:
            self.steps_on += 1
        else:
            self.steps_off += 1
        if self.mode is not Mode.AUTO:
            return
        if self._left:
            self._left -= 1
            if not self._left:
                self._begin_trial()
            return
        self._window.append(Window(seconds, misses))
        if len(self._window) >= self.span:  # more, if an exception interrupted the end of the last window
            self._windows[self.is_on].append(_typical(self._window))
            self._window.clear()
            self._turn()

    @property
    def is_watching(self) -> bool:
        """Whether the ghost cache needs all demands: during a trial, and in the WARM steps before it."""
        return self.mode is Mode.AUTO and self._left <= WARM

    def interrupt(self) -> None:
        """Restart the present window, because the last step is not comparable with others."""
        self._window.clear()

    def reject(self) -> None:
        """Turn speculation off without a trial, because its predictions are too often wrong."""
        if self.mode is Mode.AUTO and self.is_on:
            self._conclude(pays=False)

    def _turn(self) -> None:
        with_, without = self._windows[True], self._windows[False]
        windows = len(with_) + len(without)
        if len(with_) == len(without) and (pays := _verdict(with_, without)) is not None:
            self._conclude(pays)
        else:
            self.is_on = windows % 4 in (0, 3)

    def _conclude(self, pays: bool) -> None:
        self._held = min(2 * self._held, LONGEST) if pays is self._verdict else HOLD[pays]
        self._verdict, self._left, self.is_on = pays, self._held, pays
        self.trials += 1

    def _begin_trial(self) -> None:
        self._window.clear()
        self._windows = {True: [], False: []}
        self.is_on = True


def _typical(steps: list[Window]) -> Window:
    """Return the means over steps, without outliers, during which other processes ran.

    Means are used rather than medians, because speculation avoids waits that are long but rare.
    """
    limit = ODD * median(step.seconds for step in steps)
    return Window(*map(fmean, zip(*(step for step in steps if step.seconds <= limit), strict=True)))


def _verdict(with_: list[Window], without: list[Window]) -> bool | None:
    """Return whether speculation pays, from windows ``with_`` and ``without`` it; None while that is not clear."""
    pairs = len(with_)
    if pairs < CLEAR:
        return None
    gain, error = _intercept(
        [off.misses - on.misses for on, off in zip(with_, without, strict=True)],
        [off.seconds - on.seconds for on, off in zip(with_, without, strict=True)],
    )
    if gain + (SURE if pairs < FEWEST else UNSURE) * error < 0:
        return False
    if pairs >= MOST or (pairs >= FEWEST and gain - SURE * error > 0):
        return gain > 0
    return None


def _intercept(xs: list[float], ys: list[float]) -> tuple[float, float]:
    """Return the intercept of the least-squares line and its standard error. If all x are equal, use the mean of y."""
    count, x_mean, y_mean = len(xs), fmean(xs), fmean(ys)
    spread = math.fsum((x - x_mean) ** 2 for x in xs)
    slope = math.fsum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread if spread else 0.0
    found = y_mean - slope * x_mean
    rest = math.fsum((y - found - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    share = 1 / count + (x_mean**2 / spread if spread else 0.0)
    return found, math.sqrt(rest / (count - 1 - bool(spread)) * share)


class GhostCache:
    """Counts the misses that a tier with the same slots would have without speculation. It holds only keys."""

    def __init__(self, blocks: int, slots: int, policy: str = DEFAULT_POLICY) -> None:
        """Make a cache for ``blocks`` blocks with ``slots`` slots each, and the tier's ``policy``."""
        self.misses = 0
        self._slots = slots
        self._make_policy = POLICIES[policy]
        self._policies = [self._make_policy(slots) for _ in range(blocks)]
        self._resident: list[dict[int, ExpertKey]] = [{} for _ in range(blocks)]

    def demand(self, block: int, experts: Collection[int]) -> None:
        """Demand a block's experts. Those given first are evicted last. Ignore demands for more experts than slots."""
        resident, policy = self._resident[block], self._policies[block]
        if len(resident) != len(policy):  # an exception has interrupted the last demand
            resident = self._resident[block] = {}
            policy = self._policies[block] = self._make_policy(self._slots)
        if len(experts) > self._slots:
            return
        missing = [expert for expert in experts if expert not in resident]
        self.misses += len(missing)
        excess = len(resident) + len(missing) - self._slots
        if excess > 0:
            victims = (key.expert for key in policy.victims(scan=False) if key.expert not in experts)
            for expert in list(islice(victims, excess)):
                policy.remove(resident.pop(expert))
        for expert in missing:
            resident[expert] = ExpertKey(block, expert)
            policy.add(resident[expert], scan=False)
        for expert in reversed([*experts]):
            policy.touch(resident[expert], scan=False)
