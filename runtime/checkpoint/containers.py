"""What holds a checkpoint: a folder with files in safetensors, or one file of another kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The module and the class of each kind of file that holds a whole checkpoint, by its suffix. Anything else is a folder.
FILES = {".gguf": "moetier.runtime.checkpoint.gguf_file:GgufFile"}
FOLDER = "moetier.runtime.checkpoint.files:SafetensorsFolder"


class Container(ABC):
    """One kind of folder or file that holds a checkpoint. All methods take its path."""

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
    module, _, name = (FILES[path.suffix] if is_one_file(path) else FOLDER).partition(":")
    made: Container = getattr(import_module(module), name)()
    return made


def open_source(source: str | Path, *, ignore_code: bool = False) -> Checkpoint:
    """Open a file, a folder or a hub id as a checkpoint. Raises as ``Container.open``."""
    return container_of(Path(source)).open(source, ignore_code=ignore_code)
