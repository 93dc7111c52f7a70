"""Loading a model directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moetier.tiers.errors import ConfigError, StoreFormatError, UnsafeCheckpointError, UnsupportedModelError
from moetier.tiers.folder import read_manifest, store_folder

from .config import TierConfig
from .registration import NAME, register

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
) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """The model of a model directory, of the class that its config.json names, and its tokenizer (None if it has none).

    Reads the trunk; experts are read when they are wanted. ``ram`` and ``device_memory`` are what experts may take:
    "6GiB", "50%", or a number of bytes; without them 80 % of what the trunk and the KV cache leave. ``device`` is
    "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N". ``model.tiers`` has the statistics, and ``close()``,
    which happens by itself when the model is gone. Never runs code that a checkpoint brings. Raises MoetierError.
    """
    folder = Path(directory)
    asked = TierConfig.of(ram=ram, device_memory=device_memory, device=device)
    store = store_folder(folder)
    read_manifest(store)
    model_class = _model_class(_read_config(folder))
    register()
    config = model_class.config_class.from_pretrained(folder)
    config.quantization_config = {**config.quantization_config, "ram": ram, "device_memory": device_memory}
    device_map = None if (place := _place(asked.device)) == "cpu" else {"": place}
    model = model_class.from_pretrained(folder, config=config, device_map=device_map)
    return model, _tokenizer(folder)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StoreFormatError(f"{folder} has no config.json.", "Convert the model again.") from None
    except ValueError as error:
        raise StoreFormatError(f"{path} is not JSON ({error}).", "Convert the model again.") from error
    if not isinstance(config, dict) or (config.get("quantization_config") or {}).get("quant_method") != NAME:
        raise StoreFormatError(f"{path} does not name moetier as its quantisation method.", "Convert the model again.")
    if "auto_map" in config:
        raise UnsafeCheckpointError(
            f"{path} names code that the checkpoint brings (auto_map).",
            "Convert the model again: moetier runs no such code.",
        )
    return config


def _model_class(config: dict[str, Any]) -> Any:
    name = next(iter(config.get("architectures") or []), None)
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise UnsupportedModelError(
            f"config.json names the architecture {name!r}; transformers {transformers.__version__} does not have it.",
            "Install a moetier that is made for a transformers that has it.",
        )
    return found


def _place(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("This machine has no CUDA device that torch can use.", 'Give --device "cpu", or "auto".')
    return device


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer
