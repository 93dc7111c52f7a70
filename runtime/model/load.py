"""Load a model directory."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moetier.runtime.checkpoint.config_json import read_config
from moetier.runtime.config import OPTIONS, LoadOptions, TierConfig
from moetier.runtime.context import longest_context
from moetier.runtime.pulled import model_directory
from moetier.tiers.errors import ConfigError, StoreFormatError, UnsupportedModelError
from moetier.tiers.store.folder import check_directory, command, read_manifest, store_folder
from moetier.tiers.store.trunk import check_trunk

from .registration import asked_for, install

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)


def load(
    directory: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    **options: Unpack[LoadOptions],
) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """Load a model directory: the model, of the class that its config.json names, and its tokenizer.

    The trunk is read at once, experts when they are first needed. Code that a directory brings is never run, and
    nothing outside the directory is read.

    Args:
        directory: the folder of the model, or the name of a pulled model.
        ram: host memory for experts: "6GiB", "50%" of what trunk and context leave, or a number of bytes. Default:
            "80%".
        device_memory: likewise, GPU memory for experts.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        daemon: where experts come from: "auto": from a storage daemon of this user that serves this very store, else
            from this process's own tier; None or "none": from its own tier; a daemon's name, folder or HOST:PORT: from
            that daemon; several, separated by commas: each daemon has a share of the experts.
        credentials: token and certificates for daemons at HOST:PORT.
        policy: which experts are evicted first: "lru", the least recently used of a block; "scan", the same, but a long
            prompt leaves what is cached in place; "lrfu", as "scan", but the experts least often used recently.
        speculate: whether experts are loaded before they are needed, as the routers of the next layers predict from the
            present hidden state: "auto" (while it is measured to pay), "off" or "always". It does not change the text
            that a model generates.
        look_ahead: number of layers, after the present one, whose experts are predicted.
        prefetch: most experts of a block to load on a prediction. Default: as many as are worth it.
        learn: keep which experts are used most, in $XDG_CACHE_HOME/moetier, and read those of earlier runs at the
            start, in the background.
        loaders: number of experts that are read from the disk at a time.
        context: tokens of context that budgets leave room for. A longer context works where there is more memory.
        exact: compute bit for bit as the ordinary model does with the decoded weights and
            ``experts_implementation="eager"``, which is slower. Otherwise quantised experts are multiplied as they are
            stored, on a CPU with activations rounded to 8 bits. (transformers' default, "grouped_mm", rounds
            differently.)
        threads: number of threads to compute with, as in torch.set_num_threads: one number for the process. Default:
            OMP_NUM_THREADS, else torch's number, but at most the CPUs that this process may use, by affinity and by the
            quota of its control group.
        dtype: the type in which the trunk is computed: torch.bfloat16, float16 or float32, or the name of one; "auto":
            the type that config.json names.
        attn_implementation: as in from_pretrained. Without it, moetier's own function computes attention of single
            tokens on a CPU where the model would use "sdpa".

    Returns:
        The model and its tokenizer (None if it has none). ``model.tiers`` has the statistics, ``where`` the experts
        come from, and ``close()``, which happens by itself when the model is garbage-collected.

    Raises:
        MoetierError: for options, directories and machines that cannot be used.
    """
    folder = model_directory(directory)
    asked = TierConfig.of(**options)
    as_loaded = {"dtype": _dtype(dtype), "attn_implementation": _attention(attn_implementation)}
    check_directory(folder)
    manifest = read_manifest(store_folder(folder))
    model_class = _model_class(read_config(folder))
    check_trunk(folder, manifest)
    place = place_of(asked.device)
    install()
    tokenizer = _tokenizer(folder)
    with _load_errors(folder):
        config = model_class.config_class.from_pretrained(folder)
    if tokenizer is not None and (most := longest_context(config)) is not None:
        # many tokenizers state no maximum length; with one, transformers warns of longer texts
        tokenizer.model_max_length = min(tokenizer.model_max_length, most)
    device_map = None if place == "cpu" else {"": place}
    with _load_errors(folder), asked_for(asked), _bar_on_a_terminal_alone():
        model = model_class.from_pretrained(
            folder, config=config, device_map=device_map, use_safetensors=True, **as_loaded
        )
    return model, tokenizer


# the signature that editors and the documentation show: all options with their defaults
_keywords = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default) for name, option in OPTIONS.items()
]
_parameters = list(inspect.signature(load).parameters.values())
load.__signature__ = inspect.Signature([_parameters[0], *_keywords, *_parameters[1:-1]])  # type: ignore[attr-defined]


def _dtype(dtype: object) -> str | torch.dtype:
    """Return the option ``dtype`` as "auto" or a type of torch. Raises ConfigError for a type that is not supported."""
    if dtype == "auto":
        return "auto"
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    for found in DTYPES:
        if named is found:
            return found
    names = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
    raise ConfigError(f"`dtype` is {dtype!r}.", f'Give "auto" or one of {names}, as a text or of torch.')


def _attention(name: object) -> str | None:
    """Return the name of an attention implementation. Raises ConfigError if transformers does not have it."""
    known = ["eager", *(each for each in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in each)]
    if name is None or (isinstance(name, str) and name in known):
        return name
    raise ConfigError(f"`attn_implementation` is {name!r}.", f"Give one of {', '.join(sorted(known))}.")


@contextlib.contextmanager
def _bar_on_a_terminal_alone() -> Iterator[None]:
    """Disable transformers' progress bar where standard error is a file or a pipe."""
    log = transformers.utils.logging
    if not log.is_progress_bar_enabled() or (sys.stderr is not None and sys.stderr.isatty()):
        yield
        return
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.enable_progress_bar()


@contextlib.contextmanager
def _load_errors(folder: Path) -> Iterator[None]:
    """Turn transformers' errors into errors of this project.

    Files that can't be read, or that don't fit, raise StoreFormatError; a missing library raises ConfigError.
    """
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"{folder} can't be loaded so: {_said(error)}", "Install that, or load it otherwise."
        ) from error
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        raise StoreFormatError(
            f"{folder} can't be loaded: {_said(error)}",
            f"See what is wrong with it: {command('verify', folder)}; or convert the model again.",
        ) from error


def _said(error: Exception) -> str:
    """Format an error in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _model_class(config: dict[str, Any]) -> Any:
    name = next(iter(config.get("architectures") or []), None)
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise UnsupportedModelError(
            f"config.json names the architecture {name!r}; transformers {transformers.__version__} does not have it.",
            "Install a moetier that is made for a transformers that has it.",
        )
    return found


def place_of(device: str) -> str:
    """Resolve the option ``device`` to "cpu", "cuda" or "cuda:N". Raises ConfigError if torch has no CUDA device."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("This machine has no CUDA device that torch can use.", 'Set `device` to "cpu" or "auto".')
    return device


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise StoreFormatError(
            f"The tokenizer of {folder} can't be loaded: {_said(error)}",
            "Copy the tokenizer's files from the source again, or convert the model again.",
        ) from error
    return tokenizer
