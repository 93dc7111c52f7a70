"""Loading a model directory."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moetier.runtime.checkpoint.config_json import read_config
from moetier.runtime.config import AUTO, DEFAULT_CONTEXT, LOOK_AHEAD, TierConfig
from moetier.runtime.context import longest_context
from moetier.runtime.pulled import model_directory
from moetier.runtime.wire.address import Credentials
from moetier.tiers.cache.orders import DEFAULT_ORDER
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
    ram: str | int | None = None,
    device_memory: str | int | None = None,
    device: str = "auto",
    daemon: str | None = AUTO,
    credentials: Credentials | None = None,
    policy: str = DEFAULT_ORDER,
    speculate: str = "auto",
    look_ahead: int = LOOK_AHEAD,
    prefetch: int | None = None,
    learn: bool = False,
    context: int = DEFAULT_CONTEXT,
    exact: bool = False,
    threads: int | None = None,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """The model of a model directory, of the class that its config.json names, and its tokenizer (None if it has none).

    ``directory`` is its folder, or what a pulled model is called.

    Reads the trunk; experts are read when they are wanted. ``ram`` and ``device_memory`` are what experts may take:
    "6GiB", "50%", or a number of bytes; without them 80 % of what the trunk and the KV cache leave. ``device`` is
    "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".

    ``daemon`` says whose the experts are: "auto", those of a storage daemon of this user that runs and serves this very
    store, and otherwise this process's own; None or "none", its own; a daemon's name, folder or HOST:PORT, that one's;
    several, separated by commas: each has a share of the experts. ``credentials`` are for HOST:PORT.

    ``policy`` is who is evicted from memory first: "lru", the least recently used of a block; "scan", the same, but
    a long prompt leaves what is cached in place; or "lrfu", as "scan", but the least often used of late.

    ``speculate`` is whether experts of the next ``look_ahead`` layers are promoted before they are needed, as their
    gates guess from the present hidden state: "auto" (where it is measured to pay), "off" or "always". At most
    ``prefetch`` experts of a block are promoted on a guess; without it as many as are worth it. No text depends on it.

    ``learn`` keeps which experts are used most, in $XDG_CACHE_HOME/moetier, and begins with those of earlier runs: they
    are read in the background, into memory that is still empty.

    Of the memory that experts may take, what ``context`` tokens need is left out. A longer context works as well, where
    there is more memory than that.

    ``exact`` computes bit for bit as the ordinary model does with the decoded weights and
    ``experts_implementation="eager"``, and takes the time that it does; transformers' default, "grouped_mm", rounds
    otherwise. Else quantised experts are multiplied where they lie, on a CPU with what goes in rounded to 8 bits
    (``product.py``).

    ``threads`` is how many threads this process computes with, whichever model it is, as of torch.set_num_threads.
    Without it torch's own number stays, but no more than the CPUs that the process may use: a quota of its control
    group, as of a container with ``--cpus=2``, counts. A number that OMP_NUM_THREADS gives stays as it is.

    ``dtype`` is what the trunk is computed in, torch.bfloat16, float16 or float32, by itself or by name; "auto" is what
    config.json says. ``attn_implementation`` is as of from_pretrained; without it a CPU attends to new tokens with
    moetier's own function where the model would use "sdpa".

    ``model.tiers`` has the statistics, ``where`` the experts come from, and ``close()``, which happens by itself when
    the model is gone. Never runs code that a directory brings, and reads nothing from outside it. Raises MoetierError.
    """
    folder = model_directory(directory)
    asked = TierConfig.of(
        ram=ram,
        device_memory=device_memory,
        device=device,
        daemon=daemon,
        credentials=credentials,
        policy=policy,
        speculate=speculate,
        look_ahead=look_ahead,
        prefetch=prefetch,
        learn=learn,
        context=context,
        exact=exact,
        threads=threads,
    )
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
        # many tokenizers say nothing of a length; with one, transformers warns of texts that are longer
        tokenizer.model_max_length = min(tokenizer.model_max_length, most)
    device_map = None if place == "cpu" else {"": place}
    with _load_errors(folder), asked_for(asked), _bar_on_a_terminal_alone():
        model = model_class.from_pretrained(
            folder, config=config, device_map=device_map, use_safetensors=True, **as_loaded
        )
    return model, tokenizer


def _dtype(dtype: object) -> str | torch.dtype:
    """Raises ConfigError for what no model computes in."""
    if dtype == "auto":
        return "auto"
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    for found in DTYPES:
        if named is found:
            return found
    names = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
    raise ConfigError(f"`dtype` is {dtype!r}.", f'Give "auto" or one of {names}, as a text or of torch.')


def _attention(name: object) -> str | None:
    """Raises ConfigError for what transformers does not have."""
    known = ["eager", *(each for each in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in each)]
    if name is None or (isinstance(name, str) and name in known):
        return name
    raise ConfigError(f"`attn_implementation` is {name!r}.", f"Give one of {', '.join(sorted(known))}.")


@contextlib.contextmanager
def _bar_on_a_terminal_alone() -> Iterator[None]:
    """Without transformers' progress bar where standard error is a file or a pipe, in which it only leaves noise."""
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
    """Turns what transformers says of files that it can't read, or that don't fit, into a StoreFormatError; of a
    library that it lacks, into a ConfigError."""
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
    """In one line."""
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
    """Where a model is put: "cpu", "cuda" or "cuda:N". Raises ConfigError."""
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
    except Exception as error:  # the tokenizers library raises nothing more special
        raise StoreFormatError(
            f"The tokenizer of {folder} can't be loaded: {_said(error)}",
            "Copy the tokenizer's files from the source again, or convert the model again.",
        ) from error
    return tokenizer
