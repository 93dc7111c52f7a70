"""Record a trace of a running model: the scores of its gates, and the experts that its Experts modules compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moetier.runtime.moe.gates import Gates
from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import UnsupportedModelError

from .trace import NO_EXPERT, Trace

Array = npt.NDArray[Any]

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # ends a text whose last tokens are only a part of a character
MAX_TOKENS = 4  # largest number of tokens of one character, as UTF-8 has at most 4 bytes a character


class Recorder(Closeable):
    """Observe a loaded model until ``close()``, without changing what it computes. A context manager.

    Run one sequence at a time, and call ``end_sequence`` after its forward passes. On a GPU each observation waits for
    the device, so do not measure time while recording.
    """

    def __init__(self, model: Any, *, look_ahead: int = 2) -> None:
        """Observe ``model``. At each block's entry, also ask the gates of the next ``look_ahead`` layers."""
        self._gates = Gates(model)
        blocks = range(len(self._gates.blocks))
        self._lookaheads = tuple(
            distance
            for distance in range(1, look_ahead + 1)
            if any(self._gates.ahead(block, distance) is not None for block in blocks)
        )
        self._columns: dict[tuple[str, int, int], _Column] = {}  # keys: name of the numbers, look-ahead, block
        self._offsets = [0]
        self._n_prefill: list[int] = []
        self._token_ids: list[int] = []
        self._pieces: list[str] = []
        self._observation = self._gates.observe(entry=self._at_entry, gate=self._at_gate, experts=self._at_experts)

    @property
    def refusals(self) -> str | None:
        """Text that says which blocks have no probabilities and predictions, and why; None if all blocks have them."""
        return self._gates.refusals()

    def _at_entry(self, block: int, hidden: Tensor) -> None:
        for distance in self._lookaheads:
            if (ahead := self._gates.ahead(block, distance)) is not None:
                experts, probabilities = self._gates.blocks[ahead].predict(hidden)
                order = probabilities.argsort(dim=-1, descending=True, stable=True)
                self._note("predictions", distance, ahead, experts.gather(-1, order))
                self._note("prediction_probabilities", distance, ahead, probabilities.gather(-1, order))

    def _at_gate(self, block: int, probabilities: Tensor) -> None:
        self._note("probabilities", 0, block, probabilities)

    def _at_experts(self, block: int, experts: Tensor, weights: Tensor) -> None:
        is_own = experts < self._gates.blocks[block].experts.num_experts  # other devices compute the rest, or none does
        self._note("experts", 0, block, experts.where(is_own, NO_EXPERT))
        self._note("weights", 0, block, weights.where(is_own, 0))

    def _note(self, name: str, distance: int, block: int, rows: Tensor) -> None:
        dtype = torch.float16 if rows.is_floating_point() else torch.int16
        column = self._columns.setdefault((name, distance, block), _Column(self._offsets[-1]))
        column.add(rows.detach().to(dtype, copy=True).cpu().numpy())

    def end_sequence(self, token_ids: Sequence[int], *, n_prefill: int, pieces: Sequence[str] = ()) -> None:
        """End a sequence.

        Args:
            token_ids: the tokens of all its forward passes, in order.
            n_prefill: number of tokens of the prompt.
            pieces: the text of each token. It must be given for all sequences or for none.

        Raises:
            UnsupportedModelError: the model does not pass each token once through each block that it uses.
        """
        before, tokens = self._offsets[-1], len(token_ids)
        assert 0 <= n_prefill <= tokens > 0
        assert len(pieces) in (0, tokens)
        for (_, _, block), column in sorted(self._columns.items()):  # "experts" first, as they cause other errors
            if column.rows == before:
                column.rows += tokens
            elif column.rows != before + tokens:
                raise UnsupportedModelError(
                    f"{self._gates.blocks[block].path} got {column.rows - before} hidden states for {tokens} tokens.",
                    "Trace one sequence at a time, with a KV cache. A model must send each token through a block once.",
                )
        self._offsets.append(before + tokens)
        self._n_prefill.append(n_prefill)
        self._token_ids += token_ids
        self._pieces += pieces

    def trace(self, *, model: str = "", digest: str = "") -> Trace:
        """Return the trace of all sequences that have ended. There must be at least one.

        ``model`` and ``digest`` are stored in the trace as they are.
        """
        assert len(self._offsets) > 1, "a sequence"
        counts = tuple(gate.experts.num_experts for gate in self._gates.blocks)
        has_probabilities = any(name == "probabilities" for name, _, _ in self._columns)
        ahead = self._lookaheads
        return Trace(
            experts=self._gathered("experts", 0, NO_EXPERT),
            offsets=tuple(self._offsets),
            num_experts=counts,
            n_prefill=tuple(self._n_prefill),
            weights=self._gathered("weights", 0, 0.0),
            probabilities=self._gathered("probabilities", 0, 0.0, max(counts)) if has_probabilities else None,
            token_ids=np.asarray(self._token_ids, np.int32),
            pieces=tuple(self._pieces),
            lookaheads=ahead,
            predictions=np.stack([self._gathered("predictions", d, NO_EXPERT) for d in ahead]) if ahead else None,
            prediction_probabilities=np.stack([self._gathered("prediction_probabilities", d, 0.0) for d in ahead])
            if ahead
            else None,
            model=model,
            digest=digest,
            blocks=tuple(gate.path for gate in self._gates.blocks),
        )

    def _gathered(self, name: str, distance: int, nothing: float, width: int = 0) -> Array:
        """Return the recorded numbers of all tokens and blocks, [tokens, blocks, ``width`` or more].

        Missing numbers have the value ``nothing``.
        """
        tokens, blocks = self._offsets[-1], len(self._gates.blocks)
        columns = {b: c for b in range(blocks) if (c := self._columns.get((name, distance, b))) is not None}
        width = max(width, *(column.width for column in columns.values()))
        out = np.full((tokens, blocks, width), nothing, np.float16 if isinstance(nothing, float) else np.int16)
        for block, column in columns.items():
            for start, part in column.parts.items():
                out[start : start + len(part), block, : part.shape[1]] = part
        return out

    def close(self) -> None:
        """Remove the hooks. Idempotent."""
        self._observation.close()


@dataclass
class _Column:
    """The recorded numbers of one block: a row for each token."""

    rows: int  # number of tokens so far, including those without numbers
    width: int = 0  # largest number of columns of a part
    parts: dict[int, Array] = field(default_factory=dict)  # arrays [tokens, numbers]; keys: their first token

    def add(self, part: Array) -> None:
        """Append the rows of the next tokens: ``part`` is [tokens, numbers]."""
        if len(part):
            self.parts[self.rows] = part
            self.width = max(self.width, part.shape[1])
            self.rows += len(part)


def pieces_of(tokenizer: Any, token_ids: Sequence[int]) -> tuple[str, ...]:
    """Return for each token the text that it adds. If a character has several tokens, the last of them has its text."""
    pieces = []
    before = begun = 0  # token_ids[before:begun] is context; its text is already in ``pieces``
    for end in range(1, len(token_ids) + 1):
        context, text = (_decode(tokenizer, token_ids[before:stop]) for stop in (begun, end))
        if text.endswith(UNFINISHED) and end - begun < MAX_TOKENS and end < len(token_ids):
            pieces.append("")
            continue
        pieces.append(text[len(context) :])
        before, begun = begun, end
    return tuple(pieces)


def _decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    return tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
