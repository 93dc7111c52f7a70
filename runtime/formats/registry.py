"""The formats of checkpoints in safetensors: their base class, and the table in which each has a line.

A module of a format is imported when a checkpoint has that format. CONTRIBUTING.md says how to add one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pkgutil import resolve_name
from typing import Any, ClassVar, NoReturn

from moetier.tiers.errors import DOWNLOAD_AGAIN, CheckpointError, UnsupportedModelError

from .tensors import SourceTensor, StoredTensor

# module and class of each format, by the quant_method of a quantization_config
FORMATS = {
    "16 bits": "moetier.runtime.formats.registry:Plain",
    "fp8": "moetier.runtime.formats.scaled:Scaled",
    "mxfp8": "moetier.runtime.formats.scaled:Scaled",
    "mxfp4": "moetier.runtime.formats.scaled:Scaled",
    "modelopt": "moetier.runtime.formats.scaled:Scaled",
    "compressed-tensors": "moetier.runtime.formats.compressed:CompressedTensors",
    "awq": "moetier.runtime.formats.gptq_awq:Awq",
    "gptq": "moetier.runtime.formats.gptq_awq:Gptq",
    "hqq": "moetier.runtime.formats.hqq:Hqq",
    "moetier": "moetier.runtime.formats.registry:Converted",
}
# format by the last part of a tensor's name, where no quant_method names one
MARKS = {"W_q": "hqq"}  # mixtral-offloading's config does not say how it is quantised
# advice where records can't hold the weights as a checkpoint stores them
NEEDS_BITS = "Give --bits 16 for the values as they are, or 8, 4, 3 or 2 to quantise them anew."


@dataclass(frozen=True)
class Format(ABC):
    """Format in which one checkpoint in safetensors stores its weights.

    A subclass is one format, and an object of it belongs to one checkpoint.
    """

    tensors: Mapping[str, StoredTensor]  # by name; the shapes are () if only the names are known
    quantization: Mapping[str, Any]  # the quantization_config of config.json; {} if there is none
    config: Mapping[str, Any]  # config.json

    is_plain: ClassVar[bool] = False  # whether transformers can load the tensors as they are

    @abstractmethod
    def sources(self, dtype: str) -> dict[str, SourceTensor]:
        """Return a dictionary from names to source tensors: the names that a checkpoint in 16 bits would have.

        transformers may rename them when it loads them. Reads no weights. ``dtype`` is torch's name of the type to
        which quantised tensors are decoded. Tensors that are not quantised are returned as they are. Raises
        UnsupportedModelError for a variant of the format that can't be read, and CheckpointError if the tensors of a
        weight do not fit together.
        """

    def joined(
        self,
        main: str,
        needed: tuple[str, ...],
        others: tuple[str, ...],
        make: Callable[[str, dict[str, StoredTensor]], SourceTensor],
    ) -> dict[str, SourceTensor]:
        """Return a dictionary from names to source tensors, in which each quantised module has a "weight".

        Args:
            main: name of a tensor that only quantised modules have.
            needed: names of further tensors that each of them has.
            others: names of further tensors that a module may have, and the model does not.
            make: makes the weight from its name, and a dictionary from the names above to its module's tensors. It is
                not called if only names are known.

        Raises CheckpointError if a module lacks one of ``needed``, also has the weight itself, or has all of ``needed``
        but neither ``main`` nor a weight.
        """
        own = (main, *needed, *others)
        orphaned = [name for name in self.tensors if name.endswith(f".{needed[0]}")] if needed else []
        for path in (name.removesuffix(f".{needed[0]}") for name in orphaned):
            has_weight = f"{path}.{main}" in self.tensors or f"{path}.weight" in self.tensors
            if not has_weight and all(f"{path}.{name}" in self.tensors for name in needed):
                raise CheckpointError(f"{path}.{needed[0]} is there, but {path}.{main} is missing.", DOWNLOAD_AGAIN)
        paths = [name.removesuffix(f".{main}") for name in self.tensors if name.endswith(f".{main}")]
        taken = {f"{path}.{name}" for path in paths for name in own}
        sources: dict[str, SourceTensor] = {name: tensor for name, tensor in self.tensors.items() if name not in taken}
        for path in paths:
            weight = f"{path}.weight"
            stored = {name: self.tensors[f"{path}.{name}"] for name in own if f"{path}.{name}" in self.tensors}
            if missing := [name for name in needed if name not in stored]:
                raise CheckpointError(f"{weight} is quantised, but {path}.{missing[0]} is missing.", DOWNLOAD_AGAIN)
            if weight in sources:
                raise CheckpointError(f"{weight} is in the checkpoint twice, once quantised.", DOWNLOAD_AGAIN)
            sources[weight] = make(weight, stored) if stored[main].shape else replace(stored[main], name=weight)
        return sources


class Plain(Format):
    """Weights in 16 or 32 bits, which are not quantised."""

    is_plain = True

    def sources(self, dtype: str) -> dict[str, SourceTensor]:
        """Return the stored tensors."""
        return dict(self.tensors)


class Converted(Format):
    """A model directory: it is refused where a checkpoint is asked for."""

    def sources(self, dtype: str) -> NoReturn:
        """Raise UnsupportedModelError."""
        raise UnsupportedModelError(
            "This is a model directory of moetier: it is converted already.",
            "Use it as it is, or give the checkpoint that it was made from.",
        )


def format_of(
    tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any] | None, config: Mapping[str, Any]
) -> Format:
    """Return the format of a checkpoint, given its tensors by name, its quantization_config and its config.json.

    Raises UnsupportedModelError for a format that moetier can't read.
    """
    quantization, method = quantization or {}, quantised_with(tensors, quantization)
    if method not in FORMATS:
        raise UnsupportedModelError(
            f"The checkpoint is quantised with {method}, which moetier can't read.",
            "Give a checkpoint in 16 or 32 bits, or in a format that docs/choosing.md lists.",
        )
    return resolve_name(FORMATS[method])(tensors, quantization, config)


def quantised_with(tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any] | None) -> str:
    """Return the name of a checkpoint's format, as in FORMATS. The arguments are those of ``format_of``."""
    marks = (MARKS[leaf] for name in tensors if (leaf := name.rpartition(".")[2]) in MARKS)
    return str((quantization or {}).get("quant_method") or next(marks, "16 bits"))
