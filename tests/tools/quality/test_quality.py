"""Losses by window, changes of perplexity with their standard errors, and ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from moetier.tools.quality.quality import WINDOW, Loss, PerplexityChange, loss, ranks


def losses_of(*nats: Iterable[float], tokens: int = 511) -> list[Loss]:
    """By window."""
    return [sum((Loss(tokens, each, ((tokens, each),)) for each in map(float, row)), Loss()) for row in nats]


def test_the_standard_error_is_that_of_the_differences() -> None:
    """However much windows differ among themselves."""
    random = np.random.default_rng(0)
    base, more = random.uniform(1000, 3000, 20), random.normal(5.0, 2.0, 20)
    change = PerplexityChange.of(*losses_of(base + more, base))
    assert change.log == pytest.approx(more.mean() / 511)
    assert change.log_error == pytest.approx(more.std(ddof=1) / math.sqrt(20) / 511)
    assert change.relative == pytest.approx(math.exp(more.mean() / 511) - 1)
    assert change.is_clear
    assert PerplexityChange.of(*losses_of(base[:1] + more[:1], base[:1])).relative_error is None
    same = PerplexityChange.of(*losses_of(base, base))
    assert (same.log, same.log_error, same.is_clear) == (0.0, 0.0, False)


def test_the_standard_error_covers_what_it_should() -> None:
    """Of a thousand measurements of a change that is none, one in twenty is beyond two standard errors."""
    random = np.random.default_rng(0)
    base = random.uniform(1000, 3000, 12)
    clear = [PerplexityChange.of(*losses_of(base + random.normal(0.0, 3.0, 12), base)).is_clear for _ in range(1000)]
    assert 0.03 < np.mean(clear) < 0.1


def test_what_cannot_be_told_apart_is_not_ranked() -> None:
    base = np.linspace(1000.0, 3000.0, 16)
    noise = np.asarray([5.5, -4.5] * 8)  # its mean is a third of its standard error
    rows = [base, base + noise, base + 50.0, base + 50.0 + noise, base - 10.0]
    assert ranks(losses_of(*rows)) == [(2, 3), (2, 3), (4, 5), (4, 5), (1, 1)]
    assert ranks(losses_of(*(row[:7] for row in rows))) is None, "too few windows"
    assert ranks(losses_of(base)) is None


def test_loss_is_what_transformers_says(tinymix: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tinymix, dtype=torch.float32)
    ids = torch.randint(5, 4000, (WINDOW + 100,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (model(part[None], labels=part[None]).loss for part in (ids[:WINDOW], ids[WINDOW:]))
    found = loss(model, ids)
    assert found.tokens == WINDOW - 1 + 99
    assert found.nats == pytest.approx(float(first) * (WINDOW - 1) + float(second) * 99, rel=1e-5)
    assert (Loss(10, 20.0) + Loss(10, 0.0)).perplexity == pytest.approx(math.e)
    assert loss(model, ids[: WINDOW + 1]).tokens == WINDOW - 1  # one token by itself foretells nothing


def test_windows_are_no_longer_than_the_context(tinymix: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tinymix, dtype=torch.float32)
    model.config.max_position_embeddings = 64
    ids = torch.randint(5, 4000, (128,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        parts = [float(model(part[None], labels=part[None]).loss) for part in (ids[:64], ids[64:])]
    found = loss(model, ids)
    assert found.tokens == 2 * 63
    assert found.nats == pytest.approx(sum(parts) * 63, rel=1e-5)
