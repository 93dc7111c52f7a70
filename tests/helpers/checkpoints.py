"""Tiny random checkpoints of real architectures, saved by transformers in the form in which they are published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor


def save_checkpoint(
    folder: Path, model_type: str = "mixtral", *, dtype: torch.dtype = torch.bfloat16, shards: int = 3
) -> Path:
    """``shards`` is about how many files there will be."""
    model = tiny_model(model_type, dtype)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // shards + 1 if shards > 1 else "50GB")
    return folder


def ordinary_model(folder: Path) -> Any:
    """The checkpoint as transformers itself loads it."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder, experts_implementation="eager")


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; those that become None go."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: entry for name, entry in value.items() if entry is not None}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Changes the tensors of a checkpoint of one shard."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
