"""Speculative gating: the next blocks' gates, asked with the present hidden state, say what to promote beforehand.

Eliseev & Mazur 2023 (arXiv 2312.17238), section 3.2. At the entry of the MoE part of a block the blocks of the next
layers are predicted; on a CPU, where asking takes the caller's time, a little later: once the block's own reads are
under way. With more than one layer ahead a block is predicted once more at the entry of its own layer, with what the
layers before it have added. What is predicted of other layers becomes a wish once the block's own demand is made: no
wish comes before it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from moetier.tiers.keys import ExpertKey
from moetier.tiers.source import ExpertSource

from .confidence import Confidence
from .config import LOOK_AHEAD
from .controller import Controller, Mode
from .gates import Gates, Observation
from .shortcut import Guess, Shortcuts

MOST_ROWS = 8  # tokens of a step; what many tokens want is nearly everything, and a prefill is bound by computing
LEAST = 0.65  # a guess of an absent expert that is less likely right is no wish
JUDGED = 256  # the latest guesses, by which it gives up ...
POOR = 0.1  # ... when so few are right


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """Of one model. ``right`` and ``guesses`` by layers ahead; 0 is the look at the entry of a block's own layer."""

    mode: str
    is_on: bool
    steps_on: int  # decoded tokens (of all sequences of a batch together one)
    steps_off: int
    guesses: tuple[int, ...]
    right: tuple[int, ...]
    seconds: float  # that asking took

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Asked(NamedTuple):
    """What a gate was asked; tensors that are on the CPU once the demand path has waited for the device."""

    block: int
    distance: int
    hidden: Tensor  # that it was asked about
    guess: Guess

    def named(self) -> Iterator[tuple[int, float]]:
        """Experts, and their leads."""
        for experts, values, unit in zip(*(tensor.tolist() for tensor in self.guess), strict=True):
            for expert, value in zip(experts, values[:-1], strict=True):
                yield expert, (value - values[-1]) / unit if unit else 0.0


class _Named(NamedTuple):
    """An expert that a guess names."""

    expert: int
    lead: float
    was_absent: bool


class _Guessed(NamedTuple):
    """A guess, until it is judged."""

    distance: int
    hidden: Tensor
    named: list[_Named]


class Speculation:
    """Of one model, from ``attach`` to ``detach``. ``source`` is what its blocks acquire from.

    Nothing depends on it but the time that a token takes: a wish changes no result.
    """

    def __init__(
        self, gates: Gates, source: ExpertSource[Any], *, mode: Mode = Mode.AUTO, look_ahead: int = LOOK_AHEAD
    ) -> None:
        assert look_ahead >= 1
        self._shortcuts = Shortcuts(gates, range(0 if look_ahead > 1 else 1, look_ahead + 1))
        self._gates = gates
        self._source = source
        self._controller = Controller(mode)
        self._confidence = Confidence(look_ahead)
        self._distances = range(1, look_ahead + 1)
        self._targets = {
            gate.block: [(d, target) for d in self._distances if (target := gates.ahead(gate.block, d)) is not None]
            for gate in gates.blocks
        }
        self._first = next((gate.block for gate in gates.blocks if self._targets[gate.block]), None)
        self._entered: Tensor | None = None  # what the present block was entered with, until the gates are asked
        self._pending: list[_Asked] = []  # not read yet
        self._wished: set[int] = set()  # blocks, until their demand
        self._guessed: dict[int, list[_Guessed]] = {}  # by block: not judged yet
        self._judged: deque[bool] = deque(maxlen=JUDGED)
        self._began = 0.0  # the present step; 0: none that counts
        self._rows = 0  # tokens of the present step
        self._guessing = False  # in it
        self._guesses = [0] * (look_ahead + 1)
        self._right = [0] * (look_ahead + 1)
        self._seconds = 0.0
        self._clock: Observation | None = None  # of the first block: a step begins
        self._observation: Observation | None = None  # of the others, only while it guesses

    @property
    def can_guess(self) -> bool:
        """Whether there is a block whose successor can be asked ahead."""
        return self._first is not None

    def attach(self) -> None:
        """To the model's forward passes."""
        if self._clock is None and self._first is not None and self._controller.mode is not Mode.OFF:
            self._clock = self._gates.observe(entry=self._at_first, blocks=[self._first])

    def detach(self) -> None:
        self._listen(False)
        if self._clock is not None:
            self._clock.remove()
            self._clock = None

    def demanded(self, block: int, experts: Collection[int]) -> None:
        """The demand of a block is made: of these experts. Judges what was guessed of it, and wishes for what was
        guessed of later blocks."""
        for guessed in self._guessed.pop(block, ()):
            self._judge(block, guessed, experts)
        self._wished.discard(block)
        self._ask(block)
        if self._pending:
            self._wish()

    def stats(self) -> SpeculationStats:
        control = self._controller
        return SpeculationStats(
            mode=control.mode.value,
            is_on=control.is_on,
            steps_on=control.steps_on,
            steps_off=control.steps_off,
            guesses=tuple(self._guesses),
            right=tuple(self._right),
            seconds=self._seconds,
        )

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _at_first(self, block: int, hidden: Tensor) -> None:
        self._begin_step(hidden.shape[: min(hidden.ndim - 1, 2)].numel())  # [T, H], [B, T, H] or [B, T, S, H]
        self._listen(self._guessing)
        self._at_entry(block, hidden)

    def _listen(self, on: bool) -> None:
        """To all blocks but the first, which is always listened to while it is attached."""
        if on and self._observation is None:
            layer = self._at_layer if len(self._distances) > 1 else None
            others = [gate.block for gate in self._gates.blocks if gate.block != self._first]
            self._observation = self._gates.observe(entry=self._at_entry, layer=layer, blocks=others)
        elif not on and self._observation is not None:
            self._observation.remove()
            self._observation = None

    def _at_entry(self, block: int, hidden: Tensor) -> None:
        self._entered = hidden if self._guessing else None
        if hidden.device.type != "cpu":
            self._ask(block)

    def _ask(self, block: int) -> None:
        """About the blocks ahead of this one, with what it was entered with."""
        if (hidden := self._entered) is not None:
            self._entered = None
            began = time.perf_counter()
            for distance, target in self._targets[block]:
                self._guess(target, distance, hidden)
            self._seconds += time.perf_counter() - began

    def _at_layer(self, block: int, hidden: Tensor) -> None:
        """Only where nothing has to be waited for."""
        if self._guessing and block in self._wished and hidden.device.type == "cpu":
            began = time.perf_counter()
            self._guess(block, 0, hidden)
            self._seconds += time.perf_counter() - began
            self._wish()

    def _begin_step(self, rows: int) -> None:
        now = time.perf_counter()
        if self._began and rows == self._rows:
            self._controller.step(now - self._began)
        else:
            self._controller.interrupt()
        counts = 0 < rows <= MOST_ROWS
        self._began = now if counts else 0.0
        self._rows = rows
        self._guessing = counts and self._controller.is_on
        self._pending.clear()
        self._guessed.clear()
        if not self._guessing:
            self._wished.clear()

    # -- guesses ------------------------------------------------------------------------------------------------------

    def _guess(self, target: int, distance: int, hidden: Tensor) -> None:
        guess = self._shortcuts.guess(target, distance, hidden)
        if hidden.device.type != "cpu":  # does not wait for the device: read when the demand path has
            guess = Guess(*(tensor.to("cpu", non_blocking=True) for tensor in guess))
        self._pending.append(_Asked(target, distance, hidden, guess))

    def _wish(self) -> None:
        """For what is likely to be needed, where some of it is absent. What is there already is wished for too: that
        keeps it there."""
        for asked in self._pending:
            block, distance = asked.block, asked.distance
            named = [(ExpertKey(block, expert), lead) for expert, lead in asked.named()]
            absent = set(self._source.absent([key for key, _ in named]))
            doubt: dict[ExpertKey, float] = {}  # that no token wants it
            noted: list[_Named] = []
            self._guessed.setdefault(block, []).append(_Guessed(distance, asked.hidden, noted))
            is_lacking = False
            for key, lead in named:
                is_absent = key in absent
                noted.append(_Named(key.expert, lead, is_absent))
                sure = self._confidence.of(distance, lead) if is_absent else 1.0
                doubt[key] = doubt.get(key, 1.0) * (1.0 - sure)
                is_lacking = is_lacking or (is_absent and doubt[key] <= 1.0 - LEAST)
            if is_lacking or block in self._wished:
                wanted = [key for key in doubt if doubt[key] <= 1.0 - LEAST]
                self._source.prefetch(block, sorted(wanted, key=doubt.__getitem__))
                self._wished.add(block)
        self._pending.clear()

    def _judge(self, block: int, guessed: _Guessed, experts: Collection[int]) -> None:
        """How clear the gate was says most of what is resident, which is used again and again; what matters is how
        often a guess is right of what is not."""
        distance, hidden, named = guessed
        for expert, lead, was_absent in named:
            right = expert in experts
            self._guesses[distance] += 1
            self._right[distance] += right
            self._judged.append(right)
            if was_absent:
                self._confidence.learn(distance, lead, right=right)
        if self._rows == 1:
            names = {expert for expert, _, _ in named}
            self._shortcuts.learn(block, distance, hidden, missed={*experts} - names, in_vain=names - {*experts})
        if len(self._judged) == JUDGED and sum(self._judged) < POOR * JUDGED:
            self._judged.clear()
            self._controller.give_up()
