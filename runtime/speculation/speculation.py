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
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from moetier.runtime.moe.gates import Observation
from moetier.tiers.cache.orders import DEFAULT_ORDER
from moetier.tiers.source import ExpertSource

from .admission import Admission
from .controller import Controller, Mode
from .predictor import Prediction, Ranking, Shortcuts
from .shadow import Shadow

MOST_ROWS = 8  # tokens of a step; what many tokens want is nearly everything, and a prefill is bound by computing
DUE = 32  # guesses that are judged later, at most
JUDGED = 128  # the latest guesses, by which it gives up ...
POOR = 0.1  # ... when no more of what they name is right


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """Of one model. ``right`` and ``guesses`` by layers ahead; 0 is the look at the entry of a block's own layer."""

    mode: str
    is_on: bool
    steps_on: int  # decoded tokens (of all sequences of a batch together one)
    steps_off: int
    guesses: tuple[int, ...]
    right: tuple[int, ...]
    seconds: float  # that the caller spent on asking, wishing and judging

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Asked(NamedTuple):
    """What a gate was asked. The answer is on the CPU once the demand path has waited for the device."""

    block: int
    distance: int
    hidden: Tensor  # that it was asked about
    ranking: Ranking


class _Guessed(NamedTuple):
    """A guess, until it is judged."""

    distance: int
    hidden: Tensor
    named: list[int]


class Speculation:
    """Of one model, from ``attach`` to ``detach``. ``source`` is what its blocks acquire from.

    Nothing depends on it but the time that a token takes: a wish changes no result.
    """

    def __init__(
        self,
        shortcuts: Shortcuts,
        source: ExpertSource[Any],
        *,
        slots: int,
        mode: Mode = Mode.AUTO,
        most: int | None = None,
        policy: str = DEFAULT_ORDER,
    ) -> None:
        """Guesses as many layers ahead as there are ``shortcuts``. ``slots`` are of a block, in the source, more or
        less, and ``policy`` says who is evicted; ``most`` experts of a block are promoted on a guess."""
        self._shortcuts: Shortcuts | None = shortcuts  # None: detached
        gates = shortcuts.gates
        look_ahead = shortcuts.look_ahead
        self._controller = Controller(mode)
        self._shadow = Shadow([slots] * len(gates.blocks), policy)
        self._missed = 0  # by it, before the present step
        experts = [gate.experts.num_experts for gate in gates.blocks]
        self._admission = Admission(source, experts, most=most)
        self._distances = range(1, look_ahead + 1)
        self._targets = {
            gate.block: [(d, target) for d in self._distances if (target := gates.ahead(gate.block, d)) is not None]
            for gate in gates.blocks
        }
        self._first = gates.first
        self._entered: Tensor | None = None  # what the present block was entered with, until the gates are asked
        self._pending: list[_Asked] = []  # of a device, not read yet
        self._guessed: dict[int, list[_Guessed]] = {}  # by block: not judged yet
        self._due: list[tuple[int, _Guessed, frozenset[int]]] = []  # to be judged: a block's, which has used these
        self._judged: deque[float] = deque(maxlen=JUDGED)
        self._is_poor = False  # too few of them were right
        self._began = 0.0  # the present step; 0: none that counts
        self._rows = 0  # tokens of the present step
        self._guessing = False  # in it
        self._guesses = [0] * (look_ahead + 1)
        self._right = [0] * (look_ahead + 1)
        self._seconds = 0.0
        self._clock: Observation | None = None  # of the first block: a step begins
        self._observation: Observation | None = None  # of the others, only while it guesses

    def attach(self) -> None:
        """To the model's forward passes."""
        shortcuts = self._shortcuts
        assert shortcuts is not None, "it was detached"
        if self._clock is None and self._first is not None and self._controller.mode is not Mode.OFF:
            self._clock = shortcuts.gates.observe(entry=self._at_first, blocks=[self._first])

    def detach(self) -> None:
        """For good: lets go of the model, its modules, and what was computed in it. Idempotent; waits for nobody, and
        may be called by any thread, also while another computes."""
        self._shortcuts = None
        clock, self._clock = self._clock, None
        if clock is not None:
            clock.remove()
        self._listen(False)
        self._guessing = False
        self._entered = None
        self._pending.clear()
        self._guessed.clear()
        self._settle()

    def demanded(self, block: int, experts: Collection[int], waiting: bool) -> None:
        """The demand of a block is made, of these experts; the caller is ``waiting`` for some of them. Judges what was
        guessed of it, and wishes for what is guessed of later blocks."""
        if self._controller.is_watching:
            self._shadow.demand(block, experts)
        if not self._guessing:
            return
        began = time.perf_counter()
        self._admission.demanded(block)
        self._ask(block)
        for target, distance, hidden, ranking in self._pending:
            self._wish(target, distance, hidden, ranking.prediction())
        self._pending.clear()
        for guessed in self._guessed.pop(block, ()):
            self._due.append((block, guessed, frozenset(experts)))
        if waiting or len(self._due) > DUE:  # while the caller waits for reads anyhow
            self._settle()
        self._seconds += time.perf_counter() - began

    def stats(self) -> SpeculationStats:
        """To be asked by the thread that decodes, between two steps."""
        self._settle()
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
        self._begin_step(_tokens(hidden))
        self._listen(self._guessing)
        self._at_entry(block, hidden)

    def _listen(self, on: bool) -> None:
        """To all blocks but the first, which is always listened to while it is attached."""
        shortcuts = self._shortcuts
        if on and self._observation is None and shortcuts is not None:
            layer = self._at_layer if len(self._distances) > 1 else None
            others = [gate.block for gate in shortcuts.gates.blocks if gate.block != self._first]
            self._observation = shortcuts.gates.observe(entry=self._at_entry, layer=layer, blocks=others)
        is_over = not on or self._shortcuts is None  # detached meanwhile, perhaps
        if is_over and (observation := self._observation) is not None:
            observation.remove()
            self._observation = None

    def _at_entry(self, block: int, hidden: Tensor) -> None:
        is_of_step = self._guessing and _tokens(hidden) == self._rows  # and not of another tower, or another thread
        self._entered = hidden if is_of_step else None
        if hidden.device.type != "cpu":
            began = time.perf_counter()
            self._ask(block)
            self._seconds += time.perf_counter() - began

    def _ask(self, block: int) -> None:
        """About the blocks ahead of this one, with what it was entered with."""
        if (hidden := self._entered) is None:
            return
        self._entered = None
        for distance, target in self._targets[block]:
            self._guess(target, distance, hidden)

    def _at_layer(self, block: int, hidden: Tensor) -> None:
        """Only where nothing has to be waited for."""
        if self._guessing and hidden.device.type == "cpu" and self._admission.is_requested(block):
            began = time.perf_counter()
            self._guess(block, 0, hidden)
            self._seconds += time.perf_counter() - began

    def _begin_step(self, rows: int) -> None:
        now = time.perf_counter()
        if self._began and rows == self._rows:
            self._controller.step(now - self._began, self._shadow.misses - self._missed)
        else:
            self._controller.interrupt()
        if self._is_poor:
            self._is_poor = False
            self._controller.give_up()
        counts = 0 < rows <= MOST_ROWS
        self._began = now if counts else 0.0
        self._missed = self._shadow.misses
        self._rows = rows
        self._guessing = counts and self._controller.is_on
        self._pending.clear()
        self._guessed.clear()
        if not self._guessing:
            self._admission.reset()

    # -- guesses ------------------------------------------------------------------------------------------------------

    def _guess(self, target: int, distance: int, hidden: Tensor) -> None:
        if (shortcuts := self._shortcuts) is None:
            return
        if hidden.device.type == "cpu":
            self._wish(target, distance, hidden, shortcuts.predict(target, distance, hidden))
        else:  # does not wait for the device: read when the demand path has
            ranking = shortcuts.rank(target, distance, hidden)
            self._pending.append(_Asked(target, distance, hidden, ranking.on_cpu()))

    def _wish(self, block: int, distance: int, hidden: Tensor, prediction: Prediction) -> None:
        if named := self._admission.admit(block, prediction):
            self._guessed.setdefault(block, []).append(_Guessed(distance, hidden, named))

    def _settle(self) -> None:
        due, self._due = self._due, []
        for block, guessed, experts in due:
            self._judge(block, guessed, experts)

    def _judge(self, block: int, guessed: _Guessed, experts: frozenset[int]) -> None:
        distance, hidden, named = guessed
        names = {*named}
        right = sum(expert in experts for expert in named)
        self._guesses[distance] += len(named)
        self._right[distance] += right
        self._judged.append(right / len(named))
        if hidden.numel() == hidden.shape[-1] and (shortcuts := self._shortcuts) is not None:
            shortcuts.learn(block, distance, hidden, missed={*experts - names}, in_vain=names - experts)
        if len(self._judged) == JUDGED and sum(self._judged) < POOR * JUDGED:
            self._judged.clear()
            self._is_poor = True


def _tokens(hidden: Tensor) -> int:
    return hidden.shape[: min(hidden.ndim - 1, 2)].numel()  # [T, H], [B, T, H] or [B, T, S, H]
