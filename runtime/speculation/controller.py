"""Decide whether speculation pays for the present workload, by decoding alternately with and without it.

The module does no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean, median

from moetier.runtime.config import SpeculationMode

SPAN = 4  # number of steps in a window
PAIRS = 24  # number of pairs of windows in a trial
HOLD = 1024  # number of steps for which a new verdict holds
LONGEST = 4096  # most steps for which a verdict holds; each confirmation makes them more
ODD = 4.0  # a step is left out if it takes longer than this multiple of its window's median


@dataclass(slots=True)
class Controller:
    """Turn speculation on and off. ``is_on`` says whether the next step speculates; ``step`` takes its duration.

    A step decodes one token. A *trial* alternates windows of steps with and without speculation, in the order on, off,
    off, on, so that a drift affects both equally. The trial's verdict is for the windows with the smaller mean time. A
    verdict holds for a number of steps, which doubles each time that the next trial has the same verdict.
    """

    mode: SpeculationMode
    is_on: bool = field(init=False)
    trials: int = field(init=False, default=0)  # number of trials that have ended
    steps_on: int = field(init=False, default=0)  # number of steps with speculation
    steps_off: int = field(init=False, default=0)  # number of steps without speculation
    _window: list[float] = field(init=False, default_factory=list)  # durations of the present window's steps in seconds
    _means: dict[bool, list[float]] = field(init=False)  # mean step of each window, with and without speculation
    _left: int = field(init=False, default=0)  # steps for which the verdict still holds; 0 during a trial
    _held: int = field(init=False, default=0)  # number of steps for which the latest verdict holds in all
    _verdict: bool | None = field(init=False, default=None)  # whether speculation pays; None before the first verdict

    def __post_init__(self) -> None:
        self._begin_trial()
        self.is_on = self.mode is not SpeculationMode.OFF

    def step(self, seconds: float) -> None:
        """Take the duration of the last step, which was done with or without speculation as ``is_on`` said."""
        if self.is_on:
            self.steps_on += 1
        else:
            self.steps_off += 1
        if self.mode is not SpeculationMode.AUTO:
            return
        if self._left:
            self._left -= 1
            if not self._left:
                self._begin_trial()
            return
        self._window.append(seconds)
        if len(self._window) >= SPAN:  # more, if an exception interrupted the end of the last window
            self._end_window()

    def interrupt(self) -> None:
        """Restart the present window, because the last step can't be compared with others."""
        self._window.clear()

    def reject(self) -> None:
        """Turn speculation off without a trial, because its predictions are too often wrong."""
        if self.mode is SpeculationMode.AUTO and self.is_on:
            self._conclude(pays=False)

    def _end_window(self) -> None:
        with_, without = self._means[True], self._means[False]
        self._means[self.is_on].append(_typical(self._window))
        self._window.clear()
        windows = len(with_) + len(without)
        if windows >= 2 * PAIRS:
            self._conclude(pays=fmean(with_) < fmean(without))
        else:
            self.is_on = windows % 4 in (0, 3)

    def _conclude(self, pays: bool) -> None:
        self._held = min(2 * self._held, LONGEST) if pays is self._verdict else HOLD
        self._verdict, self._left, self.is_on = pays, self._held, pays
        self.trials += 1

    def _begin_trial(self) -> None:
        self._window.clear()
        self._means = {True: [], False: []}
        self.is_on = True


def _typical(steps: list[float]) -> float:
    """Return the mean duration of steps, leaving out those that other processes have probably delayed.

    A mean is used rather than a median, because speculation avoids waits that are long but rare.
    """
    limit = ODD * median(steps)
    return fmean(seconds for seconds in steps if seconds <= limit)
