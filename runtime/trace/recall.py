"""How many of the experts that tokens are sent to were named before: by gates asked ahead, or by simpler guesses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .trace import NONE, Ints, Trace

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Recall:
    """By block. A block for whose tokens there was no guess at all wanted nothing here."""

    named: Counts  # [B]
    wanted: Counts  # [B], experts of those tokens for which there was a guess

    @property
    def ratio(self) -> float:
        """Over all blocks; nan where nothing was guessed."""
        return float(self.named.sum() / self.wanted.sum()) if self.wanted.any() else float("nan")

    @property
    def by_block(self) -> npt.NDArray[np.float64]:
        """[B]; nan likewise."""
        found = np.full(len(self.wanted), np.nan)
        np.divide(self.named, self.wanted, out=found, where=self.wanted > 0)
        return found

    def only(self, blocks: npt.NDArray[np.bool_]) -> Recall:
        """Of those blocks: to compare a guess with one that is not made for every block."""
        return Recall(np.where(blocks, self.named, 0), np.where(blocks, self.wanted, 0))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Recall of each way to guess, over the blocks that gates asked that far ahead foretell; None where it guessed
    nothing."""

    lookahead: int
    gates: float | None
    popularity: float | None
    previous_token: float | None

    def cells(self) -> list[str]:
        """For people, under ``GUESSES``."""
        return [
            "-" if ratio is None else f"{ratio:.3f}" for ratio in (self.gates, self.popularity, self.previous_token)
        ]


GUESSES = ("gates", "popularity", "previous token")


def compare(trace: Trace) -> list[Comparison]:
    """By look-ahead, the nearest first; none where the trace has no predictions."""
    if not trace.lookaheads:
        return []
    popularity, previous = of_popularity(trace), of_previous_token(trace)
    found = []
    for lookahead in sorted(trace.lookaheads):
        gates = of_predictions(trace, lookahead)
        guesses = (gates, *(other.only(gates.wanted > 0) for other in (popularity, previous)))
        found.append(Comparison(lookahead, *(guess.ratio if guess.wanted.any() else None for guess in guesses)))
    return found


def of_predictions(trace: Trace, lookahead: int) -> Recall:
    """Of the gates, asked that far ahead: ``lookahead`` is one of ``trace.lookaheads``."""
    assert trace.predictions is not None, "a trace with predictions"
    return _recall(trace.experts, trace.predictions[trace.lookaheads.index(lookahead)])


def of_popularity(trace: Trace) -> Recall:
    """Of each block's most used experts, as many as top-k: in hindsight, the best guess that is one for all tokens."""
    guesses = np.full_like(trace.experts[:1], NONE)  # [1, B, K]
    for block, count in enumerate(trace.num_experts):
        used = trace.experts[:, block]
        uses = np.bincount(used[used != NONE], minlength=count)
        best = np.argsort(-uses, kind="stable")[: trace.top_k]
        guesses[0, block, : len(best)] = best
    return _recall(trace.experts, np.broadcast_to(guesses, trace.experts.shape))


def of_previous_token(trace: Trace) -> Recall:
    """Of the experts that the token before in the same sequence was sent to."""
    guesses = np.full_like(trace.experts, NONE)
    for tokens in trace.sequences:
        guesses[tokens.start + 1 : tokens.stop] = trace.experts[tokens.start : tokens.stop - 1]
    return _recall(trace.experts, guesses)


def _recall(experts: Ints, guesses: npt.NDArray[Any]) -> Recall:
    """experts [T, B, K]; guesses [T, B, P]."""
    counted = (experts != NONE) & (guesses != NONE).any(-1, keepdims=True)
    named = np.zeros_like(counted)
    for guess in np.moveaxis(guesses, -1, 0):  # [T, B]
        named |= experts == guess[..., None]
    return Recall((named & counted).sum((0, 2)), counted.sum((0, 2)))
