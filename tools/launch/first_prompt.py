"""Estimate of how long the first prompt of a client takes, from the rates that `moetier plan` measures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any


def seconds_of(tokens: int, prompts: Sequence[tuple[int, float]]) -> float | None:
    """Return the seconds of a prompt, by those of other lengths, in ascending order; None if it is the longest of all.

    Between two lengths the seconds grow evenly.
    """
    for (fewer, before), (more, after) in pairwise([(0, 0.0), *prompts]):
        if tokens <= more:
            return before + (after - before) * (tokens - fewer) / (more - fewer)
    return None


def estimated(directory: Path, tokens: int, **resources: Any) -> float | None:
    """Return the seconds of a first prompt of ``tokens`` tokens with a model on this machine, which is measured.

    Return None if that is not known: the prompt is longer than the context, or speeds on a device are not estimated.
    ``resources`` are as for ``plan``. Raises MoetierError as ``plan``.
    """
    from moetier.tools.plan.forecast import plan

    forecast = plan(directory, **resources)
    best = next((choice for choice in forecast["choices"] if choice["works"]), None)
    prompts = [] if best is None else [(prompt["tokens"], prompt["seconds"]) for prompt in best["prompts"]]
    return seconds_of(tokens, prompts)
