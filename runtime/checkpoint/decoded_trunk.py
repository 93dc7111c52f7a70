"""The trunk of a checkpoint that is used as it is, where transformers can't read it from the files.

Matrices of linear modules, and the embedding, stay in the mapped file if modules can multiply with them as they are
stored (GGUF). A matrix whose rows have another order in the model is copied. Rows of the embedding are decoded when
they are looked up. All else is decoded when transformers reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from moetier.runtime.formats.tensors import SourceTensor, StoredMatrix
from moetier.runtime.moe.linear import WEIGHT
from moetier.tiers.layout import RecordLayout
from moetier.tiers.store.trunk import RECORD

from .matrices import is_read_by_others, standing_alone

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPELLINGS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Trunk:
    """The trunk that from_pretrained gets in place of files: tensors, or objects that read one when indexed."""

    tensors: Mapping[str, Any]  # by the model's names; names of records are module paths and RECORD
    layouts: Mapping[str, RecordLayout]  # of the records, by the paths of their modules


class Unread:
    """Tensor that is decoded when it is read.

    transformers takes it for a slice of safetensors, which is read later too. It has the methods that are called.
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


def decoded_trunk(sources: Mapping[str, SourceTensor]) -> Trunk:
    """Return the trunk of a checkpoint in safetensors. Tensors that are not quantised stay in the mapped files."""
    files: dict[Path, Any] = {
        file: safe_open(file, framework="pt")
        for file in {part.file for tensor in sources.values() for part in tensor.parts}
    }
    tensors = {
        name: files[tensor.parts[0].file].get_slice(name) if tensor.is_plain else Unread(tensor)
        for name, tensor in sources.items()
    }
    return Trunk(tensors, {})


def trunk_with_records(model: PreTrainedModel, dtype: torch.dtype, sources: Mapping[str, SourceTensor]) -> Trunk:
    """Return a trunk in which as many matrices as possible stay as they are stored. Raises CheckpointError.

    ``model`` is on the meta device, and will be loaded in ``dtype``. ``sources`` has its tensors by their names.
    """
    maps: dict[Path, np.ndarray] = {}
    matrices = trunk_matrices(model, dtype, sources)
    records = {f"{place}{RECORD}": _mapped(matrix, maps) for place, (_, matrix) in matrices.items()}
    kept = {name for name, _ in matrices.values()}
    decoded = {name: Unread(tensor) for name, tensor in sources.items() if name not in kept}
    return Trunk(decoded | records, {place: matrix.layout for place, (_, matrix) in matrices.items()})


def trunk_matrices(
    model: PreTrainedModel, dtype: torch.dtype, sources: Mapping[str, SourceTensor]
) -> dict[str, tuple[str, StoredMatrix]]:
    """Map the path of each module whose weight is not decoded to the weight's name and matrix.

    The arguments are those of ``trunk_with_records``.
    """
    return {
        place: (name, matrix)
        for place, name in _modules(model, dtype, sources)
        if (matrix := sources[name].as_matrix()) is not None
    }


def _modules(
    model: PreTrainedModel, dtype: torch.dtype, sources: Mapping[str, SourceTensor]
) -> Iterator[tuple[str, str]]:
    """Yield the paths of modules whose weights may be records, and the names of their weights.

    A head that is tied to the embedding comes with the name of the embedding's weights. If the embedding is left out,
    such a head is left out, too.
    """
    linears, tied = standing_alone(model, dtype), model.all_tied_weights_keys
    table = model.get_input_embeddings()
    place = next(path for path, module in model.named_modules() if module is table)
    alone = type(table) is nn.Embedding and not is_read_by_others(model, place)
    sharing = {target: source for target, source in tied.items() if source == f"{place}.{WEIGHT}"}
    if alone and all(target.removesuffix(f".{WEIGHT}") in linears for target in sharing):
        yield place, f"{place}.{WEIGHT}"
    else:
        linears = {path: linear for path, linear in linears.items() if f"{path}.{WEIGHT}" not in sharing}
    for path in linears:
        name = f"{path}.{WEIGHT}"
        if (source := tied.get(name, name)) in sources:
            yield path, source


def _mapped(matrix: StoredMatrix, maps: dict[Path, np.ndarray]) -> Tensor:
    """Return the bytes of a matrix in the mapped file, or a copy with the rows in another order: uint8 [bytes]."""
    stored = matrix.stored
    if stored.file not in maps:
        maps[stored.file] = np.memmap(stored.file, np.uint8, mode="c")  # copy on write: the file is never changed
    raw = np.asarray(maps[stored.file][stored.offset : stored.offset + stored.nbytes])
    if matrix.order is not None:
        raw = raw.reshape(stored.shape)[matrix.order].reshape(-1)
    return torch.from_numpy(raw)
