"""``register``: transformers' from_pretrained loads model directories and, with options, checkpoints as they are."""

from __future__ import annotations

import copy
import functools
import os
import threading
import warnings
from pathlib import Path
from typing import Any, Unpack

from transformers import PreTrainedConfig, PreTrainedModel

from moetier.runtime.checkpoint.blueprint import supported_types
from moetier.runtime.checkpoint.config_json import NAME
from moetier.runtime.checkpoint.model_config import config_of, is_checkpoint
from moetier.runtime.config import TierConfig, TierOptions
from moetier.runtime.libraries.transformers_internals import experts_function_of
from moetier.runtime.stores.checkpoint_store import check_shards
from moetier.runtime.stores.registry import read_manifest
from moetier.tiers.errors import MoetierError

from . import quantizer
from .load import model_of

_lock = threading.Lock()  # held while ``from_pretrained`` is replaced


def register(**options: Unpack[TierOptions]) -> None:
    """Let ``AutoModelForCausalLM.from_pretrained(DIR)`` of transformers, and what calls it, load model directories.

    With options it also takes the experts of a checkpoint, in safetensors or GGUF, from the tiers, if the checkpoint is
    on this machine and can be used as it is. Otherwise a warning says so, and transformers loads all experts, as it
    does if ``from_pretrained`` is given an ``experts_implementation``. Dense models are loaded as ever.

    Args:
        options: those of ``load`` except ``device``, ``dtype`` and ``attn_implementation``. They apply to all models
            that are loaded in this way from now on, and override those in a config.json. A later call replaces them.
            The ``device_map`` of ``from_pretrained`` says where a model is computed.

    Raises:
        ConfigError: an option can't be used.
    """
    TierConfig.of(**options)
    quantizer.install()
    quantizer.set_options(options)
    if options:
        _serve_checkpoints()


def _serve_checkpoints() -> None:
    """Replace ``PreTrainedModel.from_pretrained`` by a function that also takes experts from the tiers. Idempotent."""
    with _lock:
        ordinary: Any = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]  # a class method
        if hasattr(ordinary, "__wrapped__") and ordinary.__module__ == __name__:
            return

        @functools.wraps(ordinary, assigned=("__name__", "__qualname__", "__doc__"))
        def from_pretrained(cls: Any, name: Any = None, *arguments: Any, **named: Any) -> Any:
            location = _checkpoint_of(cls, name, named)
            if location is None:
                return ordinary(cls, name, *arguments, **named)
            dtype = named.pop("dtype", None) or named.pop("torch_dtype", None) or "auto"
            config = _config(cls, location, named.pop("config", None))
            named.pop("gguf_file", None)
            tier_config = TierConfig.of(**quantizer.options())
            return model_of(location, config, tier_config, dtype, functools.partial(ordinary, cls), *arguments, **named)

        PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment]


def _checkpoint_of(cls: Any, name: Any, named: dict[str, Any]) -> Path | None:
    """Return the checkpoint that a call of from_pretrained loads, if its experts are to come from the tiers.

    Return None for any other model. If it has experts, and the options of ``register`` have no effect, warn.
    """
    if not quantizer.options() or quantizer.is_loading() or name is None or named.get("state_dict") is not None:
        return None
    config = named.get("config")
    if named.get("experts_implementation") or experts_function_of(config) or named.get("quantization_config"):
        return None  # the caller has chosen how to compute or to quantise
    if not cls.__module__.startswith("transformers.") or cls.config_class.model_type not in _types_with_experts():
        return None
    location = Path(os.fspath(name), named.get("subfolder") or "", named.get("gguf_file") or "")
    try:
        if not location.exists():
            if not _is_converted(config):
                _warn(f"{name} is not in a folder of this machine.", "Download it, and give its folder.")
            return None
        if not is_checkpoint(location):
            return None
        read_manifest(location)
        config_of(location)
        check_shards(location)
    except MoetierError as error:
        _warn(error.cause, error.fix)
        return None
    return location


@functools.cache
def _types_with_experts() -> frozenset[str]:
    return frozenset(supported_types())


def _is_converted(config: Any) -> bool:
    """Return whether a config is that of a model directory, which may be on the hub."""
    quantization = getattr(config, "quantization_config", None) or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    return bool(method == NAME)


def _warn(cause: str, fix: str) -> None:
    given = ", ".join(f"{name}={value!r}" for name, value in quantizer.options().items())
    warnings.warn(
        f"register({given}) has no effect on this model, and all its experts are loaded: {cause} {fix}",
        RuntimeWarning,
        stacklevel=4,
    )


def _config(cls: Any, location: Path, given: Any) -> Any:
    """Return the config of a checkpoint as that of a model directory. Changes that the caller made to it stay."""
    config_json = config_of(location)
    if location.is_file() or not isinstance(given, PreTrainedConfig):
        return cls.config_class.from_dict(config_json)
    config = copy.deepcopy(given)
    config.quantization_config = config_json["quantization_config"]
    return config
