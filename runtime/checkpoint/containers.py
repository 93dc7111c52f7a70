"""A checkpoint that is open, and the container that holds it: a folder with safetensors files, or one GGUF file."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import numpy as np

from moetier.runtime.formats.registry import Format, format_of, quantised_with
from moetier.runtime.formats.tensors import SourceTensor, StoredTensor, read_range
from moetier.tiers.errors import DOWNLOAD_AGAIN, CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .decoded_trunk import Trunk

# From the suffix of a file that holds a whole checkpoint to its module and class. Any other path is a folder's.
FILES = {".gguf": "moetier.runtime.checkpoint.gguf_file:GgufFile"}
FOLDER = "moetier.runtime.checkpoint.safetensors_folder:SafetensorsFolder"
SAMPLE_BYTES, SAMPLE_STRIDE = 64, 16 << 20
FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Checkpoint:
    """A source checkpoint that has passed all checks.

    ``tensors`` is a dictionary from names to tensors, of all files. ``copied`` lists the files that a model
    directory copies, by names relative to ``folder``.
    """

    name: str  # hub id, or the name of the folder
    folder: Path
    source: str  # hub id, or absolute path of the folder; opens the checkpoint again from any directory
    ignored_code: bool  # whether it was opened with ``ignore_code``
    config: Mapping[str, Any]  # config.json
    tensors: Mapping[str, StoredTensor]
    copied: tuple[str, ...]
    revision: str | None = None  # commit on the hub, if known

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The quantization_config in the config or in its text_config; None if there is none.

        Raises CheckpointError if it is no JSON object.
        """
        places = (self.config, self.config.get("text_config") or {})
        section = next((section for place in places if (section := place.get("quantization_config"))), None)
        if not isinstance(section, Mapping | None):
            raise CheckpointError(f"The quantization_config of {self.name} is not a JSON object.", DOWNLOAD_AGAIN)
        return section

    @property
    def first_dtype(self) -> str | None:
        """torch's name for the type of the first floating-point tensor; None if there is none."""
        return next((t.dtype for t in self.tensors.values() if t.dtype in FLOATS), None)

    @property
    def format(self) -> Format:
        """The format of the weights. Raises UnsupportedModelError or CheckpointError."""
        return format_of(self.tensors, self.quantization, self.config)

    @property
    def quantised_with(self) -> str:
        """Name of the format of the weights, for messages. Raises CheckpointError."""
        return quantised_with(self.tensors, self.quantization)

    def sources(self, model: PreTrainedModel, dtype: str) -> dict[str, SourceTensor]:
        """Return a dictionary from the names of the checkpoint's tensors to source tensors.

        ``model`` is the model, on the meta device. ``dtype`` is torch's name of the type to which quantised tensors are
        decoded. Raises as ``Format.sources``.
        """
        return self.format.sources(dtype)

    def trunk(self, dtype: torch.dtype | str | None) -> Trunk | None:
        """Return what from_pretrained needs for the trunk in place of files; None if it can read the files.

        ``dtype`` is the type in which the model is loaded; None for that of the first tensor with floating-point
        numbers. Raises as ``Format.sources``.
        """
        if self.format.is_plain:
            return None
        from .decoded_trunk import decoded_trunk  # imports torch, which a daemon does without

        return decoded_trunk(self.format.sources(str(dtype or self.first_dtype or "float32").removeprefix("torch.")))

    def generated_files(self) -> dict[str, bytes]:
        """Return a dictionary from names to contents of a model directory's small files that are no files here.

        A checkpoint in safetensors has them all as files, so the dictionary is empty.
        """
        return {}

    @property
    def digest(self) -> str:
        """sha256 over the config and over each tensor's name, type, shape, file, offset, and samples of its bytes.

        The samples tell fine-tuned models apart, and are read from the files at each call. The size of a file counts
        too, as its tensors fill it.
        """
        state = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for tensor in sorted(self.tensors.values(), key=lambda t: (t.file.name, t.offset, t.name)):
            place = [tensor.name, tensor.spelling, tensor.shape, tensor.file.name, tensor.offset]
            state.update(json.dumps(place).encode())
            for offset, size in samples(tensor):
                sample = np.empty(size, np.uint8)
                read_range(tensor.file, offset, sample)
                state.update(sample.data)
        return state.hexdigest()


def samples(tensor: StoredTensor) -> list[tuple[int, int]]:
    """Return (offset in the file, bytes) of a tensor's samples.

    They are its first and last SAMPLE_BYTES, and SAMPLE_BYTES at each SAMPLE_STRIDE between them.
    """
    last = max(0, tensor.nbytes - SAMPLE_BYTES)
    starts = sorted({*range(0, last, SAMPLE_STRIDE), last})
    return [(tensor.offset + start, min(SAMPLE_BYTES, tensor.nbytes)) for start in starts]


class Container(ABC):
    """Container of a checkpoint: a folder, or a file such as GGUF's. All methods take the path of the checkpoint."""

    @abstractmethod
    def open(self, path: str | Path, *, ignore_code: bool) -> Checkpoint:
        """Open the checkpoint. ``ignore_code``: accept one that names code of its own, which is never run.

        Raises CheckpointError, UnsafeCheckpointError, UnsupportedModelError or ConfigError.
        """

    @abstractmethod
    def config(self, path: Path) -> dict[str, Any]:
        """Return the config of a model directory made from the checkpoint, without a quantization_config.

        Raises UnsafeCheckpointError if it, or a file beside it, could make transformers run code or load other weights;
        and as ``open``.
        """

    @abstractmethod
    def weight_files(self, path: Path) -> list[Path]:
        """Return the files that the weights are read from. Raises CheckpointError or UnsafeCheckpointError."""

    @abstractmethod
    def has_vocabulary(self, path: Path) -> bool:
        """Return whether there is a tokenizer's vocabulary. Raises CheckpointError."""

    @abstractmethod
    def tokenizer(self, path: Path) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer; None if there is none. Raises StoreFormatError or CheckpointError."""


def is_one_file(path: Path) -> bool:
    """Return whether a path is that of a file that holds a whole checkpoint, or the first of its parts."""
    return path.suffix in FILES and path.is_file()


def container_of(path: Path) -> Container:
    """Return the container for a file, a checkpoint's folder or a model directory. Its module is imported then."""
    return resolve_name(FILES[path.suffix] if is_one_file(path) else FOLDER)()


def open_checkpoint(source: str | Path, *, ignore_code: bool = False) -> Checkpoint:
    """Open a file, a folder or a hub id as a checkpoint. Raises as ``Container.open``."""
    return container_of(Path(source)).open(source, ignore_code=ignore_code)
