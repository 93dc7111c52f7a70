"""Shortcuts: approximations of gates that take few operations.

Most gates rank experts by a projection of the normalised residual stream. For one token, the norm multiplies the scores
of all experts by the same factor, so the projection alone ranks them. That takes two operations, while the model's
modules take about twenty. If experts are small, the gates' operations are most of the cost of speculation. A shortcut
is used only if it chooses the same experts as the gate, which is tested when the shortcut is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moetier.runtime.kernels.products.gemv import Scores
from moetier.runtime.moe.gates import Gate, Gates

TRIED_STATES = 64  # number of random states with which a shortcut is compared with its gate
AGREE = 0.95  # least share of states with the same experts; rounding decides between nearly equal scores


class Prediction(NamedTuple):
    """Experts predicted for a block, best first. With several tokens, the best of each token come first."""

    likely: list[int]  # for each token, as many as the gate chooses
    near: list[int]  # the next best experts


class Ranking(NamedTuple):
    """Experts of one block in the order of their scores. A device may still be computing them."""

    experts: Tensor  # [tokens, n], int64, best first: twice as many as the gate chooses, or all
    top_k: int

    def on_cpu(self) -> Ranking:
        """Queue a copy to the CPU, and return the copy. It may be read once the caller has waited for the device."""
        return Ranking(self.experts.to("cpu", non_blocking=True), self.top_k)

    def prediction(self) -> Prediction:
        """Return the ranked experts as lists. If ``experts`` is on a device, wait until the device has computed it."""
        flat = self.experts.T.flatten().tolist()
        chosen = self.top_k * len(self.experts)
        return Prediction(flat[:chosen], flat[chosen:])


class Shortcuts:
    """Shortcuts of a model's gates. If a gate has no shortcut, the gate itself is called."""

    def __init__(self, gates: Gates) -> None:
        self.gates = gates
        self._of = [None if gate.refusal else shortcut_of(gate) for gate in gates.blocks]

    def rank(self, block: int, hidden: Tensor) -> Ranking:
        """Rank the experts of ``block`` for each token.

        ``hidden`` is the residual stream at the block's own layer or at an earlier one. Its shape is [tokens, hidden
        size], or has more leading dimensions, which are flattened.
        """
        shortcut = self._of[block]
        return shortcut.rank(hidden) if shortcut is not None else ask(self.gates.blocks[block], hidden)

    def predict(self, block: int, hidden: Tensor) -> Prediction:
        """Return ``rank(block, hidden).prediction()``.

        For a single token, [1, hidden size], on a CPU, this takes less time than ``rank``.
        """
        if (shortcut := self._of[block]) is not None and hidden.numel() == hidden.shape[-1]:
            return shortcut.predict(hidden)
        return self.rank(block, hidden).prediction()


class Shortcut:
    """A gate as one projection: an fp32 copy of its weights, multiplied by the weights of the norm."""

    def __init__(self, weight: Tensor, bias: Tensor | None, top_k: int) -> None:
        """Make a shortcut.

        Args:
            weight: [experts, hidden size], fp32.
            bias: [experts], fp32, or None.
            top_k: number of experts that the gate chooses for a token.
        """
        self._weight = weight
        self._scores = Scores(weight) if Scores.can_multiply(weight) else None
        self._bias = bias
        self._biases = None if bias is None else bias.tolist()
        self._top_k = top_k
        self._ranked = _ranked(top_k, len(weight))
        self._root = math.sqrt(weight.shape[1])

    @torch.no_grad()
    def rank(self, hidden: Tensor) -> Ranking:
        """Rank the experts for each token.

        ``hidden`` has the shape [tokens, hidden size], or more leading dimensions, which are flattened.
        """
        states = hidden.reshape(-1, hidden.shape[-1]).float()
        if self._bias is not None:
            states = states / (torch.linalg.vector_norm(states, dim=-1, keepdim=True) / self._root)
        scores = nn.functional.linear(states, self._weight, self._bias)
        return Ranking(scores.topk(self._ranked, -1).indices, self._top_k)

    def predict(self, hidden: Tensor) -> Prediction:
        """Return ``rank(hidden).prediction()`` for a single token on a CPU: ``hidden`` is [1, hidden size]."""
        scores = None if self._scores is None else self._scores.compute(hidden)
        if scores is None:
            return self.rank(hidden).prediction()
        if self._biases is not None:
            unit = float(torch.linalg.vector_norm(hidden.float())) / self._root
            scores = [score / unit + bias if unit else bias for score, bias in zip(scores, self._biases, strict=True)]
        ranked = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        return Prediction(ranked[: self._top_k], ranked[self._top_k : self._ranked])


@torch.no_grad()
def ask(gate: Gate, hidden: Tensor) -> Ranking:
    """Rank the experts by calling the gate with ``hidden`` [batch, tokens, hidden size]; see ``Gate.ask``."""
    output = gate.ask(hidden)
    probabilities, experts = gate.probabilities(output), output[2]
    top_k = experts.shape[-1]
    others = probabilities.scatter(-1, experts, -1.0).topk(_ranked(top_k, probabilities.shape[-1]) - top_k, -1)
    return Ranking(torch.cat([experts, others.indices], -1), top_k)


def _ranked(top_k: int, experts: int) -> int:
    """Return how many experts of a block are ranked: twice ``top_k``, but at most all ``experts``."""
    return min(2 * top_k, experts)


@torch.no_grad()
def shortcut_of(gate: Gate) -> Shortcut | None:
    """Return a shortcut of the gate, or None if no shortcut would choose the same experts as the gate."""
    weight = getattr(gate.gate, "weight", None)
    if gate.mixer is not None or not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(TRIED_STATES, weight.shape[-1], generator=random).to(weight.device, gate.dtype)
    chosen = gate.predict(hidden).experts
    top_k = chosen.shape[-1]
    if top_k >= weight.shape[0]:
        return None
    bias = getattr(gate.gate, "bias", None)
    bias = bias.detach().float() if isinstance(bias, Tensor) else None
    for scale in _scales(gate.norm):
        shortcut = Shortcut(weight.float() * scale, bias, top_k)
        ours = shortcut.rank(hidden).experts[:, :top_k]
        same = (ours.sort(-1).values == chosen.sort(-1).values).all(-1)
        if float(same.float().mean()) >= AGREE:
            return shortcut
    return None


def _scales(norm: nn.Module | None) -> Iterator[Tensor | float]:
    """Yield the factors by which the norm may multiply the state. The right one depends on the norm's class."""
    weight = getattr(norm, "weight", None)
    if norm is None:
        yield 1.0
    elif isinstance(weight, Tensor) and weight.ndim == 1:
        yield weight.float()
        yield 1.0 + weight.float()  # norms of Gemma
