"""``load``: the model and the tokenizer of a model directory.

The calls of a load, in order:

1. ``load`` checks the options, and ``_load`` checks the files and reads the tokenizer
2. ``model_of`` puts options and files into ``LoadArguments`` (``quantizer.py``), which a ContextVar keeps: transformers
   calls the quantiser without arguments of moetier's
3. transformers' ``from_pretrained`` builds the model on the meta device, and calls ``MoetierQuantizer``: before it
   reads weights, to remove the experts' parameters, and afterwards
4. ``attach_tiers`` (``attach.py``) then calls ``Tiers.open`` (``tiers.py``), and this ``open_origin`` (``sources.py``),
   which opens the host tier
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moetier.runtime.checkpoint.containers import container_of, open_checkpoint
from moetier.runtime.checkpoint.model_config import config_of, is_checkpoint
from moetier.runtime.config import CACHE, TIER_OPTIONS, LoadOptions, TierConfig
from moetier.runtime.devices.device import chosen_device
from moetier.runtime.stores.checkpoint_store import check_shards
from moetier.runtime.stores.registry import read_manifest
from moetier.tiers.closeable import closed_on_error
from moetier.tiers.errors import ConfigError, StoreFormatError, UnsupportedModelError
from moetier.tiers.fields import shown
from moetier.tiers.options import declare_keywords, read_all
from moetier.tiers.store.folder import check_directory, parse_json, remaking
from moetier.tiers.store.trunk import check_trunk
from moetier.tiers.text import some

from .context import longest_context
from .load_errors import MISFIT, bar_only_on_a_terminal, load_errors, report_held_back
from .names import directory_at, is_address, model_directory, note_use_of
from .quantizer import LoadArguments, install, loading
from .trunk_files import TrunkFiles
from .vocabulary import check_tokenizer

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class LoadedModel(NamedTuple):
    """Pair of a model and its tokenizer, which ``load`` returns. As a context manager, it closes the model's tiers."""

    model: Any
    tokenizer: PreTrainedTokenizerBase | None

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.model.tiers.close()


def load(
    directory: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    store_cache: str | os.PathLike[str] | None = None,
    store_cache_size: str | int | None = None,
    **options: Unpack[LoadOptions],
) -> LoadedModel:
    """Load the model and the tokenizer of a model directory. The model's class is the one that its config.json names.

    The trunk is read at once, experts when they are first needed. Code in the directory is never run, and nothing
    outside the directory is read.

    If daemons compute experts, hidden states go to them. The results have the same bits if the daemons are honest: they
    can't be checked, as records are. Unless ``exact`` is true, quantised experts are multiplied as they are stored, on
    a CPU with activations rounded to 8 bits. (transformers' default, "grouped_mm", rounds differently.) If memory has
    no room for ``prefill_chunk`` tokens, a warning says so, and ``model.tiers.prefill_chunk`` is smaller.
    ``generate()`` computes a whole prompt together unless it is given that number as ``prefill_chunk_size``. For a
    model that can't divide a prompt, the number is that of the longest prompt that has room.

    Args:
        directory: the folder of the model, a GGUF file, a name that `moetier list` shows, or the address of a model in
            an object store: s3://, gs://, az://, https:// or file://. The experts of a model at an address are fetched
            when they are first needed.
        options: the options of ``TierConfig``, from the declarations of which this list is made when it is imported.
        dtype: the type in which the trunk is computed: torch.bfloat16, float16 or float32, or the name of one of these;
            "auto": the type that config.json names.
        attn_implementation: as in from_pretrained. By default, moetier's own function computes the attention of single
            tokens on a CPU, in place of "sdpa" and of the functions of models with attention sinks.

    Returns:
        The model and its tokenizer (None if it has none), as a pair. The tiers are ``model.tiers``: ``stats()`` returns
        their counters, ``where`` says where the experts come from, and ``close()`` closes them. They are also closed at
        the end of ``with load(...) as (model, tokenizer)``, and when the model is garbage-collected.

    Raises:
        MoetierError: an option, the directory or the machine can't be used.
    """
    if is_address(name := os.fspath(directory)):
        cache = read_all(CACHE, {"store_cache": store_cache, "store_cache_size": store_cache_size})
        location = directory_at(name, *cache.values())
    else:
        location = model_directory(directory)
    model = _load(location, TierConfig.of(**options), _dtype(dtype), _attention(attn_implementation))
    note_use_of(location)
    return model


def _load(location: Path, tier_config: TierConfig, dtype: str | torch.dtype, attention: str | None) -> LoadedModel:
    """Load the model and the tokenizer at ``location``, with checked options. Raises MoetierError."""
    config_json, model_class = _checked_config(location)
    device = chosen_device(tier_config.device)
    install()
    tokenizer = container_of(location).tokenizer(location)
    with load_errors(location):
        config_class = model_class.config_class
        config = (
            config_class.from_dict(config_json) if is_checkpoint(location) else config_class.from_pretrained(location)
        )
    if tokenizer is not None and (most := longest_context(config)) is not None:
        # many tokenizers state no maximum length; with one, transformers warns of longer texts
        tokenizer.model_max_length = min(tokenizer.model_max_length, most)
    with load_errors(location), report_held_back(), bar_only_on_a_terminal():
        model = model_of(
            location,
            config,
            tier_config,
            dtype,
            model_class.from_pretrained,
            device_map={"": str(device.torch_device)} if device.has_memory else None,
            attn_implementation=attention,
        )
        with closed_on_error(model.tiers):
            if attention is not None:  # not what has replaced it
                model.set_attn_implementation(attention)
            if tokenizer is not None:
                check_tokenizer(model, tokenizer, location)
    return LoadedModel(model, tokenizer)


def _checked_config(location: Path) -> tuple[dict[str, Any], Any]:
    """Return the config.json of a model and its class, once the files are checked. Raises MoetierError."""
    check_directory(location)
    manifest, config_json = read_manifest(location), config_of(location)
    texts = {name: value for name, value in config_json.items() if isinstance(value, str)}
    config_path = location if location.is_file() else location / "config.json"
    _check_token_ids(texts, config_path, remaking(config_path, "Copy the file from the source again."))
    _check_generation_config(location / "generation_config.json")
    model_class = _model_class(config_json)
    if is_checkpoint(location):
        check_shards(location)
    else:
        check_trunk(location, manifest)
    return config_json, model_class


def _check_generation_config(path: Path) -> None:
    """Raise StoreFormatError if transformers would fail at the file or its token ids. It ignores what is not JSON."""
    fix = remaking(path, "Copy the file from the source again, or remove it.")
    try:
        data = path.read_bytes()
        with contextlib.suppress(RecursionError):
            json.loads(data)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return
    except ValueError as error:  # an integer has thousands of digits
        raise StoreFormatError(f"{path} can't be read: {error}.", fix) from error
    _check_token_ids(parse_json(data, str(path), fix, limit=len(data)), path, fix)


def _check_token_ids(values: Mapping[str, Any], path: Path, fix: str) -> None:
    """Raise StoreFormatError if a special token's id, among the ``values`` from the file ``path``, is no number."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = values.get(name)
        several = value if isinstance(value, list) and name != "pad_token_id" else [value]
        if not all(each is None or isinstance(each, int | float) for each in several):
            raise StoreFormatError(f"{path}: {name} is {shown(value)}, not the id of a token.", fix)


def model_of(
    location: Path,
    config: Any,
    tier_config: TierConfig,
    dtype: Any,
    load: Callable[..., Any],
    *arguments: Any,
    **named: Any,
) -> Any:
    """Return the model of a model directory, or of a checkpoint as it is, with tiers.

    Args:
        location: its model directory, checkpoint folder or GGUF file.
        tier_config: the options of its tiers.
        config: transformers' config, made of ``config_of(location)``.
        dtype: the type in which the trunk is computed, or "auto".
        load: from_pretrained of the model's class, which gets the ``arguments`` and ``named`` too.

    Raises the errors of transformers, those of ``Checkpoint.trunk`` and ``TrunkFiles``, and StoreFormatError if the
    trunk lacks tensors, which transformers would fill with random numbers.
    """
    chosen = _dtype(dtype)
    files = TrunkFiles(location, container_of(location).weight_files(location)) if is_checkpoint(location) else None
    with files.for_load() if files else contextlib.nullcontext():
        own = getattr(config, "dtype", None) if chosen == "auto" else chosen
        # config_of has refused code unless link ignored it
        trunk = open_checkpoint(location, ignore_code=True).trunk(own) if files else None
        source = {} if trunk is None else {"state_dict": trunk.tensors}
        wants_info = named.get("output_loading_info", False)
        named = named | {"config": config, "dtype": chosen, "use_safetensors": True} | source
        named["output_loading_info"] = True
        with loading(LoadArguments(tier_config, location, files, trunk)):
            model, info = load(location if trunk is None else None, *arguments, **named)
        with closed_on_error(model.tiers):
            if lacking := info["missing_keys"]:
                raise StoreFormatError(f"{location} can't be loaded: it has no tensor for {some(lacking)}.", MISFIT)
            if trunk is not None and location.is_dir():
                _name_after(model, location)
    return (model, info) if wants_info else model


def _name_after(model: PreTrainedModel, location: Path) -> None:
    """Note the folder's name in a model and read its generation config, as from_pretrained does for a folder."""
    model.name_or_path = model.config.name_or_path = str(location)
    model.adjust_generation_fn(  # type: ignore[operator]  # transformers types it as a tensor
        generation_config=None,
        from_auto_class=None,
        from_pipeline=None,
        pretrained_model_name_or_path=location,
        cache_dir=None,
        force_download=False,
        proxies=None,
        local_files_only=True,
        token=None,
        revision="main",
        subfolder="",
        trust_remote_code=False,
    )


declare_keywords(load, TIER_OPTIONS, CACHE)


def _dtype(dtype: object) -> str | torch.dtype:
    """Return the option ``dtype`` as "auto" or a type of torch. Raises ConfigError for a type that is not supported."""
    if dtype == "auto":
        return "auto"
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    for candidate in DTYPES:
        if named is candidate:
            return candidate
    names = ", ".join(str(supported).removeprefix("torch.") for supported in DTYPES)
    raise ConfigError(f"`dtype` is {dtype!r}.", f'Give "auto" or one of {names}, as a text or as a torch.dtype.')


def _attention(name: object) -> str | None:
    """Return the name of an attention implementation. Raises ConfigError if transformers does not have it."""
    implementations = ["eager", *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in key)]
    if name is None or (isinstance(name, str) and name in implementations):
        return name
    raise ConfigError(f"`attn_implementation` is {name!r}.", f"Give one of {', '.join(sorted(implementations))}.")


def _model_class(config: dict[str, Any]) -> Any:
    name = next(iter(config.get("architectures") or []), None)
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise UnsupportedModelError(
            f"config.json names the architecture {name!r}; transformers {transformers.__version__} does not have it.",
            f"Upgrade moetier: this transformers lacks {name}.",
        )
    return model_class
