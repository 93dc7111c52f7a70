"""A gate asked in the fewest operations, for a guess; and taught by what came of it.

Most gates rank experts by a projection of what an RMSNorm makes of the residual stream. The norm's factor is the same
for all experts of a token, so the projection alone ranks them: two operations, where the modules take about twenty.
Beside small experts these are what speculation costs. A shortcut is used only where it names the experts that the gate
names, which is tried out when it is made.

From then on it learns what the layers in between do to the residual stream: after a wrong guess the row of each expert
that was missed moves towards the state it was asked with, and that of each that was named in vain away from it, as a
perceptron's do (Rosenblatt 1958). The gate itself is never touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moetier.runtime.kernels.row import Scores
from moetier.runtime.moe.gates import Gate, Gates

TRIED_ROWS = 64
EVERY = 16  # guesses of single tokens, until their unit is looked at again
TINY = 1e-12
STEP = 0.01  # of a row's length
AGREE = 0.95  # of the rows: where two experts are as good as equal, rounding decides


class Leads(NamedTuple):
    """What is guessed of one block, token by token."""

    named: list[tuple[int, float]]  # experts, and by how much each beats the best that is not named
    near: list[int]  # those that come next

    @classmethod
    def of(cls, ranked: Sequence[int], values: Sequence[float], unit: float, top_k: int) -> Leads:
        """Of one token: experts, the best first, with their values, of which ``top_k`` are named."""
        best = values[top_k] if len(values) > top_k else -math.inf
        named = [(ranked[place], (values[place] - best) / unit if unit else 0.0) for place in range(top_k)]
        return cls(named, list(ranked[top_k:]))


class Guess(NamedTuple):
    """Where tokens might be sent. Values are logits, or logarithms of what the gate makes of them."""

    experts: Tensor  # [T, n], int64, the best first: what the gate chooses, and as many that come next, or all
    values: Tensor  # [T, n], of any floating type
    unit: Tensor  # [T], likewise
    top_k: int

    def on_cpu(self) -> Guess:
        """The same, to be read once the device has been waited for."""
        experts, values, unit = (tensor.to("cpu", non_blocking=True) for tensor in self[:3])
        return Guess(experts, values, unit, self.top_k)

    def leads(self) -> Leads:
        """In units. Waits for the device, if the tensors are on one."""
        found = Leads([], [])
        for experts, values, unit in zip(*(tensor.tolist() for tensor in self[:3]), strict=True):
            named, near = Leads.of(experts, values, unit, self.top_k)
            found.named.extend(named)
            found.near.extend(near)
        return found


class Shortcuts:
    """Of a model's gates, for each distance that they are asked from. A gate that has none is asked itself."""

    def __init__(self, gates: Gates, look_ahead: int) -> None:
        """From 1 to ``look_ahead`` layers before theirs; if that is more than 1, from the entry of their own, too."""
        assert look_ahead >= 1
        self.gates = gates
        self.look_ahead = look_ahead
        self._of = {
            distance: [None if gate.refusal else shortcut_of(gate) for gate in gates.blocks]
            for distance in range(0 if look_ahead > 1 else 1, look_ahead + 1)
        }

    def guess(self, block: int, distance: int, hidden: Tensor) -> Guess:
        """Of the residual stream [..., H] at ``distance`` layers before the block."""
        shortcut = self._of[distance][block]
        return shortcut.guess(hidden) if shortcut is not None else ask(self.gates.blocks[block], hidden)

    def leads(self, block: int, distance: int, hidden: Tensor) -> Leads:
        """``guess(...).leads()``, on a CPU; of a single token sooner."""
        shortcut = self._of[distance][block]
        if shortcut is not None and hidden.numel() == hidden.shape[-1]:
            return shortcut.leads(hidden)
        return self.guess(block, distance, hidden).leads()

    def learn(self, block: int, distance: int, hidden: Tensor, *, missed: set[int], in_vain: set[int]) -> None:
        """What came of a guess for the single token of ``hidden`` [..., H]: experts that it did not name, and that it
        named in vain."""
        if (shortcut := self._of[distance][block]) is not None and (missed or in_vain):
            shortcut.learn(hidden, missed, in_vain)


class Shortcut:
    """Of one gate, of whose weights it keeps a copy in fp32 with the norm's factored in."""

    def __init__(self, weight: Tensor, bias: Tensor | None, top_k: int) -> None:
        """``weight`` [E, H] and ``bias`` [E], both fp32."""
        self._weight = weight
        self._rows = weight.unbind(0)
        self._scores = Scores(weight) if Scores.fits(weight) else None
        self._bias = bias
        self._biases = None if bias is None else bias.tolist()
        self._top_k = top_k
        self._ranked = _ranked(top_k, len(weight))
        self._unit = 0.0  # of a token that it was asked about lately
        self._asked = 0
        self._root = math.sqrt(weight.shape[1])
        self._step = STEP * float(weight.norm(dim=1).mean())

    @torch.no_grad()
    def guess(self, hidden: Tensor) -> Guess:
        states = hidden.reshape(-1, hidden.shape[-1]).float()
        unit = torch.linalg.vector_norm(states, dim=-1) / self._root
        if self._bias is not None:
            states, unit = states / unit.unsqueeze(-1), torch.ones_like(unit)
        values, experts = nn.functional.linear(states, self._weight, self._bias).topk(self._ranked, -1)
        return Guess(experts, values, unit, self._top_k)

    def leads(self, hidden: Tensor) -> Leads:
        """As ``guess(hidden).leads()``, on a CPU of a single token, in one operation. The unit varies
        little from token to token, and is looked at now and then."""
        values = None if self._scores is None else self._scores.of(hidden)
        if values is None:
            return self.guess(hidden).leads()
        if self._biases is not None or self._asked % EVERY == 0:
            self._unit = float(torch.linalg.vector_norm(hidden.float())) / self._root
        self._asked += 1
        unit = self._unit
        if self._biases is not None:
            values = [value / unit + bias if unit else bias for value, bias in zip(values, self._biases, strict=True)]
            unit = 1.0
        ranked = sorted(range(len(values)), key=values.__getitem__, reverse=True)[: self._ranked]
        return Leads.of(ranked, [values[expert] for expert in ranked], unit, self._top_k)

    @torch.no_grad()
    def learn(self, hidden: Tensor, missed: Iterable[int], in_vain: Iterable[int]) -> None:
        """Of a single token. Waits for no device."""
        state = hidden.reshape(-1).float()
        length, step = torch.linalg.vector_norm(state).clamp_min(TINY), self._step
        if state.is_cpu:
            step /= float(length)
        else:
            state = state / length
        for expert in missed:
            self._rows[expert].add_(state, alpha=step)
        for expert in in_vain:
            self._rows[expert].add_(state, alpha=-step)


@torch.no_grad()
def ask(gate: Gate, hidden: Tensor) -> Guess:
    """What the gate itself says."""
    output = gate.ask(hidden)
    probabilities, experts = gate.probabilities(output), output[2]
    top_k = experts.shape[-1]
    others = probabilities.scatter(-1, experts, -1.0).topk(_ranked(top_k, probabilities.shape[-1]) - top_k, -1)
    values = torch.cat([probabilities.gather(-1, experts), others.values], -1).log()
    return Guess(torch.cat([experts, others.indices], -1), values, values.new_ones(len(values)), top_k)


def _ranked(top_k: int, experts: int) -> int:
    """How many a guess puts in order."""
    return min(2 * top_k, experts)


@torch.no_grad()
def shortcut_of(gate: Gate) -> Shortcut | None:
    """None where the gate names other experts, and must be asked itself."""
    weight = getattr(gate.gate, "weight", None)
    if gate.mixer is not None or not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(TRIED_ROWS, weight.shape[-1], generator=random).to(weight.device, gate.dtype)
    said = gate.predict(hidden).experts
    if said.shape[-1] >= weight.shape[0]:
        return None
    bias = getattr(gate.gate, "bias", None)
    bias = bias.detach().float() if isinstance(bias, Tensor) else None
    for scale in _scales(gate.norm):
        found = Shortcut(weight.float() * scale, bias, said.shape[-1])
        ours = found.guess(hidden).experts[:, : said.shape[-1]]
        same = (ours.sort(-1).values == said.sort(-1).values).all(-1)
        if float(same.float().mean()) >= AGREE:
            return found
    return None


def _scales(norm: nn.Module | None) -> Iterator[Tensor | float]:
    weight = getattr(norm, "weight", None)
    if norm is None:
        yield 1.0
    elif isinstance(weight, Tensor) and weight.ndim == 1:
        yield weight.float()
        yield 1.0 + weight.float()  # Gemma's
