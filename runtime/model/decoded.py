"""The trunk of a quantised checkpoint that is used as it is. Its tensors are decoded when transformers reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from moetier.runtime.checkpoint.files import open_checkpoint
from moetier.runtime.formats.scaled import source_tensors
from moetier.runtime.formats.tensors import SourceTensor, StoredTensor

SPELLINGS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class Unread:
    """Quantised tensor that is decoded when it is read.

    It has those methods of a safetensors slice, a tensor that is not read yet, which transformers calls.
    """

    def __init__(self, tensor: SourceTensor) -> None:
        self._tensor = tensor

    def get_dtype(self) -> str:
        """Return safetensors' name of the type to which the tensor is decoded."""
        return SPELLINGS[self._tensor.dtype]

    def get_shape(self) -> list[int]:
        """Return the tensor's shape."""
        return list(self._tensor.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor.read()[index]


def decoded_weights(folder: Path, config: Any, dtype: str | torch.dtype) -> dict[str, Any] | None:
    """Return a dictionary from names to a checkpoint's tensors, to be read later; None if it is not quantised.

    Args:
        folder: the checkpoint.
        config: its config, by transformers.
        dtype: the type of the model, or "auto" for that of the config.

    Raises CheckpointError or UnsupportedModelError.
    """
    checkpoint = open_checkpoint(folder, ignore_code=True)  # config_of has refused code unless link ignored it
    if checkpoint.quantization is None:
        return None
    wanted = (getattr(config, "dtype", None) or checkpoint.first_dtype or "float32") if dtype == "auto" else dtype
    kept = str(wanted).removeprefix("torch.")
    tensors = source_tensors(checkpoint.tensors, checkpoint.quantization, kept, checkpoint.config)
    files: dict[Path, Any] = {
        file: safe_open(file, framework="pt")
        for file in {part.file for tensor in tensors.values() for part in tensor.parts}
    }
    return {
        name: files[tensor.file].get_slice(name) if isinstance(tensor, StoredTensor) else Unread(tensor)
        for name, tensor in tensors.items()
    }


def name_after(model: PreTrainedModel, folder: Path) -> None:
    """Note the folder's name in a model and read its generation config, as from_pretrained does for a folder."""
    model.name_or_path = model.config.name_or_path = str(folder)
    model.adjust_generation_fn(  # type: ignore[operator]  # transformers types it as a tensor
        generation_config=None,
        from_auto_class=None,
        from_pipeline=None,
        pretrained_model_name_or_path=folder,
        cache_dir=None,
        force_download=False,
        proxies=None,
        local_files_only=True,
        token=None,
        revision="main",
        subfolder="",
        trust_remote_code=False,
    )
