"""Download a checkpoint from the Hugging Face hub: small files first, and weights only after these were checked.

Code and pickles are never downloaded. huggingface_hub does all of HTTP: tokens, mirrors (HF_ENDPOINT), retries, offline
mode. Small files are kept in its cache, where they are found later without a network.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
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
UNRESUMABLE = re.compile(r"\.[0-9a-f]{8}\.incomplete$")  # partial downloads that huggingface_hub 2 never resumes
HEADERS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """Size of a file on the hub, and the ``sha256`` of a large one."""

    size: int
    sha256: str | None


def check_id(name: str) -> None:
    """Raise CheckpointError for a name that can't be an id on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it has no __all__

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise CheckpointError(
            f"{name!r} is no id of the Hugging Face hub.", "Give one, such as ORG/NAME; a width is chosen with --bits."
        ) from error


def fetch(
    name: str, files: Sequence[str] = SMALL_FILES, revision: str | None = None, *, or_folder: bool = False
) -> Path:
    """Download those of ``files`` (names or patterns) that exist, and return the snapshot's folder.

    Raises CheckpointError. ``or_folder``: whether errors should say that ``name`` may have been meant as a folder.
    """
    from huggingface_hub import snapshot_download

    with _errors(name, or_folder=or_folder):
        return Path(snapshot_download(name, allow_patterns=list(files), revision=revision))


def listing(name: str, revision: str) -> dict[str, RemoteFile]:
    """Return all files of a revision, by name. Raises CheckpointError."""
    from huggingface_hub import HfApi

    with _errors(name, "the list of files"):
        found = HfApi().model_info(name, revision=revision, files_metadata=True).siblings or ()
    return {
        each.rfilename: RemoteFile(each.size, None if each.lfs is None else each.lfs.sha256)
        for each in found
        if each.size is not None
    }


def cached(name: str, file: str, revision: str) -> Path | None:
    """Return the file's path in huggingface_hub's cache; None if it was not downloaded there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def download(name: str, file: str, revision: str, into: Path | None, advance: Callable[[int], None]) -> Path:
    """Download one file into the folder ``into``, or into the cache if that is None, and return its path.

    ``advance`` is called repeatedly with the number of bytes that have come since. Raises CheckpointError.
    """
    from huggingface_hub import hf_hub_download
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        """A progress bar that shows nothing and calls ``advance``."""

        def __init__(self, *_: object, **__: object) -> None:
            super().__init__(disable=True)

        def update(self, n: float | None = 1) -> bool | None:
            advance(int(n or 0))
            return None

    if into is not None:
        for partial in into.rglob("*.incomplete"):  # left by a process that was killed
            if UNRESUMABLE.search(partial.name):
                partial.unlink()
    with _errors(name, file):
        return Path(hf_hub_download(name, file, revision=revision, local_dir=into, tqdm_class=Bar))


def headers(name: str, files: Sequence[str], revision: str) -> dict[str, dict[str, Any]]:
    """Return, by file, the tensors that the header of each safetensors file lists. Raises CheckpointError.

    Only the headers, at the beginning of the files, are downloaded.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    api = HfApi()

    def header(file: str) -> dict[str, Any]:
        try:
            with _errors(name, file):
                found = api.parse_safetensors_file_metadata(name, file, revision=revision)
        except SafetensorsParsingError as error:
            raise CheckpointError(
                f"{file} of {name} has a malformed header ({error}).", "Choose another revision, or another model."
            ) from error
        return {
            tensor: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
            for tensor, info in found.tensors.items()
        }

    with ThreadPoolExecutor(HEADERS_AT_ONCE, "headers") as pool:
        return dict(zip(files, pool.map(header, files), strict=True))


def cache_folder() -> Path:
    """Return huggingface_hub's cache, which need not exist."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).absolute()


@contextmanager
def _errors(name: str, what: str | None = None, *, or_folder: bool = False) -> Iterator[None]:
    """Turn errors of the network and the hub into a CheckpointError, which says that the hub did not give ``what``.

    Without ``what``, it says that of the model ``name``. Errors of the local disk are not turned.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    # the first base class is the error of the HTTP library, which depends on huggingface_hub's version
    known: Any = (HfHubHTTPError.__bases__[0], HFValidationError, OSError)
    try:
        yield
    except known as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise  # the disk's error, not the hub's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        reason = reason.removeprefix("Got: ")  # huggingface_hub puts this before messages of its HTTP library
        causes = (error, error.__cause__)
        fix = "Check the name and the network; for a model behind a licence, log in with `hf auth login`."
        if "/" not in name:  # more likely a folder than an id
            fix = "Check the folder's name; of a model on the hub its name (ORG/NAME) and the network."
        if any(isinstance(each, GatedRepoError) for each in causes):
            reason = "it is behind a licence, or asks who you are."
            fix = f"Accept its terms at {constants.ENDPOINT}/{name}, then log in with `hf auth login`."
        elif any(isinstance(each, RevisionNotFoundError) for each in causes):
            reason, fix = "it has no such revision.", "Name a branch, a tag or a commit of it with --revision."
        elif any(isinstance(each, OfflineModeIsEnabled) for each in causes):
            fix = "Unset HF_HUB_OFFLINE, and see that there is a network."
        elif what is not None:
            fix = "Check the network, and run the same command again: it resumes where it stopped."
        answered = isinstance(error, HFValidationError) or any(getattr(each, "response", None) for each in causes)
        wanted = f"{what} of {name}" if what is not None else f"a model of the id {name}"
        cause = f"The hub did not give {wanted}" if answered else f"The hub could not be reached for {wanted}"
        if or_folder:
            cause += ", and there is no such folder"
        raise CheckpointError(f"{cause}: {reason}", fix) from error
