"""A checkpoint on the Hugging Face hub: first what is small, and only when that is in order its weights.

Never code, never pickle. Everything lands in huggingface_hub's own cache, or is found there without a network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from moetier.tiers.errors import CheckpointError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
SMALL_FILES = (
    "config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model*",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece*.model", "*.tiktoken", "tekken.json", "chat_template.json*", "chat_template.jinja",
    "additional_chat_templates/*.jinja", "generation_config.json", "*processor_config.json",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


def fetch(name: str, files: Sequence[str] = SMALL_FILES, revision: str | None = None) -> Path:
    """The snapshot's folder, with those of ``files`` (names or patterns) that there are. Raises CheckpointError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(files), revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"There is no folder {name}, and the hub did not give a model of that id: {reason}",
            "Check the name and the network; for a model behind a licence, log in with `hf auth login`.",
        ) from error
