"""Admission: which guesses become wishes. Those that are likely right."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from moetier.tiers.layout import ExpertKey
from moetier.tiers.source import ExpertSource

from .confidence import Confidence
from .predictor import Leads

LEAST = 0.5  # how likely a guess has to be


class Named(NamedTuple):
    """An expert that a guess names."""

    expert: int
    lead: float
    was_absent: bool


class Prefetch:
    """Of one model's guesses, from ``source``. A wish is made only where something is lacking that is worth a read. It
    names what is there already, too, and what comes next after what is guessed: that keeps it there."""

    def __init__(
        self,
        source: ExpertSource[Any],
        experts: Sequence[int],
        *,
        look_ahead: int,
        most: int | None = None,
    ) -> None:
        """``experts`` of each block, of which ``most`` are promoted; guesses are of 0 to ``look_ahead`` layers."""
        self._source = source
        self._most = most
        self._keys = [[ExpertKey(block, expert) for expert in range(count)] for block, count in enumerate(experts)]
        self._confidence = Confidence(look_ahead)
        self._wished: set[int] = set()  # blocks, until their demand

    def wish(self, block: int, distance: int, leads: Leads) -> list[Named]:
        """For what a guess names and is worth it. What it names, by which it can be judged."""
        keys = self._keys[block]
        named = [(expert, lead) for expert, lead in leads.named if expert < len(keys)]  # more are no records
        near = [expert for expert in leads.near if expert < len(keys)]
        absent = self._absent(block, (expert for expert, _ in named))
        doubt: dict[int, float] = {}  # of what is absent: that no token wants it
        for expert, lead in named:
            if expert in absent:
                doubt[expert] = doubt.get(expert, 1.0) * (1.0 - self._confidence.of(distance, lead))
        wanted = self._worthy(block, doubt) if doubt else []
        if wanted or block in self._wished:
            gone = absent | self._absent(block, near)
            resident = [keys[expert] for expert in {*near, *(expert for expert, _ in named)} - gone]
            self._source.prefetch(block, [*resident, *wanted])
            self._wished.add(block)
        return [Named(expert, lead, expert in absent) for expert, lead in named]

    def _absent(self, block: int, experts: Iterable[int]) -> set[int]:
        keys = self._keys[block]
        return {key.expert for key in self._source.absent([keys[expert] for expert in experts])}

    def _worthy(self, block: int, doubt: dict[int, float]) -> list[ExpertKey]:
        """The likeliest first."""
        likeliest = sorted(doubt, key=doubt.__getitem__)[: self._most]
        return [self._keys[block][expert] for expert in likeliest if 1.0 - doubt[expert] > LEAST]

    def is_wished(self, block: int) -> bool:
        """Since its last demand."""
        return block in self._wished

    def demanded(self, block: int) -> None:
        self._wished.discard(block)

    def forget(self) -> None:
        """All that is wished: its blocks' demands may not come."""
        self._wished.clear()

    def judge(self, distance: int, named: Sequence[Named], experts: Collection[int]) -> None:
        """How clear the gate was says most of what is resident, which is used again and again; what matters is how
        often a guess is right of what is not."""
        for expert, lead, was_absent in named:
            if was_absent:
                self._confidence.learn(distance, lead, right=expert in experts)
