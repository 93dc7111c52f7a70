"""Recall of predictions: the share of the experts used that a rule had predicted.

There are three rules: the gates, asked with hidden states of earlier layers; the most popular experts of each block;
the experts of the previous token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .trace import NO_EXPERT, Ints, Trace

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Recall:
    """Counts of experts for each block, [B], over all tokens with a prediction."""

    named: Counts  # experts that were predicted and used
    wanted: Counts  # experts that were used

    @property
    def ratio(self) -> float:
        """Recall over all blocks; nan if nothing was predicted."""
        return float(self.named.sum() / self.wanted.sum()) if self.wanted.any() else float("nan")

    def only(self, blocks: npt.NDArray[np.bool_]) -> Recall:
        """Return these counts with 0 for blocks that are not in the mask ``blocks`` [B].

        This makes a rule comparable with another one that does not predict all blocks.
        """
        return Recall(np.where(blocks, self.named, 0), np.where(blocks, self.wanted, 0))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Recall of each rule, on only those blocks that gates predicted ``lookahead`` layers earlier; None without any."""

    lookahead: int
    gates: float | None
    popularity: float | None
    previous_token: float | None

    def cells(self) -> list[str]:
        """Return the cells of a table row, in the order of ``RULES``."""
        return [
            "-" if ratio is None else f"{ratio:.3f}" for ratio in (self.gates, self.popularity, self.previous_token)
        ]


RULES = ("gates", "popularity", "previous token")


def compare(trace: Trace) -> list[Comparison]:
    """Compare the rules for each look-ahead of the trace, the smallest first."""
    if not trace.lookaheads:
        return []
    popularity, previous = of_popularity(trace), of_previous_token(trace)
    comparisons = []
    for lookahead in sorted(trace.lookaheads):
        gates = of_predictions(trace, lookahead)
        rules = (gates, *(other.only(gates.wanted > 0) for other in (popularity, previous)))
        comparisons.append(Comparison(lookahead, *(rule.ratio if rule.wanted.any() else None for rule in rules)))
    return comparisons


def of_predictions(trace: Trace, lookahead: int) -> Recall:
    """Return the recall of predictions that gates make ``lookahead`` layers ahead, one of ``trace.lookaheads``."""
    assert trace.predictions is not None, "a trace with predictions"
    return _recall(trace.experts, trace.predictions[trace.lookaheads.index(lookahead)])


def of_popularity(trace: Trace) -> Recall:
    """Return the recall of the best fixed prediction: each block's K most used experts, as known in hindsight."""
    predicted = np.full_like(trace.experts[:1], NO_EXPERT)  # [1, B, K]
    for block, count in enumerate(trace.num_experts):
        used = trace.experts[:, block]
        uses = np.bincount(used[used != NO_EXPERT], minlength=count)
        best = np.argsort(-uses, kind="stable")[: trace.top_k]
        predicted[0, block, : len(best)] = best
    return _recall(trace.experts, np.broadcast_to(predicted, trace.experts.shape))


def of_previous_token(trace: Trace) -> Recall:
    """Return the recall of the rule that predicts the experts of the previous token of the sequence."""
    predicted = np.full_like(trace.experts, NO_EXPERT)
    for tokens in trace.sequences:
        predicted[tokens.start + 1 : tokens.stop] = trace.experts[tokens.start : tokens.stop - 1]
    return _recall(trace.experts, predicted)


def _recall(experts: Ints, predicted: npt.NDArray[Any]) -> Recall:
    """Return the recall of P predicted experts, [T, B, P], for the K used ones, [T, B, K], of each token and block."""
    counted = (experts != NO_EXPERT) & (predicted != NO_EXPERT).any(-1, keepdims=True)
    named = np.zeros_like(counted)
    for choice in np.moveaxis(predicted, -1, 0):  # [T, B]
        named |= experts == choice[..., None]
    return Recall((named & counted).sum((0, 2)), counted.sum((0, 2)))
