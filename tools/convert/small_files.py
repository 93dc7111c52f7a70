"""The small files beside trunk and experts, which no manifest lists: what of them a model can't do without."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from moetier.runtime.checkpoint.config_json import read_config
from moetier.tiers.errors import MoetierError, StoreFormatError

# what a tokenizer says of itself; and one of what it can be made of
ABOUT = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
VOCABULARY = re.compile(
    r"tokenizer\.(json|model(\.v\d+)?)|vocab\.(json|txt)|tekken\.json|(spiece|sentencepiece(\.bpe)?)\.model|\w+\.tiktoken"
)


def small_faults(directory: Path) -> Iterator[MoetierError]:
    """Of a model directory: config.json, and a tokenizer of which only a part is there. One that never had a tokenizer
    is fine."""
    try:
        read_config(directory)
    except MoetierError as error:
        yield error
    there = [name for name in ABOUT if (directory / name).exists()]
    if there and not has_tokenizer(directory):
        yield StoreFormatError(
            f"{directory} has {there[0]}, and no vocabulary: tokenizer.json, or tokenizer.model, is missing.",
            "Copy the source's tokenizer files into it.",
        )


def has_tokenizer(directory: Path) -> bool:
    return any(VOCABULARY.fullmatch(path.name) for path in directory.iterdir())
