"""Open a GGUF file as a checkpoint: its config and its tokenizer, by transformers' own tables of GGUF's names.

The file may be the first of several parts. Nothing of a file is read before ``tiers.headers.gguf`` has checked its
header, and no file is changed.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetier.runtime.formats.tensors import SourceTensor, StoredTensor
from moetier.tiers.errors import CheckpointError, ConfigError, UnsupportedModelError
from moetier.tiers.fields import shown
from moetier.tiers.headers.gguf import GgufEntry, GgufHeader, Value, read_gguf

from .containers import Checkpoint, Container

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .decoded_trunk import Trunk

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MAX_PARTS = 1000
DTYPE = "bfloat16"  # type of a model, unless its file says in which type it was trained
MODEL_TYPES = {  # transformers' model types, by the architecture that a file names
    "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "minimax-m2": "minimax_m2", "gpt-oss": "gpt_oss",
}  # fmt: skip
FURTHER = {  # for each model type: keys of GGUF that transformers' table lacks, and their fields in the config
    "qwen2_moe": {
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    },
    "qwen3_moe": {"expert_feed_forward_length": "moe_intermediate_size"},
    "mixtral": {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    "minimax_m2": {"expert_feed_forward_length": "intermediate_size"},
    "gpt_oss": {
        "expert_feed_forward_length": "intermediate_size",
        "attention.key_length": "head_dim",
        "attention.sliding_window": "sliding_window",
    },
}


@dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """A GGUF file, or several parts. ``folder`` and ``source`` are the path of the file, or of the first part.

    ``tensors`` is a dictionary from GGUF's names to stored tensors. Quantised ones are uint8 [..., bytes of a row].
    """

    metadata: Mapping[str, Value] = field(default_factory=dict, compare=False)
    types: Mapping[str, str] = field(default_factory=dict)  # from names of tensors to ggml's types, such as "Q4_K"

    @property
    def architecture(self) -> str:
        """The architecture that the file names."""
        return str(self.metadata["general.architecture"])

    @property
    def quantised_with(self) -> str:
        """Name of the format of the weights, for messages."""
        return "GGUF"

    def sources(self, model: PreTrainedModel, dtype: str) -> dict[str, SourceTensor]:
        """Return a dictionary from the names of ``model``'s tensors to source tensors.

        ``model`` is on the meta device. ``dtype`` is torch's name of the type to which quantised tensors are decoded.
        Raises as ``sources_of``.
        """
        from moetier.runtime.formats.gguf import GgufTensors, sources_of

        return sources_of(
            GgufTensors(self.folder, self.architecture, self.config, self.tensors, self.types), model, dtype
        )

    def trunk(self, dtype: torch.dtype | str | None) -> Trunk | None:
        """Return the trunk, in which matrices stay as they are. Raises as ``sources_of``."""
        from .blueprint import build_on_meta
        from .decoded_trunk import trunk_with_records

        model, own = build_on_meta(self.config, None)
        chosen: Any = dtype or own
        return trunk_with_records(model, chosen, self.sources(model, str(chosen).removeprefix("torch.")))

    def generated_files(self) -> dict[str, bytes]:
        """Return a dictionary from names to contents of the tokenizer's files. Raises as ``tokenizer_of``."""
        if (tokenizer := GgufFile().tokenizer(self.folder)) is None:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@functools.lru_cache(maxsize=1)
def _opened(path: Path, stamps: tuple[tuple[str, int, int], ...]) -> GgufCheckpoint:
    """Open a GGUF file. ``stamps``: name, size in bytes and time of the last change in ns of each part.

    A file is parsed again only if a stamp has changed. Raises as ``open_gguf``.
    """
    metadata: dict[str, Value] = {}
    entries: dict[str, tuple[Path, GgufEntry]] = {}
    for number, (name, _, _) in enumerate(stamps):
        part = path.with_name(name)
        header = _header(part)
        given = header.metadata.get("split.no", 0), header.metadata.get("split.count", 0) or 1
        if given != (number, len(stamps)):
            raise CheckpointError(
                f"{part} says that it is part {shown(given[0])} of {shown(given[1])}, counted from 0; its name says "
                f"{number} of {len(stamps)}.",
                "Download the files again, under the names that they had.",
            )
        metadata = metadata or header.metadata
        if doubled := entries.keys() & header.tensors.keys():
            raise CheckpointError(f"{part} repeats {shown(min(doubled))} of another part.", "Download the files again.")
        entries |= {name: (part, entry) for name, entry in header.tensors.items()}
    if (total := metadata.get("split.tensors.count", len(entries))) != len(entries):
        raise CheckpointError(
            f"{path} and its parts have {len(entries):,} tensors, not {shown(total)}.", "Download the files again."
        )
    config = _config(path, metadata, {name: entry for name, (_, entry) in entries.items()})
    tensors = {name: _stored(name, part, entry) for name, (part, entry) in entries.items()}
    types = {name: entry.ggml_type for name, (_, entry) in entries.items()}
    return GgufCheckpoint(path.stem, path, str(path), False, config, tensors, (), metadata=metadata, types=types)


class GgufFile(Container):
    """A GGUF file, or the first of several parts."""

    def open(self, path: str | Path, *, ignore_code: bool) -> Checkpoint:
        """Open the file as ``open_gguf`` does. It can't name code."""
        return open_gguf(Path(path))

    def config(self, path: Path) -> dict[str, Any]:
        """Return the config that is made of the file's metadata."""
        return dict(open_gguf(path).config)

    def weight_files(self, path: Path) -> list[Path]:
        """Return all parts."""
        return parts(path)

    def has_vocabulary(self, path: Path) -> bool:
        """Return whether the file has a tokenizer's tokens."""
        return "tokenizer.ggml.tokens" in open_gguf(path).metadata

    def tokenizer(self, path: Path) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer that transformers makes of the metadata, with its chat template."""
        return tokenizer_of(path) if self.has_vocabulary(path) else None


def open_gguf(path: Path) -> GgufCheckpoint:
    """Open a GGUF file, or the first of several parts.

    Raises CheckpointError if a file is missing or malformed, UnsupportedModelError if transformers does not read the
    architecture from GGUF files, and ConfigError if the package gguf is not installed.
    """
    path = path.absolute()
    try:
        stamps = tuple((part.name, part.stat().st_size, part.stat().st_mtime_ns) for part in parts(path))
    except OSError as error:
        raise CheckpointError(
            f"{error.filename} can't be read: {error.strerror}.", "All parts of a model must be in one folder."
        ) from error
    return _opened(path, stamps)


def parts(path: Path) -> list[Path]:
    """Return the paths of all parts of the model in ``path``. Raises CheckpointError unless it is the first part."""
    if (named := PART.fullmatch(path.name)) is None:
        return [path]
    number, count = int(named["number"]), int(named["count"])
    of = [path.with_name(f"{named['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, min(count, MAX_PARTS) + 1)]
    if number != 1 or not 1 <= count <= MAX_PARTS:
        first = path.with_name(f"{named['stem']}-00001-of-{count:05}.gguf")
        raise CheckpointError(f"{path} is part {number} of {count}.", f"Give the first part: {first}")
    return of


def _header(path: Path) -> GgufHeader:
    try:
        return read_gguf(path)
    except ValueError as error:
        raise CheckpointError(f"{path} is not a complete GGUF file: {error}.", "Download the file again.") from error
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}.", "Check the file and its disk.") from error


def _stored(name: str, part: Path, entry: GgufEntry) -> StoredTensor:
    if entry.ggml_type in ("F16", "BF16", "F32", "F64", "I8", "I16", "I32", "I64"):
        return StoredTensor(name, entry.ggml_type, entry.shape, part, entry.begin)
    return StoredTensor(name, "U8", (*entry.shape[:-1], entry.row_bytes), part, entry.begin)


def _config(path: Path, metadata: Mapping[str, Value], entries: Mapping[str, GgufEntry]) -> dict[str, Any]:
    """Return the config of the model, as config.json would have it. Raises UnsupportedModelError or CheckpointError."""
    require_gguf()
    from transformers.integrations import ggml
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture.isascii():
        raise CheckpointError(f"{path} does not name its architecture.", "Download the file again.")
    if (config := _described(path, architecture, metadata, entries)) is not None:
        return config | {"dtype": DTYPE}
    model_type = MODEL_TYPES.get(architecture, architecture)
    if architecture == "llama" and metadata.get("llama.expert_count"):
        model_type = "mixtral"
    table: Any = ggml.GGUF_CONFIG_MAPPING.get("llama" if model_type == "mixtral" else model_type)
    made_by = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if table is None or made_by is None:
        raise unsupported(path, architecture)
    if (embedding := entries.get("token_embd.weight")) is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{path} has no token_embd.weight.", "Download the file again.")
    config = dict(ggml.GGUF_CONFIG_DEFAULTS_MAPPING.get(model_type, {}))
    renamed = table | FURTHER.get(model_type, {})
    own = {key.removeprefix(f"{architecture}."): value for key, value in metadata.items()}
    config |= {renamed[key]: value for key, value in own.items() if renamed.get(key)}
    config |= _special_tokens(metadata)
    config |= _rope(own)
    if model_type == "gpt_oss" and "rope_parameters" in config:
        config["rope_parameters"]["truncate"] = False  # as in its config.json; GGUF has no key for it
    if isinstance(scoring := config.get("scoring_func"), int):
        config["scoring_func"] = {1: "softmax", 2: "sigmoid"}.get(scoring, "softmax")
    config |= {
        "model_type": model_type,
        "architectures": [made_by],
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in entries,
        "dtype": DTYPE,
    }
    return config


def _described(
    path: Path, architecture: str, metadata: Mapping[str, Value], entries: Mapping[str, GgufEntry]
) -> dict[str, Any] | None:
    """Return the config by transformers' own function, which versions from 5.24 on have for some architectures.

    Return None if there is none for ``architecture``. Raises CheckpointError if the file lacks one of its keys.
    """
    try:
        from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS, get_gguf_config
    except ImportError:
        return None
    if architecture not in GGUF_CONFIG_ARCHS:
        return None
    counted = {key: len(value) if key.startswith("tokenizer.") and isinstance(value, list) else value
               for key, value in metadata.items()}  # fmt: skip
    try:
        return dict(get_gguf_config(counted, tuple(entries)))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{path} lacks a key of the architecture {architecture}, or has it with another type ({error}).",
            "Download the file again.",
        ) from error


def _special_tokens(metadata: Mapping[str, Value]) -> dict[str, Any]:
    tokens: dict[str, Any] = {
        f"{name}_token_id": metadata[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    turn = metadata.get("tokenizer.ggml.eot_token_id")  # ends the turn of a chat
    if turn is not None and "eos_token_id" in tokens and turn != tokens["eos_token_id"]:
        tokens["eos_token_id"] = [tokens["eos_token_id"], turn]
    return tokens


def _rope(own: Mapping[str, Value]) -> dict[str, Any]:
    """Return the config's ``rope_parameters``; {} if positions are not scaled.

    ``own`` is the metadata by keys without the architecture's name.
    """
    scaling = own.get("rope.scaling.type", "none")
    if scaling == "none" or "rope.scaling.factor" not in own:
        return {}
    parameters: dict[str, Any] = {"rope_type": scaling, "factor": own["rope.scaling.factor"]}
    if "rope.freq_base" in own:
        parameters["rope_theta"] = own["rope.freq_base"]
    if "rope.scaling.original_context_length" in own:
        parameters["original_max_position_embeddings"] = own["rope.scaling.original_context_length"]
    return {"rope_parameters": parameters}


def unsupported(path: Path, architecture: str) -> UnsupportedModelError:
    """Return the error for an architecture that transformers does not read from GGUF files."""
    import transformers

    return UnsupportedModelError(
        f"{path} has the architecture {shown(architecture)}, which transformers {transformers.__version__} does not "
        "read from GGUF files.",
        "Use the model's checkpoint in safetensors. From GGUF files, moetier runs qwen2moe, qwen3moe, qwen35moe, "
        "minimax-m2, gpt-oss and Mixtral.",
    )


def require_gguf() -> None:
    """Raise ConfigError unless the package gguf is installed."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "GGUF files need the package gguf, which is not installed.",
            'In the repository of moetier, run: pip install ".[gguf]"',
        ) from error


def tokenizer_of(path: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a GGUF file that has one, with its chat template. Raises CheckpointError."""
    from transformers import TokenizersBackend
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    # AutoTokenizer would read the header with the package gguf, which takes seconds, only to find the model's type
    name = TOKENIZER_MAPPING_NAMES.get(open_gguf(path).config["model_type"])
    made_by: Any = (tokenizer_class_from_name(name) if name else None) or TokenizersBackend
    try:
        tokenizer: PreTrainedTokenizerBase = made_by.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the tokenizers library raises plain Exception
        said = next(iter(str(error).splitlines()), "")
        raise CheckpointError(
            f"The tokenizer of {path} can't be made: {type(error).__name__}: {said}",
            "Use the model's checkpoint in safetensors.",
        ) from error
    return tokenizer
