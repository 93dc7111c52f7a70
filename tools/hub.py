"""A checkpoint on the Hugging Face hub: first what is small, and only when that is in order its weights.

Never code, never pickle. Everything lands in huggingface_hub's own cache, or is found there without a network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moetier.tiers.errors import CheckpointError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
SMALL_FILES = (
    "config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model*",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece*.model", "*.tiktoken", "tekken.json", "chat_template.json*", "chat_template.jinja",
    "additional_chat_templates/*.jinja", "generation_config.json", "*processor_config.json",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


HEADERS_AT_ONCE = 8


def fetch(name: str, files: Sequence[str] = SMALL_FILES, revision: str | None = None) -> Path:
    """The snapshot's folder, with those of ``files`` (names or patterns) that there are. Raises CheckpointError."""
    from huggingface_hub import snapshot_download

    with _errors(name):
        return Path(snapshot_download(name, allow_patterns=list(files), revision=revision))


def headers(name: str, files: Sequence[str], revision: str) -> dict[str, dict[str, Any]]:
    """Of each safetensors file its tensors, as its header has them. No weights are downloaded: a header is the first
    bytes of its file. Raises CheckpointError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    api = HfApi()

    def header(file: str) -> dict[str, Any]:
        try:
            found = api.parse_safetensors_file_metadata(name, file, revision=revision)
        except SafetensorsParsingError as error:
            raise CheckpointError(
                f"{file} of {name} has a malformed header ({error}).", "Choose another revision, or another model."
            ) from error
        return {
            tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
            for tensor, info in found.tensors.items()
        }

    with _errors(name), ThreadPoolExecutor(HEADERS_AT_ONCE, "headers") as pool:
        return dict(zip(files, pool.map(header, files), strict=True))


def downloads_to(folder: Path) -> bool:
    """Whether what is downloaded lands on the disk of ``folder``."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).absolute()
    there = next(place for place in (cache, *cache.parents) if place.exists())
    return there.stat().st_dev == folder.stat().st_dev


@contextmanager
def _errors(name: str) -> Iterator[None]:
    """Turns what goes wrong between here and the hub into a CheckpointError."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # the first base is the HTTP library's own error; which library depends on the version
    known: Any = (HfHubHTTPError.__bases__[0], HFValidationError, OSError)
    try:
        yield
    except known as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"There is no folder {name}, and the hub did not give a model of that id: {reason}",
            "Check the name and the network; for a model behind a licence, log in with `hf auth login`.",
        ) from error
