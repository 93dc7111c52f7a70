"""Write a checkpoint as one GGUF file for llama.cpp, with which ``peers.py`` compares moetier.

    python tests/measurements/gguf_export.py SRC FILE

Types are as after ``llama-quantize --pure``: every matrix is Q4_0, also embeddings and head; norms and gates are F32.
The file has no vocabulary, as token ids are fed as they are. One matrix is in memory at any one time.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from moetier.runtime.checkpoint.containers import Checkpoint
from moetier.runtime.checkpoint.safetensors_folder import open_safetensors
from moetier.runtime.formats.tensors import StoredTensor
from moetier.tiers.errors import ConfigError, TargetExistsError, UnsupportedModelError
from moetier.tiers.store.atomic import PARTIAL
from moetier.tools.cli.progress import ByteProgress

Kind = Literal["Q4_0", "F16", "F32"]
EXPERTS = {  # of the model type: where they are, and what llama.cpp knows their projections as
    "mixtral": ("block_sparse_moe.experts", {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}),
    "qwen3_moe": (
        "mlp.experts",
        {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"},
    ),
}
ARCHITECTURES = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}
FLUSH_BYTES = 64 << 20


@dataclass(frozen=True)
class Tensor:
    """One of the file: matrices [N, K], stacked where they are experts', or a vector."""

    name: str
    parts: tuple[StoredTensor, ...]
    kind: Kind
    rope_heads: int = 0  # of a projection whose rows llama.cpp wants in another order

    @property
    def shape(self) -> tuple[int, ...]:
        """Experts first."""
        return ((len(self.parts),) if len(self.parts) > 1 else ()) + self.parts[0].shape

    @property
    def nbytes(self) -> int:
        """Bytes in the file, encoded as ``kind``."""
        import gguf

        weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        return int(math.prod(self.shape) // weights * size)

    def arrays(self) -> Iterator[npt.NDArray[np.generic]]:
        """Its bytes, a matrix at a time."""
        import gguf

        for part in self.parts:
            weights = part.read().float().numpy()
            if self.rope_heads:
                weights = _interleaved(weights, self.rope_heads)
            yield gguf.quants.quantize(weights, gguf.GGMLQuantizationType[self.kind])


def export_gguf(source: Path, target: Path, *, ggml_type: Kind = "Q4_0", quiet: bool = True) -> int:
    """Writes ``target`` from a checkpoint that ``moetier synthetic`` made, whole or not at all; returns its bytes.

    ``kind`` is of the matrices. Raises ConfigError where the package gguf is missing, TargetExistsError,
    UnsupportedModelError or CheckpointError.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            "GGUF files need the package gguf, which is not installed.",
            'Install it: pip install ".[peers]" in the repository.',
        ) from error
    if target.exists():
        raise TargetExistsError(f"{target} exists.", "Choose another place.")
    checkpoint = open_safetensors(source)
    tensors = _plan(checkpoint, ggml_type)
    partial = target.with_name(target.name + PARTIAL)
    writer = gguf.GGUFWriter(partial, ARCHITECTURES[checkpoint.config["model_type"]])
    try:
        _describe(writer, checkpoint.config, ggml_type)
        for tensor in tensors:
            code = gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=code)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with ByteProgress("gguf", sum(tensor.nbytes for tensor in tensors), quiet=quiet) as progress:
            _write(writer, tensors, progress.advance)
    finally:
        writer.close()
    partial.rename(target)
    return target.stat().st_size


def _write(writer: Any, tensors: list[Tensor], advance: Callable[[int], None]) -> None:
    stream: BinaryIO = writer.fout[0]
    writer.write_padding(stream, stream.tell())
    flushed = 0
    for tensor in tensors:
        for array in tensor.arrays():
            stream.write(array.data)
            advance(array.nbytes)
            if stream.tell() - flushed > FLUSH_BYTES:  # or gigabytes of dirty pages go into the page cache
                stream.flush()
                os.fdatasync(stream.fileno())
                os.posix_fadvise(stream.fileno(), flushed, 0, os.POSIX_FADV_DONTNEED)
                flushed = stream.tell()
        writer.write_padding(stream, tensor.nbytes)
    stream.flush()
    os.fsync(stream.fileno())
    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _plan(checkpoint: Checkpoint, ggml_type: Kind) -> list[Tensor]:
    """In the order of the file. Raises UnsupportedModelError."""
    import gguf

    config, stored = checkpoint.config, dict(checkpoint.tensors)
    if config.get("model_type") not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{checkpoint.name} is no {' or '.join(ARCHITECTURES)}.", "Export a checkpoint of moetier synthetic."
        )
    architecture = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[ARCHITECTURES[config["model_type"]]]
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    place, projections = EXPERTS[config["model_type"]]
    experts = config.get("num_experts") or config["num_local_experts"]
    try:
        exported = [
            Tensor(
                f"blk.{layer}.{name}.weight",
                tuple(stored.pop(f"model.layers.{layer}.{place}.{e}.{projection}.weight") for e in range(experts)),
                ggml_type,
            )
            for layer in range(config["num_hidden_layers"])
            for projection, name in projections.items()
        ]
    except KeyError as error:
        raise UnsupportedModelError(f"{checkpoint.name} has no {error}.", "Export another checkpoint.") from error
    for name, part in stored.items():
        known = names.get_name(name, try_suffixes=(".weight",))
        if known is None:
            raise UnsupportedModelError(f"A GGUF file has no name for {name}.", "Export another checkpoint.")
        exact = len(part.shape) == 1 or name.endswith(".gate.weight")
        exported.append(Tensor(known, (part,), "F32" if exact else ggml_type, _rope_heads(name, config)))
    return exported


def _rope_heads(name: str, config: Mapping[str, Any]) -> int:
    """The architecture "llama" turns neighbours by an angle, where transformers turns the halves of a head."""
    if config["model_type"] != "mixtral":
        return 0
    heads = {"q_proj.weight": "num_attention_heads", "k_proj.weight": "num_key_value_heads"}
    return next((config[key] for end, key in heads.items() if name.endswith(end)), 0)


def _interleaved(weights: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows of each head: 0, n/2, 1, n/2 + 1, ..."""
    return weights.reshape(heads, 2, -1, weights.shape[1]).swapaxes(1, 2).reshape(weights.shape)


def _describe(writer: Any, config: Mapping[str, Any], ggml_type: Kind) -> None:
    import gguf

    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    ftype = gguf.LlamaFileType.ALL_F32 if ggml_type == "F32" else gguf.LlamaFileType[f"MOSTLY_{ggml_type}"]
    writer.add_file_type(ftype)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


if __name__ == "__main__":
    export_gguf(Path(sys.argv[1]), Path(sys.argv[2]), quiet=False)
