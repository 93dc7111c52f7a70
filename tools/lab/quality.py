"""How well a language model foretells a text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moetier.runtime.context import first_ids, longest_context
from moetier.tiers.errors import ConfigError

WINDOW = 512  # tokens that are read together; each window begins without what came before
LEAST_WINDOWS = 8  # to rank by: of fewer a standard error is itself too uncertain


@dataclass(frozen=True, slots=True)
class Loss:
    """``nats`` lost over ``tokens`` foretold; losses of texts can be added."""

    tokens: int = 0
    nats: float = 0.0
    windows: tuple[tuple[int, float], ...] = ()  # tokens and nats of each window

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.tokens + other.tokens, self.nats + other.nats, self.windows + other.windows)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)


@dataclass(frozen=True, slots=True)
class Change:
    """Change of the logarithm of a perplexity, with its standard error; None where one window alone was read."""

    log: float
    log_error: float | None

    @classmethod
    def of(cls, found: Loss, base: Loss) -> Change:
        """From ``base`` to ``found``, which were measured on the same windows: each is compared with itself, so that
        what makes a window hard for both has no part in the error."""
        pairs = list(zip(found.windows, base.windows, strict=True))
        assert all(mine[0] == theirs[0] for mine, theirs in pairs), "other windows"
        log = (found.nats - base.nats) / base.tokens
        if len(pairs) < 2:
            return cls(log, None)
        squares = sum((mine[1] - theirs[1] - log * mine[0]) ** 2 for mine, theirs in pairs)
        return cls(log, math.sqrt(squares * len(pairs) / (len(pairs) - 1)) / base.tokens)

    @property
    def relative(self) -> float:
        return math.expm1(self.log)

    @property
    def relative_error(self) -> float | None:
        return None if self.log_error is None else math.exp(self.log) * self.log_error

    @property
    def is_clear(self) -> bool:
        """Whether it is more than two standard errors."""
        return self.log_error is not None and abs(self.log) > 2 * self.log_error


def ranks(losses: Sequence[Loss]) -> list[tuple[int, int]] | None:
    """The first and the last place by perplexity that each may have: two whose difference is not clear share places.

    None where there is nothing to rank, or where there are too few windows to know standard errors by.
    """
    if len(losses) < 2 or len(losses[0].windows) < LEAST_WINDOWS:
        return None
    clear = [[change.log if (change := Change.of(a, b)).is_clear else 0.0 for b in losses] for a in losses]
    return [(1 + sum(log > 0 for log in changes), len(losses) - sum(log < 0 for log in changes)) for changes in clear]


def read_texts(paths: Iterable[Path]) -> dict[str, str]:
    """File name without its suffix -> text; of a folder, all of its .txt files. Raises ConfigError."""
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not found or not all(file.is_file() for file in found):
            raise ConfigError(f"{path} is no text and no folder with .txt files.", "Give --text other files.")
        files += found
    texts = {file.stem: file.read_text("utf-8", errors="replace") for file in files}
    if len(texts) != len(files):
        raise ConfigError("Two texts have the same name.", "Rename one: the names are the table's columns.")
    return texts


def tokenize(tokenizer: Any, texts: Mapping[str, str], tokens: int) -> dict[str, Tensor]:
    """Name -> the first ``tokens`` tokens, int64 [tokens or fewer], without special ones. Raises ConfigError."""
    found = {}
    for name, text in texts.items():
        ids = torch.tensor(first_ids(tokenizer, text, tokens, add_special_tokens=False)[:tokens], dtype=torch.int64)
        if len(ids) < 2:
            raise ConfigError(f"The text {name} has fewer than two tokens.", "Give --text something longer.")
        found[name] = ids
    return found


@torch.inference_mode()
def loss(model: Any, ids: Tensor) -> Loss:
    """Of a causal language model on one text, in windows of WINDOW tokens, or of the model's context where that is
    shorter; the last may be shorter."""
    total, size = Loss(), min(WINDOW, longest_context(model.config) or WINDOW)
    for start in range(0, len(ids) - 1, size):
        window = ids[start : start + size].to(model.device)
        if len(window) > 1:
            logits = model(window[None], use_cache=False).logits[0, :-1]  # [window - 1, vocabulary]
            nats = float(F.cross_entropy(logits.float(), window[1:], reduction="sum"))
            total += Loss(len(window) - 1, nats, ((len(window) - 1, nats),))
    return total
