"""Read config.json of a model directory, and refuse one that could make transformers run code or read other files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moetier.tiers.errors import StoreFormatError, UnsafeCheckpointError
from moetier.tiers.store.folder import read_json, remaking

ADAPTER = "adapter_config.json"  # makes transformers load another model
NAME = "moetier"  # in config.json, the name of moetier's quantisation method and experts implementation

# Keys that make transformers run code, fetch kernels, read other files, or expect another quantisation.
NOT_CARRIED = (
    "auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal", "fusion_config",
    "kernel_config", "transformers_weights", "quantization_config", "compression_config", "configuration_files",
)  # fmt: skip


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config of a model directory.

    Raises StoreFormatError if moetier did not make the folder. Raises UnsafeCheckpointError for a key in NOT_CARRIED,
    which moetier never writes, and for an adapter_config.json.
    """
    path = folder / "config.json"
    if not path.exists():
        raise StoreFormatError(f"{folder} has no config.json.", remaking(path))
    config = read_json(path)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != NAME:
        raise StoreFormatError(f"{path} does not name moetier as its quantisation method.", remaking(path))
    others = {name: value for name, value in config.items() if name != "quantization_config"}
    if others.get("experts_implementation") == NAME:
        del others["experts_implementation"]
    if name := next(_not_carried(others), None):
        raise UnsafeCheckpointError(
            f"{path} has {name}, which can make transformers run code or read files from elsewhere.",
            "Don't use this directory, as moetier writes no such key. Convert the model again.",
        )
    if (folder / ADAPTER).exists():
        raise UnsafeCheckpointError(
            f"{folder} has an {ADAPTER}, which can make transformers load another model in its place.",
            f"Remove {ADAPTER} from this directory, or use another directory.",
        )
    return config


def _not_carried(value: object) -> Iterator[str]:
    """Yield the keys of NOT_CARRIED at any depth, unless their value is null."""
    if isinstance(value, dict):
        yield from (name for name, entry in value.items() if name in NOT_CARRIED and entry is not None)
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from _not_carried(entry)


def carried(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the keys NOT_CARRIED, at any depth of dictionaries and lists."""
    return {name: _carried_in(value) for name, value in config.items() if name not in NOT_CARRIED}


def _carried_in(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return list(map(_carried_in, value))
    return carried(value) if isinstance(value, Mapping) else value


def with_floats(config: Mapping[str, Any]) -> Any:
    """Return the config with infinities and NaNs as floats; transformers writes them as {"__float__": "Infinity"}."""
    tag = {"__float__"}
    return json.loads(json.dumps(config), object_hook=lambda d: float(d["__float__"]) if d.keys() == tag else d)
