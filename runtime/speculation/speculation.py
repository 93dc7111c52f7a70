"""Speculative gating: compute the next layers' gates with the present hidden state, and prefetch what they choose.

The method is from Eliseev & Mazur 2023 (arXiv 2312.17238), section 3.2. The blocks of the next layers are predicted
from the hidden state at the entry of a block's MoE part. On a GPU, predictions are computed at the entry. On a CPU,
where they take the caller's time, they are computed after the block's own demand, while its records are being read. If
predictions look more than one layer ahead, a block is predicted once more at the entry of its own layer. Predicted
records are requested only after the present block's own demand, so that the demand's reads come first.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from moetier.runtime.config import SpeculationMode
from moetier.runtime.moe.gates import Observation
from moetier.tiers.layout import ExpertKey
from moetier.tiers.source import PrefetchSource

from .controller import Controller
from .predictor import Prediction, Ranking, Shortcuts

# most tokens of a step that is predicted; a prefill uses nearly all experts, and is limited by computing
MAX_TOKENS = 8
JUDGED = 128  # number of latest predictions by which speculation may be rejected
POOR = 0.1  # speculation is rejected if less than this share of the predicted experts was right


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """Counters of one model's speculation.

    ``guesses`` and ``right`` are indexed by the number of layers that a prediction looks ahead. Index 0 is for
    predictions at the entry of a block's own layer.
    """

    mode: str
    is_on: bool
    steps_on: int  # steps with speculation; a step decodes one token of each sequence of a batch
    steps_off: int  # steps without speculation
    guesses: tuple[int, ...]  # number of predicted experts
    right: tuple[int, ...]  # number of predicted experts that were demanded
    seconds: float  # the caller's time for predictions, requests and judgements

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary from the names of all fields to their values."""
        return asdict(self)


class Admission:
    """Request prefetches of the predicted experts that ``source`` lacks.

    A request also names the predicted and the next best experts whose records are READY, because no prefetch evicts a
    requested record. The next best experts are included because many wrong predictions are nearly right.
    """

    def __init__(self, source: PrefetchSource, experts: Sequence[int], *, most: int | None = None) -> None:
        """Request prefetches from ``source``.

        ``experts`` has the number of experts of each block. ``most`` is the largest number of absent records in one
        request; None for any number.
        """
        self._source = source
        self._most = most
        self._keys = [[ExpertKey(block, expert) for expert in range(count)] for block, count in enumerate(experts)]
        self.requested: set[int] = set()  # blocks for which prefetches were requested since their latest demand

    def request(self, block: int, prediction: Prediction) -> list[int]:
        """Request prefetches for a block. Return the predicted experts, each once for each token that may use it."""
        keys = self._keys[block]
        likely = [expert for expert in prediction.likely if expert < len(keys)]  # larger indices have no record
        near = [expert for expert in prediction.near if expert < len(keys)]
        if (absent := self._absent(keys, likely)) or block in self.requested:
            absent |= self._absent(keys, near)
            resident = [keys[expert] for expert in dict.fromkeys([*near, *likely]) if expert not in absent]
            missing = [keys[expert] for expert in dict.fromkeys(likely) if expert in absent]
            self._source.prefetch(block, [*resident, *missing[: self._most]])
            self.requested.add(block)
        return likely

    def _absent(self, keys: Sequence[ExpertKey], experts: Iterable[int]) -> set[int]:
        return {key.expert for key in self._source.absent([keys[expert] for expert in experts])}


class _Asked(NamedTuple):
    """A ranking that a device may still be computing. It can be read once the caller has waited for the device."""

    block: int  # the block that is predicted
    distance: int  # number of layers that the prediction looks ahead
    ranking: Ranking


class Speculation:
    """Predict and prefetch experts during a model's forward passes, between ``attach`` and ``detach``.

    Speculation changes only the time that a token takes, not the result.
    """

    def __init__(
        self,
        shortcuts: Shortcuts,
        source: PrefetchSource,
        *,
        look_ahead: int,
        mode: SpeculationMode = SpeculationMode.AUTO,
        most: int | None = None,
        is_queued: bool = False,
    ) -> None:
        """Prepare speculation.

        Args:
            shortcuts: make the predictions.
            source: the tier from which the model's blocks acquire experts.
            look_ahead: number of layers, after the present one, whose blocks are predicted.
            mode: when to speculate.
            most: the largest number of absent records in one prefetch request; None for any number.
            is_queued: whether the device that computes, such as a GPU, queues work and does it later.
        """
        self._is_queued = is_queued
        self._shortcuts: Shortcuts | None = shortcuts  # None after detach
        gates = shortcuts.gates
        self._controller = Controller(mode)
        self._admission = Admission(source, [gate.experts.num_experts for gate in gates.blocks], most=most)
        self._distances = range(1, look_ahead + 1)
        self._targets = {
            gate.block: [(d, target) for d in self._distances if (target := gates.ahead(gate.block, d)) is not None]
            for gate in gates.blocks
        }
        self._first = gates.first
        self._entered: Tensor | None = None  # hidden state at the present block's entry, until it is used
        self._pending: list[_Asked] = []  # rankings that are to be read after the present block's demand
        # for each block, until its demand: how many layers each prediction looked ahead, and the predicted experts
        self._predicted: dict[int, list[tuple[int, list[int]]]] = {}
        self._judged: deque[float] = deque(maxlen=JUDGED)  # share of right experts of each prediction
        self._is_poor = False  # the latest predictions were too often wrong
        self._began = 0.0  # time at which the present step began; 0 if it is not timed
        self._step_tokens = 0  # number of tokens of the present step
        self._is_predicting = False  # whether the present step is predicted
        self._guesses = [0] * (look_ahead + 1)
        self._right = [0] * (look_ahead + 1)
        self._seconds = 0.0
        self._first_observation: Observation | None = None  # hooks on the first block, at which a step begins
        self._observation: Observation | None = None  # hooks on the other blocks, only while predicting

    def attach(self) -> None:
        """Register hooks on the model, unless the mode is OFF. Idempotent."""
        shortcuts = self._shortcuts
        assert shortcuts is not None, "it was detached"
        if (
            self._first_observation is None
            and self._first is not None
            and self._controller.mode is not SpeculationMode.OFF
        ):
            self._first_observation = shortcuts.gates.observe(entry=self._at_first, blocks=[self._first])

    def detach(self) -> None:
        """Remove the hooks and all references to the model and its tensors. Idempotent.

        ``attach`` must not be called afterwards. Any thread may call this, even while another thread computes. It waits
        for nothing.
        """
        self._shortcuts = None
        observation, self._first_observation = self._first_observation, None
        if observation is not None:
            observation.close()
        self._observe_others(on=False)
        self._is_predicting = False
        self._entered = None
        self._pending.clear()
        self._predicted.clear()

    def on_demand(self, block: int, experts: Collection[int]) -> None:
        """Predict and prefetch experts of later blocks, after ``block`` has demanded ``experts``."""
        if not self._is_predicting:
            return
        began = time.perf_counter()
        self._admission.requested.discard(block)  # the demand has cancelled the block's requests
        self._ask(block)
        for target, distance, ranking in self._pending:
            self._admit(target, distance, ranking.prediction())
        self._pending.clear()
        for distance, predicted in self._predicted.pop(block, ()):
            self._judge(distance, predicted, set(experts))
        self._seconds += time.perf_counter() - began

    def stats(self) -> SpeculationStats:
        """Return the counters. Call this in the thread that decodes, between two steps."""
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
        self._observe_others(on=self._is_predicting)
        self._at_entry(block, hidden)

    def _observe_others(self, *, on: bool) -> None:
        """Register (``on``) or remove the hooks on all blocks but the first."""
        shortcuts = self._shortcuts
        if on and self._observation is None and shortcuts is not None:
            layer = self._at_layer if len(self._distances) > 1 else None
            others = [gate.block for gate in shortcuts.gates.blocks if gate.block != self._first]
            self._observation = shortcuts.gates.observe(entry=self._at_entry, layer=layer, blocks=others)
        is_over = not on or self._shortcuts is None  # another thread may have called ``detach`` meanwhile
        if is_over and (observation := self._observation) is not None:
            observation.close()
            self._observation = None

    def _at_entry(self, block: int, hidden: Tensor) -> None:
        is_of_step = self._is_predicting and _tokens(hidden) == self._step_tokens  # else of another part of the model
        self._entered = hidden if is_of_step else None
        if self._is_queued:
            began = time.perf_counter()
            self._ask(block)
            self._seconds += time.perf_counter() - began

    def _at_layer(self, block: int, hidden: Tensor) -> None:
        """Predict the block of the layer that begins. Where work is queued, this would wait for the device."""
        if self._is_predicting and not self._is_queued and block in self._admission.requested:
            began = time.perf_counter()
            self._predict(block, 0, hidden)
            self._seconds += time.perf_counter() - began

    def _begin_step(self, tokens: int) -> None:
        now = time.perf_counter()
        if self._began and tokens == self._step_tokens:
            self._controller.step(now - self._began)
        else:
            self._controller.interrupt()
        if self._is_poor:
            self._is_poor = False
            self._controller.reject()
        counts = 0 < tokens <= MAX_TOKENS
        self._began = now if counts else 0.0
        self._step_tokens = tokens
        self._is_predicting = counts and self._controller.is_on
        self._pending.clear()
        self._predicted.clear()
        if not self._is_predicting:
            self._admission.requested.clear()  # demands of these blocks may never come

    # -- predictions --------------------------------------------------------------------------------------------------

    def _ask(self, block: int) -> None:
        """Predict the blocks ahead of ``block`` from the hidden state at its entry."""
        hidden, self._entered = self._entered, None
        if hidden is not None:
            for distance, target in self._targets[block]:
                self._predict(target, distance, hidden)

    def _predict(self, target: int, distance: int, hidden: Tensor) -> None:
        if (shortcuts := self._shortcuts) is None:
            return
        if self._is_queued:  # don't wait for the device: ``on_demand`` reads the result after the block has waited
            self._pending.append(_Asked(target, distance, shortcuts.rank(target, hidden).on_cpu()))
        else:
            self._admit(target, distance, shortcuts.predict(target, hidden))

    def _admit(self, block: int, distance: int, prediction: Prediction) -> None:
        if experts := self._admission.request(block, prediction):
            self._predicted.setdefault(block, []).append((distance, experts))

    def _judge(self, distance: int, predicted: list[int], demanded: set[int]) -> None:
        """Compare a prediction with the experts that were demanded."""
        right = sum(expert in demanded for expert in predicted)
        self._guesses[distance] += len(predicted)
        self._right[distance] += right
        self._judged.append(right / len(predicted))
        if len(self._judged) == JUDGED and sum(self._judged) < POOR * JUDGED:
            self._judged.clear()
            self._is_poor = True


def _tokens(hidden: Tensor) -> int:
    """Return the number of tokens of a hidden state [T, H], [B, T, H], or [B, T, S, H] with S residual streams."""
    return hidden.shape[: min(hidden.ndim - 1, 2)].numel()
