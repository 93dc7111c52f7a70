"""Check that a model has an embedding for each token id of its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moetier.tiers.errors import ConfigError, StoreFormatError


def embeddings_of(model: Any) -> int:
    """Return the number of tokens for which a model has an embedding. It may exceed config.json's vocab_size."""
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return rows if isinstance(rows, int) else int(model.config.get_text_config(decoder=True).vocab_size)


def check_tokenizer(model: Any, tokenizer: Any, location: Path) -> None:
    """Raise StoreFormatError if the model lacks embeddings for ids that any text may have.

    These are the tokenizer's ordinary tokens, and the tokens that it adds to each text. Other added tokens may exceed
    the embeddings: fine-tuned models often have a padding token that no text contains. ``unknown_token`` finds them.
    """
    rows = embeddings_of(model)
    last = max(tokenizer.vocab_size - 1, *tokenizer("", verbose=False)["input_ids"], 0)
    if last >= rows:
        raise StoreFormatError(
            f"The tokenizer of {location} has token ids up to {last:,}, but the model has only {rows:,} embeddings.",
            "The tokenizer belongs to another model. Copy this model's tokenizer files into the directory.",
        )


def unknown_token(model: Any, tokenizer: Any, ids: Iterable[int]) -> str | None:
    """Return the text of the first of ``ids`` for which the model has no embedding; None if it has all."""
    rows = embeddings_of(model)
    unknown = next((number for number in ids if number >= rows), None)
    return None if unknown is None else str(tokenizer.decode([unknown]))


def check_ids(model: Any, tokenizer: Any, ids: Iterable[int], name: str = "The prompt") -> None:
    """Raise ConfigError if the model has no embedding for one of ``ids``. ``name`` is the text's name in the error."""
    if (token := unknown_token(model, tokenizer, ids)) is not None:
        raise ConfigError(
            f"{name} has the token {token!r}, for which the model has no embedding.",
            "Leave it out, or copy this model's tokenizer files into the directory.",
        )
