"""Download a checkpoint from the Hugging Face hub.

Code and pickles are never downloaded. The library huggingface_hub does all of HTTP: tokens, mirrors (HF_ENDPOINT),
retries, offline mode. Small files are kept in its cache, where they are found later without a network.
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
from moetier.tiers.redaction import redacted, redacted_error
from moetier.tiers.small_names import DOWNLOADED

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
UNRESUMABLE = re.compile(r"\.[0-9a-f]{8}\.incomplete$")  # partial downloads that huggingface_hub 2 never resumes
HEADERS_AT_ONCE = 8
FOR_A_PLAN = " For moetier plan, a folder with the model's config.json and model.safetensors.index.json is enough."


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """Size of a file on the hub, and its ``sha256``; None for a small file."""

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
            f"{redacted(name)!r} is not an id on the Hugging Face hub.",
            "Give an id such as openai/gpt-oss-20b. Choose the number of bits with --bits, not in the name.",
        ) from redacted_error(error)


def fetch(
    name: str, files: Sequence[str] = DOWNLOADED, revision: str | None = None, *, or_folder: bool = False
) -> Path:
    """Download those of ``files`` (names or patterns) that the model ``name`` has. Return the snapshot's folder.

    Raises CheckpointError if the hub can't be reached or refuses. ``or_folder``: whether the error also says that there
    is no folder called ``name``.
    """
    from huggingface_hub import snapshot_download

    with _errors(name, or_folder=or_folder):
        return Path(snapshot_download(name, allow_patterns=list(files), revision=revision))


def listing(name: str, revision: str) -> dict[str, RemoteFile]:
    """Return a dictionary from the names of all files of a revision to their sizes and hashes.

    Raises CheckpointError if the hub can't be reached or refuses.
    """
    from huggingface_hub import HfApi

    with _errors(name, "the list of files"):
        siblings = HfApi().model_info(name, revision=revision, files_metadata=True).siblings or ()
    return {
        sibling.rfilename: RemoteFile(sibling.size, None if sibling.lfs is None else sibling.lfs.sha256)
        for sibling in siblings
        if sibling.size is not None
    }


def cached(name: str, file: str, revision: str) -> Path | None:
    """Return the path of ``file`` in huggingface_hub's cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, file, revision=revision)
    return Path(path) if isinstance(path, str) else None


def download(name: str, file: str, revision: str, into: Path | None, advance: Callable[[int], None]) -> Path:
    """Download one file into the folder ``into``, or into the cache if ``into`` is None, and return its path.

    ``advance`` is called repeatedly with the number of bytes that have arrived since the last call. Raises
    CheckpointError if the hub can't be reached or refuses.
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
    """Return a dictionary from safetensors files to their headers, which are dictionaries from tensors to entries.

    An entry has the keys dtype, shape and data_offsets. Only the headers are downloaded. Raises CheckpointError if the
    hub can't be reached or refuses, and for a malformed header.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    api = HfApi()

    def header(file: str) -> dict[str, Any]:
        try:
            with _errors(name, file):
                metadata = api.parse_safetensors_file_metadata(name, file, revision=revision)
        except SafetensorsParsingError as error:
            raise CheckpointError(
                f"{file} of {name} has a malformed header ({error}).", "Choose another revision, or another model."
            ) from error
        return {
            tensor: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
            for tensor, info in metadata.tensors.items()
        }

    with ThreadPoolExecutor(HEADERS_AT_ONCE, "moetier-headers") as pool:
        return dict(zip(files, pool.map(header, files), strict=True))


def cache_folder() -> Path:
    """Return huggingface_hub's cache, which need not exist."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).absolute()


@contextmanager
def _errors(name: str, what: str | None = None, *, or_folder: bool = False) -> Iterator[None]:
    """Turn errors of the network and of the hub into a CheckpointError. Errors of the local disk stay as they are.

    The CheckpointError says that the hub did not give ``what`` of the model ``name``; without ``what``, that it did not
    give the model.
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
    error_classes: Any = (HfHubHTTPError.__bases__[0], HFValidationError, OSError)
    try:
        yield
    except error_classes as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise  # the disk's error, not the hub's
        reason = redacted(str(error)).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        reason = reason.removeprefix("Got: ")  # huggingface_hub puts this before messages of its HTTP library
        causes = (error, error.__cause__)
        fix = "Check the name and the network; for a model behind a licence, log in with `hf auth login`."
        if "/" not in name:  # more likely a folder than an id
            fix = "Check the name of the folder, or, for a model on the hub, the id (ORG/NAME) and the network."
        if any(isinstance(exception, GatedRepoError) for exception in causes):
            reason = "it is open only to users who log in or accept its licence."
            fix = f"Accept its terms at {redacted(constants.ENDPOINT)}/{name}, then log in with `hf auth login`."
        elif any(isinstance(exception, RevisionNotFoundError) for exception in causes):
            reason, fix = "it has no such revision.", "Name one of its branches, tags or commits with --revision."
        elif any(isinstance(exception, OfflineModeIsEnabled) for exception in causes):
            fix = "Unset HF_HUB_OFFLINE, and check the network."
        elif what is not None:
            fix = "Check the network, and run the same command again: it resumes where it stopped."
        answered = isinstance(error, HFValidationError) or any(
            getattr(exception, "response", None) for exception in causes
        )
        name = redacted(name)
        asked = f"{what} of {name}" if what is not None else f"a model with the id {name}"
        cause = f"The hub did not give {asked}" if answered else f"The hub could not be reached for {asked}"
        if or_folder:
            cause += ", and there is no such folder"
            fix += "" if answered else FOR_A_PLAN
        raise CheckpointError(f"{cause}: {reason}", fix) from redacted_error(error)
