"""The trunk of a GGUF file: matrices as the file has them, and everything else dequantised.

Matrices of linear modules, and the embedding, stay in the mapped file. A matrix whose rows have another order in the
model is copied. Rows of the embedding are decoded when they are looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from moetier.runtime.moe.linear import WEIGHT
from moetier.tiers.layout import BLOCKS, Projection, RecordLayout
from moetier.tiers.store.trunk import RECORD

from .blueprint import build_on_meta
from .gguf import open_gguf
from .gguf_tensors import GgufExperts, GgufTensor
from .matrices import is_read_by_others, standing_alone
from .tensors import SourceTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class GgufTrunk:
    """The trunk of a GGUF file."""

    path: Path
    tensors: Mapping[str, Tensor]  # what the model loads, by its names; names of records are module paths and RECORD
    layouts: Mapping[str, RecordLayout]  # of the records, by the paths of their modules


def trunk_of(path: Path, dtype: str | torch.dtype) -> GgufTrunk:
    """Read the trunk of a GGUF file.

    ``dtype`` is the type in which the model is loaded; "auto" for that of its config. Raises as ``open_gguf``, and
    CheckpointError if a tensor is missing or has another shape.
    """
    checkpoint = open_gguf(path)
    model, own = build_on_meta(checkpoint.config, None)
    chosen = own if isinstance(dtype, str) else dtype
    found = checkpoint.sources(model, str(chosen).removeprefix("torch."))
    maps: dict[Path, np.ndarray] = {}
    records = trunk_records(model, chosen, found)
    tensors = {f"{place}{RECORD}": _record(found[source], maps) for place, (source, _) in records.items()}
    kept = {source for source, _ in records.values()}
    tensors |= {
        name: tensor.read()
        for name, tensor in found.items()
        if name not in kept and not isinstance(tensor, GgufExperts)
    }
    return GgufTrunk(path, tensors, {place: layout for place, (_, layout) in records.items()})


def trunk_records(
    model: PreTrainedModel, dtype: torch.dtype, found: Mapping[str, SourceTensor]
) -> dict[str, tuple[str, RecordLayout]]:
    """Return a dictionary from module paths to the names and layouts of weights that are kept as in the GGUF file.

    ``model`` is on the meta device, and will be loaded in ``dtype``. ``found`` has its tensors by their names.
    """
    return {
        place: (source, layout)
        for place, source in _matrices(model, dtype, found)
        if (layout := _layout(found[source])) is not None
    }


def _matrices(
    model: PreTrainedModel, dtype: torch.dtype, found: Mapping[str, SourceTensor]
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
        if (source := tied.get(name, name)) in found:
            yield path, source


def _layout(tensor: SourceTensor) -> RecordLayout | None:
    """Return the layout of a tensor's bytes in its file, taken as a record; None if they can't be used so."""
    if not isinstance(tensor, GgufTensor) or (tensor.change is not None and tensor.order is None):
        return None
    if (form := BLOCKS.get(coding := tensor.kind.lower())) is None:
        return None
    rows, columns = tensor.shape
    return RecordLayout((Projection(WEIGHT, rows, columns, form.bits, tensor.dtype, group=form.group, coding=coding),))


def _record(tensor: SourceTensor, maps: dict[Path, np.ndarray]) -> Tensor:
    """Return the bytes of a tensor in the mapped file, or a copy with the rows in another order: uint8 [bytes]."""
    assert isinstance(tensor, GgufTensor)
    stored = tensor.stored
    if stored.file not in maps:
        maps[stored.file] = np.memmap(stored.file, np.uint8, mode="c")  # copy on write: the file is never changed
    raw = np.asarray(maps[stored.file][stored.offset : stored.offset + stored.nbytes])
    if tensor.order is not None:
        raw = raw.reshape(stored.shape)[tensor.order].reshape(-1)
    return torch.from_numpy(raw)
