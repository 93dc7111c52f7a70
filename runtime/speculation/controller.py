"""Whether speculation pays on the running workload: measured both ways, in turns. Pure; steps are decoded tokens.

How long a step takes depends most of all on how many experts it lacks. That is chance, and would hide what speculation
gains or costs for hundreds of steps. So a trial fits a line through its pairs: the difference of their times against
the difference of what they lacked. Where nothing differs, the line says what speculation gains: analysis of covariance
(Fisher 1932).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from statistics import fmean, median
from typing import NamedTuple

SPAN = 4  # steps of a window
FEWEST, MOST = 8, 24  # pairs of windows, one with and one without, in a trial
CLEAR = 4  # pairs, if guessing loses by as many standard errors as it takes to be for it
HOLD = {True: 1024, False: 256}  # steps that a verdict holds at first: what guesses gain grows as they learn
LONGEST = 4096  # when it is the same again and again
WARM = 64  # steps before a trial, from which on it is to be known what steps lack
SURE, UNSURE = 2.5, 1.0  # standard errors: to be for it, and against it; a trial of what loses had better be short
ODD = 4.0  # times a window's median: no step


class Window(NamedTuple):
    """Means over a few steps."""

    seconds: float
    misses: float  # that the steps have without speculation


class Mode(Enum):
    OFF = "off"
    AUTO = "auto"
    ALWAYS = "always"


@dataclass(slots=True)
class Controller:
    """``is_on`` says how the next step is to be done; ``step`` tells how long it took.

    A *trial* alternates windows with and without, in the order on, off, off, on, so that what drifts weighs on both. It
    ends as soon as it is clear who is faster, or goes to whoever is ahead at its end. The verdict holds for a
    while, and twice as long as the last when it is the same.
    """

    mode: Mode
    span: int = SPAN
    is_on: bool = field(init=False)
    trials: int = field(init=False, default=0)
    steps_on: int = field(init=False, default=0)
    steps_off: int = field(init=False, default=0)
    _window: list[Window] = field(init=False, default_factory=list)  # of single steps
    _windows: dict[bool, list[Window]] = field(init=False, default_factory=lambda: {True: [], False: []})
    _left: int = field(init=False, default=0)  # steps that the verdict still holds; 0: a trial is under way
    _held: int = field(init=False, default=0)  # how long the last verdict was to hold
    _verdict: bool | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.is_on = self.mode is not Mode.OFF

    def step(self, seconds: float, misses: float = 0.0) -> None:
        """One step has been done as ``is_on`` says, which by itself lacks so many experts."""
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
        """Whether it is to be known what steps lack: in a trial, and for some steps before."""
        return self.mode is Mode.AUTO and self._left <= WARM

    def interrupt(self) -> None:
        """Something else came between the steps: the window that has begun is measured anew."""
        self._window.clear()

    def give_up(self) -> None:
        """The guesses are wrong: no need to measure what they gain."""
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
    """The mean, as it is the rare long waits that guesses avoid; but not of steps between which something else came."""
    limit = ODD * median(step.seconds for step in steps)
    return Window(*map(fmean, zip(*(step for step in steps if step.seconds <= limit), strict=True)))


def _verdict(with_: list[Window], without: list[Window]) -> bool | None:
    """Whether it pays; None: not clear yet."""
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
    """Of the line of least squares, and its standard error; where all x are 0, the mean of y."""
    count, x_mean, y_mean = len(xs), fmean(xs), fmean(ys)
    spread = math.fsum((x - x_mean) ** 2 for x in xs)
    slope = math.fsum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread if spread else 0.0
    found = y_mean - slope * x_mean
    rest = math.fsum((y - found - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    share = 1 / count + (x_mean**2 / spread if spread else 0.0)
    return found, math.sqrt(rest / (count - 1 - bool(spread)) * share)
