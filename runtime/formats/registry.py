"""The formats of checkpoints in safetensors, by the names that checkpoints give them.

A module is imported when a checkpoint has its format. CONTRIBUTING.md says how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from moetier.tiers.errors import UnsupportedModelError

from .format import Format
from .tensors import StoredTensor

# from the quant_method of a quantization_config to the module and the class
FORMATS = {
    "16 bits": "moetier.runtime.formats.plain:Plain",
    "fp8": "moetier.runtime.formats.scaled:Scaled",
    "mxfp8": "moetier.runtime.formats.scaled:Scaled",
    "mxfp4": "moetier.runtime.formats.scaled:Scaled",
    "modelopt": "moetier.runtime.formats.scaled:Scaled",
    "compressed-tensors": "moetier.runtime.formats.compressed:CompressedTensors",
    "awq": "moetier.runtime.formats.awq:Awq",
    "gptq": "moetier.runtime.formats.gptq:Gptq",
    "hqq": "moetier.runtime.formats.hqq:Hqq",
    "moetier": "moetier.runtime.formats.converted:Converted",
}
# from the last part of a tensor's name to the format, where no quant_method names one
MARKS = {"W_q": "hqq"}  # mixtral-offloading's config does not say how it is quantised


def format_of(
    tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any] | None, config: Mapping[str, Any]
) -> Format:
    """Return the format of a checkpoint, given its tensors by name, its quantization_config and its config.json.

    Raises UnsupportedModelError for a format that moetier can't read.
    """
    quantization = quantization or {}
    method = str(quantization.get("quant_method") or _unnamed(tensors))
    if method not in FORMATS:
        raise UnsupportedModelError(
            f"The checkpoint is quantised with {method}, which moetier can't read.",
            "Give a checkpoint in 16 or 32 bits, or in a form that docs/choosing.md lists.",
        )
    module, _, name = FORMATS[method].partition(":")
    made: Format = getattr(import_module(module), name)(tensors, quantization, config)
    return made


def _unnamed(tensors: Mapping[str, StoredTensor]) -> str:
    """Return the format of a checkpoint whose config names none."""
    return next((MARKS[leaf] for name in tensors if (leaf := name.rpartition(".")[2]) in MARKS), "16 bits")
