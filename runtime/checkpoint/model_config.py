"""The config of a model: a model directory has one, and one is made for a checkpoint that is used as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moetier.tiers.manifest import FORMAT
from moetier.tiers.store.folder import GROUP

from .config_json import NAME, read_config
from .containers import container_of, is_one_file
from .safetensors_folder import INDEX, WEIGHTS, read_json


def is_checkpoint(folder: Path) -> bool:
    """Return whether a path is a GGUF file, or a folder that holds a checkpoint in safetensors, and no store.

    A model directory whose store is missing is no checkpoint.

    Raises CheckpointError or UnsafeCheckpointError for a config.json that can't be read.
    """
    if is_one_file(folder):
        return True
    there = (folder / "config.json").is_file() and any((folder / name).is_file() for name in (WEIGHTS, INDEX))
    if not there or (folder / GROUP).is_dir():
        return False
    quantization = read_json(folder, "config.json").get("quantization_config")
    return not (isinstance(quantization, dict) and quantization.get("quant_method") == NAME)


def config_of(folder: Path) -> dict[str, Any]:
    """Return the config of the model at ``folder``.

    For a checkpoint, it has the quantization_config that its model directory would have.

    Raises StoreFormatError, UnsafeCheckpointError, UnsupportedModelError or CheckpointError.
    """
    if not is_checkpoint(folder):
        return read_config(folder)
    as_it_is = {"quantization_config": {"quant_method": NAME, "format": FORMAT, "bits": 16}}
    return container_of(folder).config(folder) | as_it_is
