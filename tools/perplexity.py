"""How well a language model foretells a text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moetier.runtime.context import first_ids, longest_context
from moetier.tiers.errors import ConfigError

WINDOW = 512  # tokens that are read together; each window begins without what came before


@dataclass(frozen=True, slots=True)
class Loss:
    """``nats`` lost over ``tokens`` foretold; losses of texts can be added."""

    tokens: int = 0
    nats: float = 0.0

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.tokens + other.tokens, self.nats + other.nats)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)


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
            total += Loss(len(window) - 1, float(F.cross_entropy(logits.float(), window[1:], reduction="sum")))
    return total
