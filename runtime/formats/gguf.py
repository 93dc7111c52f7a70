"""Tensors of a GGUF file, dequantised, under the names and in the order of rows that transformers' model has.

transformers' own tables map the names. They also undo what llama.cpp changes in some weights: it puts rows of queries
and keys in another order, and adds 1 to the weights of some norms.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from moetier.runtime.moe.experts import experts_modules
from moetier.runtime.moe.linear import WEIGHT
from moetier.tiers.errors import CheckpointError, UnsupportedModelError
from moetier.tiers.layout import GGUF_BLOCKS, Projection, RecordLayout

from .scaled import TILE_WEIGHTS
from .tensors import Runs, SourceTensor, StoredMatrix, StoredTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPERTS = re.compile(r"blk\.(?P<layer>\d+)\.ffn_(?P<part>gate|up|down|gate_up)_exps\.(?P<leaf>weight|bias)")
DAMAGED = "Download the file again, or use the model's checkpoint in safetensors."
FLOATS = {"BF16": "bfloat16", "F16": "float16"}  # types of weights that records hold as they are


class GgufTensors(NamedTuple):
    """Tensors of a GGUF file, or of several parts, and what is needed to name them."""

    folder: Path  # path of the file, or of the first part
    architecture: str
    config: Mapping[str, Any]  # as config.json would have it
    tensors: Mapping[str, StoredTensor]  # by GGUF's names
    types: Mapping[str, str]  # ggml's types, such as "Q4_K", by GGUF's names


Change = Callable[[torch.Tensor], torch.Tensor]  # makes a tensor of the model from one of the file, in fp32


@dataclass(frozen=True, slots=True)
class GgufTensor(SourceTensor):
    """Tensor of a GGUF file. ``read`` dequantises it, and undoes what llama.cpp has changed in it."""

    stored: StoredTensor
    ggml_type: str  # such as "Q4_K"
    shape: tuple[int, ...]
    dtype: str
    change: Change | None = None
    order: npt.NDArray[np.int64] | None = None  # for each row, its number in the file, if only the order has changed

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """A tuple of only the stored tensor."""
        return (self.stored,)

    def component(self, name: str) -> StoredTensor:
        """Return the stored tensor, whose blocks have both codes and scales."""
        return self.stored

    def as_matrix(self) -> StoredMatrix | None:
        """Return the matrix as it lies in the file, in a coding of GGUF that kernels multiply with; else None."""
        if (self.change is not None and self.order is None) or (
            block := GGUF_BLOCKS.get(self.ggml_type.lower())
        ) is None:
            return None
        rows, columns = self.shape
        p = Projection(WEIGHT, rows, columns, block.bits, self.dtype, group=block.group, coding=self.ggml_type.lower())
        return StoredMatrix(self.stored, RecordLayout((p,)), self.order)

    def slice(self, index: int) -> GgufTensor:
        """Return a slice of the leading dimension as a tensor of its own, without that dimension. Nothing is read."""
        return replace(self, stored=self.stored.slice(index), shape=self.shape[1:])

    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Read ``count`` rows of the leading dimension, from row ``first`` on, into a new tensor [count, ...].

        Raises CheckpointError if the tensor's shape in the file does not fit the model.
        """
        count = self.shape[0] - first if count is None else count
        dtype: torch.dtype = getattr(torch, self.dtype)
        if self.order is not None:
            rows = self.order[first : first + count]
            begin = int(rows.min()) if count else 0
            raw = self.stored.read(begin, int(rows.max()) + 1 - begin if count else 0)
            return dequantised(raw[torch.from_numpy(rows - begin)], self.ggml_type, dtype)
        if self.change is not None:
            return self._whole(self.change)[first : first + count].to(dtype).contiguous()
        return dequantised(self.stored.read(first, count), self.ggml_type, dtype)

    def _whole(self, change: Change) -> torch.Tensor:
        """Read the whole tensor as fp32, and apply ``change``. The result has the shape of the model's parameter.

        Raises CheckpointError as ``read``.
        """
        weights = dequantised(self.stored.read(), self.ggml_type, torch.float32)
        try:
            if (changed := change(weights)).shape == self.shape:
                return changed
            why = f"it becomes {list(changed.shape)}"
        except (IndexError, ValueError, RuntimeError) as error:
            why = " ".join(str(error).split())
        raise CheckpointError(
            f"{self.stored.file}: {self.stored.name} of shape {list(weights.shape)} can't be made the model's "
            f"{list(self.shape)} ({why}).",
            DAMAGED,
        )


@dataclass(frozen=True, slots=True)
class GgufExperts(SourceTensor):
    """A parameter of all experts of a block, made of tensors [experts, rows, columns], or [experts, rows] of a bias."""

    tensors: tuple[GgufTensor, ...]
    transposed: bool
    alternate: bool = False  # rows of the tensors alternate, instead of following one another

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter. If the tensors have one dimension, which is an error, that of the first tensor."""
        if len(self.tensors[0].shape) < 2:
            return self.tensors[0].shape
        experts, rows, *columns = self.tensors[0].shape
        rows *= len(self.tensors)
        return (experts, *columns, rows) if self.transposed else (experts, rows, *columns)

    @property
    def dtype(self) -> str:
        """torch's name of the type that ``read`` returns."""
        return self.tensors[0].dtype

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The stored tensors, in the order of the rows."""
        return tuple(tensor.stored for tensor in self.tensors)

    def by_expert(self, experts: int) -> list[list[SourceTensor]]:
        """Return a run for each tensor."""
        return [[tensor.slice(index) for index in range(experts)] for tensor in self.tensors]

    def record_projection(self, plain: Projection, runs: Runs) -> Projection:
        """Return the projection in the type of the file's weights, which must be the same for gate and up."""
        ggml_type = " and ".join(sorted({tensor.ggml_type for tensor in self.tensors}))
        if ggml_type in FLOATS and not self.transposed:
            return replace(plain, dtype=FLOATS[ggml_type])
        if (block := GGUF_BLOCKS.get(coding := ggml_type.lower())) is None:
            raise ValueError(f"{self.stored_name} is stored in {ggml_type}")
        return replace(plain, bits=block.bits, group=block.group, dtype=self.dtype, coding=coding)

    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Read and dequantise ``count`` experts from expert ``first`` on, as [count, ...]."""
        read = [tensor.read(first, count) for tensor in self.tensors]
        merged = torch.stack(read, 2).flatten(1, 2) if self.alternate else torch.cat(read, 1)
        return merged.transpose(1, 2).contiguous() if self.transposed else merged


def dequantised(raw: torch.Tensor, ggml_type: str, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights of stored rows, by the decoder of the package gguf.

    ``raw`` is uint8 [rows, bytes], and the result [rows, columns] in ``dtype``; both may have more leading dimensions.
    If ``raw`` has another type, its weights are not quantised, and are only converted. ``ggml_type`` is the name of
    their type. Few rows are in fp32 at any one time, so that little memory is needed.
    """
    if raw.dtype != torch.uint8:
        return raw.to(dtype)
    import gguf

    number = gguf.GGMLQuantizationType[ggml_type]
    weights, size = gguf.GGML_QUANT_SIZES[number]
    columns = raw.shape[-1] // size * weights
    rows = raw.view(-1, raw.shape[-1]).numpy()
    out = torch.empty((len(rows), columns), dtype=dtype)
    tile = max(1, TILE_WEIGHTS // columns)
    for start in range(0, len(rows), tile):
        out[start : start + tile] = torch.from_numpy(gguf.quants.dequantize(rows[start : start + tile], number))
    return out.view(*raw.shape[:-1], columns)


def sources_of(checkpoint: GgufTensors, model: PreTrainedModel, dtype: str) -> dict[str, SourceTensor]:
    """Return a dictionary from the names of ``model``'s tensors to those that the checkpoint has, decoded to ``dtype``.

    ``model`` is on the meta device, and has all its experts. Raises CheckpointError if a tensor is missing or of
    another shape, and UnsupportedModelError for a type of weights that the package gguf does not decode.
    """
    state = model.state_dict()
    paths = {_layer(path): path for path in experts_modules(model)}
    experts: dict[str, dict[str, GgufTensor]] = {}
    sources: dict[str, SourceTensor] = {}
    trunk: dict[str, StoredTensor] = {}
    for name, stored in checkpoint.tensors.items():
        if (named := EXPERTS.fullmatch(name)) is None:
            trunk[name] = stored
        elif (path := paths.get(int(named["layer"]))) is not None:
            parameter = "down_proj" if named["part"] == "down" else "gate_up_proj"
            target = f"{path}.{parameter}" + ("_bias" if named["leaf"] == "bias" else "")
            experts.setdefault(target, {})[named["part"]] = _tensor(checkpoint, name, stored, dtype)
    for target, parts in experts.items():
        module = model.get_submodule(target.rpartition(".")[0])
        if parts.keys() not in ({"gate", "up"}, {"gate_up"}, {"down"}) or len({t.shape for t in parts.values()}) > 1:
            raise CheckpointError(
                f"{checkpoint.folder} has no pair of gate and up of one shape for {target}.", "Download the file again."
            )
        turned = bool(module.is_transposed) and not target.endswith("_bias")
        ordered = tuple(parts[part] for part in ("gate", "up", "gate_up", "down") if part in parts)
        sources[target] = GgufExperts(ordered, turned, bool(ordered[1:]) and not module.is_concatenated)
    for name, (target, change) in _names(checkpoint, model, trunk).items():
        if target in state:
            sources[target] = _changed(
                _tensor(checkpoint, name, trunk[name], dtype), change, tuple(state[target].shape)
            )
    _check(checkpoint, model, state, sources)
    return sources


def _check(
    checkpoint: GgufTensors, model: PreTrainedModel, state: Mapping[str, Any], sources: Mapping[str, SourceTensor]
) -> None:
    """Raise CheckpointError unless ``sources`` has all tensors of the model in their shapes."""
    tied = model.all_tied_weights_keys
    if missing := [name for name in state if name not in sources and name not in tied]:
        raise CheckpointError(
            f"{checkpoint.folder} has no tensor for {missing[0]}"
            + (f" and {len(missing) - 1} more." if missing[1:] else "."),
            DAMAGED,
        )
    for name, tensor in sources.items():
        if name in state and tensor.shape != tuple(state[name].shape):
            raise CheckpointError(
                f"{checkpoint.folder}: {tensor.parts[0].name} has the shape {list(tensor.shape)}, but "
                f"{name} of the model has {list(state[name].shape)}.",
                DAMAGED,
            )


def _layer(path: str) -> int:
    return next(int(part) for part in path.split(".") if part.isdigit())


def _tensor(checkpoint: GgufTensors, name: str, stored: StoredTensor, dtype: str) -> GgufTensor:
    ggml_type, shape = checkpoint.types[name], stored.shape
    if stored.spelling == "U8":
        import gguf

        number = gguf.GGMLQuantizationType.__members__.get(ggml_type)
        if number is None or number not in gguf.quants._type_traits:
            raise UnsupportedModelError(
                f"{checkpoint.folder}: {name} has the type {ggml_type}, which the package gguf does not decode.",
                "Use a file of another type, such as Q4_K_M, or a newer version of the package gguf.",
            )
        weights, size = gguf.GGML_QUANT_SIZES[number]
        shape = (*shape[:-1], shape[-1] // size * weights)
    return GgufTensor(stored, ggml_type, shape, dtype)


def _changed(tensor: GgufTensor, change: Change | None, shape: tuple[int, ...]) -> GgufTensor:
    """Return a tensor of ``shape`` to which ``change`` is applied when it is read.

    If ``change`` only reorders rows, the result has the ``order``: then some rows can be read without the others. If
    the tensor has more or fewer numbers than ``shape``, it is returned as it is.
    """
    if change is None or math.prod(tensor.shape) != math.prod(shape):
        return tensor
    if len(tensor.shape) == 2:
        rows = torch.arange(tensor.shape[0], dtype=torch.float32)[:, None]
        try:
            moved = change(rows)
        except (IndexError, ValueError, RuntimeError):  # it needs all columns
            moved = torch.empty(0)
        if torch.equal(moved, rows):
            return tensor
        if moved.shape == rows.shape and torch.equal(moved.sort(0).values, rows):
            order = moved.flatten().long().numpy()
            return GgufTensor(tensor.stored, tensor.ggml_type, tensor.shape, tensor.dtype, change, order)
    return GgufTensor(tensor.stored, tensor.ggml_type, shape, tensor.dtype, change)


def _names(
    checkpoint: GgufTensors, model: PreTrainedModel, trunk: Mapping[str, StoredTensor]
) -> dict[str, tuple[str, Change | None]]:
    """Return a dictionary from GGUF's names of the trunk's tensors to their names in the model and their changes.

    A change is None if transformers loads the tensor as it is. Tensors that transformers does not know are left out.
    """
    if (mapping := _transforms(checkpoint, model)) is not None:
        return {name: _transformed(name, mapping) for name in trunk}
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    made_by: Any = TENSOR_PROCESSORS.get(checkpoint.architecture, TensorProcessor)
    processor = made_by(config=dict(checkpoint.config))
    model_type = "llama" if checkpoint.architecture == "llama" else None
    # without its parts: transformers would look for the names in each of them again, one after the other
    flat: Any = SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=list)
    targets = get_gguf_hf_weights_map(flat, processor, model_type, model.config.num_hidden_layers)
    names: dict[str, tuple[str, Change | None]] = {}
    for name in trunk:
        target = targets.get(name) or targets.get(name.removesuffix(".weight"))
        if target is not None:
            names[name] = target, partial(_processed, processor, name)
    return names


def _processed(processor: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    weights = processor.process(tensor.numpy(), name, tensor_key_mapping={}, parsed_parameters={}).weights
    return torch.from_numpy(np.ascontiguousarray(weights))


def _transforms(checkpoint: GgufTensors, model: PreTrainedModel) -> list[Any] | None:
    """Return transformers' list of renamings and conversions for the architecture; None if it has none."""
    try:
        from transformers.integrations.gguf.utils import get_gguf_conversion_mapping, is_gguf_arch_supported
    except ImportError:
        return None
    if not is_gguf_arch_supported(checkpoint.architecture):
        return None
    return list(get_gguf_conversion_mapping(checkpoint.architecture, model.config))


def _transformed(name: str, mapping: list[Any]) -> tuple[str, Change | None]:
    from transformers import core_model_loading as loading

    mapping = deepcopy(mapping)  # a transform notes what it has matched
    renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
    key, pattern = loading.rename_source_key(name, renamings, converters)
    converter = next(
        (candidate for candidate in converters if pattern is not None and pattern in candidate.source_patterns), None
    )
    return key, None if converter is None else partial(_operated, converter.operations)


def _operated(operations: list[Any], tensor: torch.Tensor) -> torch.Tensor:
    for operation in operations:
        (tensor,) = operation.convert({"": [tensor]}, source_patterns=[""], target_patterns=[""]).values()
    return tensor
