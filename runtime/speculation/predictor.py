"""Shortcuts: gates asked in few operations, which learn from their predictions.

Most gates rank experts by a projection of the normalised residual stream. The norm's factor is the same for all experts
of a token, so the projection alone ranks them: two operations where the modules take about twenty. Beside small
experts, these operations are most of what speculation costs. A shortcut is used only where it chooses the experts that
the gate chooses, which is tested when it is made.

A shortcut then learns what the layers in between do to the residual stream. After a wrong prediction, the row of each
expert that was missed moves towards the state, and the row of each expert that was predicted in vain moves away from
it, as in a perceptron (Rosenblatt 1958). The gate itself is never changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moetier.runtime.kernels.row import Scores
from moetier.runtime.moe.gates import Gate, Gates

TRIED_ROWS = 64  # random states by which a shortcut is compared with its gate
AGREE = 0.95  # share of them that has to agree: rounding decides between experts of about equal scores
STEP = 0.01  # of learning, in lengths of a row
TINY = 1e-12


class Prediction(NamedTuple):
    """Experts of one block, best first; of several tokens the best of each before the second best."""

    likely: list[int]  # as many for each token as its gate chooses
    near: list[int]  # the runners-up


class Ranking(NamedTuple):
    """Experts of one block in the order of their scores, perhaps still being computed on a device."""

    experts: Tensor  # [tokens, n], int64, best first: those that the gate chooses, and as many runners-up, or all
    top_k: int

    def on_cpu(self) -> Ranking:
        """Return a copy that can be read once the device has been waited for."""
        return Ranking(self.experts.to("cpu", non_blocking=True), self.top_k)

    def prediction(self) -> Prediction:
        """Return it as lists. Waits for the device if the tensor is on one."""
        flat = self.experts.T.flatten().tolist()
        chosen = self.top_k * len(self.experts)
        return Prediction(flat[:chosen], flat[chosen:])


class Shortcuts:
    """Shortcuts of a model's gates, one for each distance. A gate without a shortcut is asked itself."""

    def __init__(self, gates: Gates, look_ahead: int) -> None:
        """Ask gates 1 to ``look_ahead`` layers before theirs; if that is more than 1, at the entry of theirs, too."""
        assert look_ahead >= 1
        self.gates = gates
        self.look_ahead = look_ahead
        self._of = {
            distance: [None if gate.refusal else shortcut_of(gate) for gate in gates.blocks]
            for distance in range(0 if look_ahead > 1 else 1, look_ahead + 1)
        }

    def rank(self, block: int, distance: int, hidden: Tensor) -> Ranking:
        """Rank the block's experts for the residual stream ``hidden`` of ``distance`` layers before it.

        It is [batch, tokens, hidden], or has other leading dimensions.
        """
        shortcut = self._of[distance][block]
        return shortcut.rank(hidden) if shortcut is not None else ask(self.gates.blocks[block], hidden)

    def predict(self, block: int, distance: int, hidden: Tensor) -> Prediction:
        """Return ``rank(...).prediction()``, on a CPU; faster for a single token, such as [1, 1, hidden]."""
        shortcut = self._of[distance][block]
        if shortcut is not None and hidden.numel() == hidden.shape[-1]:
            return shortcut.predict(hidden)
        return self.rank(block, distance, hidden).prediction()

    def learn(self, block: int, distance: int, hidden: Tensor, *, missed: set[int], in_vain: set[int]) -> None:
        """Learn from the prediction for a single token: experts that it ``missed``, and those it predicted ``in_vain``.

        ``hidden`` is [1, 1, hidden], or has other leading dimensions.
        """
        if (shortcut := self._of[distance][block]) is not None and (missed or in_vain):
            shortcut.learn(hidden, missed, in_vain)


class Shortcut:
    """A gate as one projection: a copy of its weights in fp32, multiplied by the norm's."""

    def __init__(self, weight: Tensor, bias: Tensor | None, top_k: int) -> None:
        """``weight`` [experts, hidden] and ``bias`` [experts] are fp32."""
        self._weight = weight
        self._rows = weight.unbind(0)
        self._scores = Scores(weight) if Scores.fits(weight) else None
        self._bias = bias
        self._biases = None if bias is None else bias.tolist()
        self._top_k = top_k
        self._ranked = _ranked(top_k, len(weight))
        self._root = math.sqrt(weight.shape[1])
        self._step = STEP * float(weight.norm(dim=1).mean())

    @torch.no_grad()
    def rank(self, hidden: Tensor) -> Ranking:
        """Rank the experts for ``hidden`` [batch, tokens, hidden], or with other leading dimensions."""
        states = hidden.reshape(-1, hidden.shape[-1]).float()
        if self._bias is not None:
            states = states / (torch.linalg.vector_norm(states, dim=-1, keepdim=True) / self._root)
        scores = nn.functional.linear(states, self._weight, self._bias)
        return Ranking(scores.topk(self._ranked, -1).indices, self._top_k)

    def predict(self, hidden: Tensor) -> Prediction:
        """Return ``rank(hidden).prediction()`` for a single token, such as [1, 1, hidden], on a CPU, in one step."""
        scores = None if self._scores is None else self._scores.of(hidden)
        if scores is None:
            return self.rank(hidden).prediction()
        if self._biases is not None:
            unit = float(torch.linalg.vector_norm(hidden.float())) / self._root
            scores = [score / unit + bias if unit else bias for score, bias in zip(scores, self._biases, strict=True)]
        ranked = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        return Prediction(ranked[: self._top_k], ranked[self._top_k : self._ranked])

    @torch.no_grad()
    def learn(self, hidden: Tensor, missed: Iterable[int], in_vain: Iterable[int]) -> None:
        """Learn from a single token, such as [1, 1, hidden], if its state is finite. Waits for no device."""
        state = hidden.reshape(-1).float()
        length, step = torch.linalg.vector_norm(state).clamp_min(TINY), self._step
        if not state.is_cpu:
            state = (state / length).nan_to_num(0.0)
        elif math.isfinite(length):
            step /= float(length)
        else:
            return
        for expert in missed:
            self._rows[expert].add_(state, alpha=step)
        for expert in in_vain:
            self._rows[expert].add_(state, alpha=-step)


@torch.no_grad()
def ask(gate: Gate, hidden: Tensor) -> Ranking:
    """Rank the experts by calling the gate itself with ``hidden`` [batch, tokens, hidden], or as it takes it."""
    output = gate.ask(hidden)
    probabilities, experts = gate.probabilities(output), output[2]
    top_k = experts.shape[-1]
    others = probabilities.scatter(-1, experts, -1.0).topk(_ranked(top_k, probabilities.shape[-1]) - top_k, -1)
    return Ranking(torch.cat([experts, others.indices], -1), top_k)


def _ranked(top_k: int, experts: int) -> int:
    """Return how many experts of a block are ranked."""
    return min(2 * top_k, experts)


@torch.no_grad()
def shortcut_of(gate: Gate) -> Shortcut | None:
    """Return a gate's shortcut; None where it chooses other experts than the gate."""
    weight = getattr(gate.gate, "weight", None)
    if gate.mixer is not None or not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(TRIED_ROWS, weight.shape[-1], generator=random).to(weight.device, gate.dtype)
    chosen = gate.predict(hidden).experts
    top_k = chosen.shape[-1]
    if top_k >= weight.shape[0]:
        return None
    bias = getattr(gate.gate, "bias", None)
    bias = bias.detach().float() if isinstance(bias, Tensor) else None
    for scale in _scales(gate.norm):
        found = Shortcut(weight.float() * scale, bias, top_k)
        ours = found.rank(hidden).experts[:, :top_k]
        same = (ours.sort(-1).values == chosen.sort(-1).values).all(-1)
        if float(same.float().mean()) >= AGREE:
            return found
    return None


def _scales(norm: nn.Module | None) -> Iterator[Tensor | float]:
    """Yield the factors by which the norm may multiply."""
    weight = getattr(norm, "weight", None)
    if norm is None:
        yield 1.0
    elif isinstance(weight, Tensor) and weight.ndim == 1:
        yield weight.float()
        yield 1.0 + weight.float()  # Gemma's
