"""Tiny random checkpoints of real architectures, saved by transformers in the form in which they are published."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stores  # noqa: F401  # starts zarr's thread outside the tests
import torch
import transformers
from architectures import tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetier.runtime.checkpoint.safetensors_folder import WEIGHTS
from moetier.tiers.layout import ExpertKey
from moetier.tiers.quant.codec import sections
from moetier.tiers.store.reader import ShardStore

transformers.utils.logging.disable_progress_bar()  # tqdm's monitor is a thread that stays


def save_checkpoint(
    folder: Path, model_type: str = "mixtral", *, dtype: torch.dtype = torch.bfloat16, shards: int = 3
) -> Path:
    """``shards`` is about how many files there will be."""
    model = tiny_model(model_type, dtype)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // shards + 1 if shards > 1 else "50GB")
    return folder


def reshard(source: Path, folder: Path, files: int) -> Path:
    """The same checkpoint in so many files of about one size, tensors by their names: experts reach from one to the
    next. With one file there is no index."""
    tensors: dict[str, Tensor] = {}
    for path in source.glob("*.safetensors"):
        tensors |= load_file(path)
    size = sum(tensor.nbytes for tensor in tensors.values()) / files
    groups: list[dict[str, Tensor]] = [{} for _ in range(files)]
    done = 0
    for name in sorted(tensors):
        groups[min(int(done / size), files - 1)][name] = tensors[name]
        done += tensors[name].nbytes
    folder.mkdir()
    for path in source.glob("*.json"):
        if path.name != "model.safetensors.index.json":
            (folder / path.name).write_bytes(path.read_bytes())
    names = [f"model-{i:05}-of-{files:05}.safetensors" for i in range(1, files + 1)] if files > 1 else [WEIGHTS]
    for name, group in zip(names, groups, strict=True):
        save_file(group, folder / name, metadata={"format": "pt"})
    if files > 1:
        places = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
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


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stored_experts(folder: Path) -> dict[tuple[str, int], dict[str, Tensor]]:
    """Return the experts of a model directory of 16 bits: (path of the module, expert) -> its parameters, in order."""
    experts = {}
    with ShardStore.open(folder) as store:
        for block, entry in enumerate(store.manifest.blocks):
            layout = store.layout(block)
            for expert in range(entry.experts):
                buffer = mmap.mmap(-1, layout.slot_bytes)
                store.read_into(ExpertKey(block, expert), memoryview(buffer))
                experts[entry.path, expert] = sections(torch.frombuffer(buffer, dtype=torch.uint8), layout)
    return experts


def trunk_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a model directory's trunk, found by its index."""
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        tensors |= load_file(folder / name)
    assert tensors.keys() == places.keys()
    return tensors
