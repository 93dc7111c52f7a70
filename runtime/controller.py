"""Whether speculation pays on the running workload: measured both ways, in turns. Pure; steps are decoded tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from statistics import fmean, median, stdev

SPAN = 4  # steps of a window
FEWEST, MOST = 8, 24  # pairs of windows, one with and one without, in a trial
HOLD = 256  # steps that a verdict holds
LONGEST = {True: 1024, False: 4096}  # when it is the same again and again
SURE, UNSURE = 2.5, 1.0  # standard errors: to be for it, and against it; a trial of what loses had better be short
ODD = 4.0  # times a window's median: no step


class Mode(Enum):
    OFF = "off"
    AUTO = "auto"
    ALWAYS = "always"


@dataclass(slots=True)
class Controller:
    """``is_on`` says how the next step is to be done; ``step`` tells how long it took.

    A *trial* alternates windows with and without, in the order on, off, off, on, so that what drifts weighs on both. It
    ends as soon as the ratio of their times is clear, or goes to whoever is ahead at its end. The verdict holds for a
    while, and twice as long as the last when it is the same.
    """

    mode: Mode
    span: int = SPAN
    hold: int = HOLD
    is_on: bool = field(init=False)
    trials: int = field(init=False, default=0)
    steps_on: int = field(init=False, default=0)
    steps_off: int = field(init=False, default=0)
    _window: list[float] = field(init=False, default_factory=list)
    _times: dict[bool, list[float]] = field(init=False, default_factory=lambda: {True: [], False: []})
    _left: int = field(init=False, default=0)  # steps that the verdict still holds; 0: a trial is under way
    _held: int = field(init=False, default=0)  # how long the last verdict was to hold
    _verdict: bool | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.is_on = self.mode is not Mode.OFF

    def step(self, seconds: float) -> None:
        """One step has been done as ``is_on`` says."""
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
        self._window.append(seconds)
        if len(self._window) == self.span:
            self._times[self.is_on].append(_typical(self._window))
            self._window.clear()
            self._turn()

    def interrupt(self) -> None:
        """Something else came between the steps: the window that has begun is measured anew."""
        self._window.clear()

    def give_up(self) -> None:
        """The guesses are wrong: no need to measure what they gain."""
        if self.mode is Mode.AUTO and self.is_on:
            self._conclude(pays=False)

    def _turn(self) -> None:
        with_, without = self._times[True], self._times[False]
        windows = len(with_) + len(without)
        if len(with_) == len(without) and (pays := _verdict(with_, without)) is not None:
            self._conclude(pays)
        else:
            self.is_on = windows % 4 in (0, 3)

    def _conclude(self, pays: bool) -> None:
        self._held = min(2 * self._held, LONGEST[pays]) if pays is self._verdict else self.hold
        self._verdict, self._left, self.is_on = pays, self._held, pays
        self.trials += 1

    def _begin_trial(self) -> None:
        self._window.clear()
        self._times = {True: [], False: []}
        self.is_on = True


def _typical(window: list[float]) -> float:
    """The mean, as it is the rare long waits that guesses avoid; but not of steps between which something else came."""
    limit = ODD * median(window)
    return fmean(seconds for seconds in window if seconds <= limit)


def _verdict(with_: list[float], without: list[float]) -> bool | None:
    """Whether it pays; None: not clear yet."""
    pairs = len(with_)
    if pairs < FEWEST:
        return None
    gains = [math.log(off / on) for on, off in zip(with_, without, strict=True)]
    mean, error = fmean(gains), stdev(gains) / math.sqrt(pairs)
    if mean - SURE * error > 0:
        return True
    if mean + UNSURE * error < 0:
        return False
    return mean > 0 if pairs >= MOST else None
