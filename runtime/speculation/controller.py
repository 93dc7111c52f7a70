"""Decide whether speculation pays for the running workload, by decoding with and without it in turns.

How long a step takes depends mostly on how many experts it misses. That varies by chance, and would hide what
speculation gains or costs for hundreds of steps. A ghost cache counts these misses as if there were no speculation. A
trial then fits a line through its pairs of windows: the difference of their times against the difference of their
misses. Where the misses are equal, the line gives what speculation gains: analysis of covariance (Fisher 1932).

This module does no I/O. A step is one decoded token.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from statistics import fmean, median
from typing import NamedTuple

from moetier.tiers.cache.orders import DEFAULT_ORDER, ORDERS
from moetier.tiers.layout import ExpertKey

SPAN = 4  # steps of a window
FEWEST, MOST = 8, 24  # pairs of windows (one with speculation, one without) in a trial
CLEAR = 4  # pairs after which a trial may end early, when speculation clearly loses
HOLD = {True: 1024, False: 256}  # steps for which a first verdict holds; predictions improve while they learn
LONGEST = 4096  # steps for which a verdict holds that was confirmed again and again
WARM = 64  # steps before a trial in which the ghost cache fills
SURE, UNSURE = 2.5, 1.0  # standard errors for a verdict for, and against; a losing trial had better be short
ODD = 4.0  # multiple of a window's median beyond which a step is left out


class Window(NamedTuple):
    """Means over a few steps, or one step."""

    seconds: float
    misses: float  # in the ghost cache


class Mode(Enum):
    """Whether to speculate: ``auto`` where it pays."""

    OFF = "off"
    AUTO = "auto"
    ALWAYS = "always"


@dataclass(slots=True)
class Controller:
    """Turn speculation on and off: ``is_on`` applies to the next step, and ``step`` reports how long it took.

    A *trial* alternates windows with and without speculation, in the order on, off, off, on, so that a drift affects
    both alike. It ends as soon as the faster way is clear, or after MOST pairs. Its verdict holds for a number of
    steps, which doubles each time that the verdict is the same.
    """

    mode: Mode
    span: int = SPAN
    is_on: bool = field(init=False)
    trials: int = field(init=False, default=0)
    steps_on: int = field(init=False, default=0)
    steps_off: int = field(init=False, default=0)
    _window: list[Window] = field(init=False, default_factory=list)  # single steps of the present window
    _windows: dict[bool, list[Window]] = field(init=False, default_factory=lambda: {True: [], False: []})
    _left: int = field(init=False, default=0)  # steps for which the verdict still holds; 0 during a trial
    _held: int = field(init=False, default=0)  # steps for which the last verdict was to hold
    _verdict: bool | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.is_on = self.mode is not Mode.OFF

    def step(self, seconds: float, misses: float = 0.0) -> None:
        """Report a step, done as ``is_on`` said, with its ``misses`` in the ghost cache."""
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
        if len(self._window) >= self.span:  # more: the end of the last was cut
            self._windows[self.is_on].append(_typical(self._window))
            self._window.clear()
            self._turn()

    @property
    def is_watching(self) -> bool:
        """Whether the ghost cache has to be fed: during a trial, and WARM steps before."""
        return self.mode is Mode.AUTO and self._left <= WARM

    def interrupt(self) -> None:
        """Restart the present window: the last step is not comparable."""
        self._window.clear()

    def reject(self) -> None:
        """Turn speculation off without a trial: its predictions are wrong."""
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
    """Return the mean, because speculation avoids rare long waits; without outliers, in which another task ran."""
    limit = ODD * median(step.seconds for step in steps)
    return Window(*map(fmean, zip(*(step for step in steps if step.seconds <= limit), strict=True)))


def _verdict(with_: list[Window], without: list[Window]) -> bool | None:
    """Return whether speculation pays; None while that is not clear."""
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
    """Return the intercept of the least-squares line and its standard error; the mean of y where all x are equal."""
    count, x_mean, y_mean = len(xs), fmean(xs), fmean(ys)
    spread = math.fsum((x - x_mean) ** 2 for x in xs)
    slope = math.fsum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread if spread else 0.0
    found = y_mean - slope * x_mean
    rest = math.fsum((y - found - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    share = 1 / count + (x_mean**2 / spread if spread else 0.0)
    return found, math.sqrt(rest / (count - 1 - bool(spread)) * share)


class GhostCache:
    """Count the misses that a tier of as many slots would have without speculation. It holds keys and no records."""

    def __init__(self, blocks: int, slots: int, policy: str = DEFAULT_ORDER) -> None:
        """``slots``: number of slots of each block. ``policy``: the tier's, one of ``ORDERS``."""
        self.misses = 0
        self._slots = slots
        self._policy = ORDERS[policy]
        self._orders = [self._policy(slots) for _ in range(blocks)]
        self._resident: list[dict[int, ExpertKey]] = [{} for _ in range(blocks)]

    def demand(self, block: int, experts: Collection[int]) -> None:
        """Demand a block's experts, of which the first are evicted last. Ignore a scan, which exceeds the slots."""
        resident, order = self._resident[block], self._orders[block]
        if len(resident) != len(order):  # an asynchronous exception interrupted the last demand
            resident = self._resident[block] = {}
            order = self._orders[block] = self._policy(self._slots)
        if len(experts) > self._slots:
            return
        missing = [expert for expert in experts if expert not in resident]
        self.misses += len(missing)
        excess = len(resident) + len(missing) - self._slots
        if excess > 0:
            victims = (key.expert for key in order.victims(scan=False) if key.expert not in experts)
            for expert in list(islice(victims, excess)):
                order.remove(resident.pop(expert))
        for expert in missing:
            resident[expert] = ExpertKey(block, expert)
            order.add(resident[expert], scan=False)
        for expert in reversed([*experts]):
            order.touch(resident[expert], scan=False)
