"""Open a source checkpoint: find it, check it, and list its tensors.

Code in the checkpoint is never run, and the checkpoint is not changed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from moetier.runtime.formats.format import Format
from moetier.runtime.formats.registry import format_of
from moetier.runtime.formats.tensors import MAX_NAME, SourceTensor, StoredTensor, read_at, read_tensors
from moetier.tiers.errors import CheckpointError, UnsafeCheckpointError
from moetier.tiers.headers.gguf import SUFFIX

from . import hub

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .trunk import Trunk

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SAMPLE_BYTES, SAMPLE_STRIDE = 64, 16 << 20
FLOATS = ("float16", "bfloat16", "float32", "float64")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Files that a model directory copies: tokenizer, chat template, generation defaults, processors, licence.
COPIED = re.compile(
    r"tokenizer(_config)?\.json|tokenizer\.model(\.v\d+)?|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)"
    r"|merges\.txt|spiece\.model|sentencepiece(\.bpe)?\.model|\w+\.tiktoken|tekken\.json|chat_template\.(jinja|json)"
    r"|additional_chat_templates/[\w.-]+\.jinja|generation_config\.json"
    r"|(image_|video_|feature_extractor_)?(pre)?processor_config\.json|(LICENSE|LICENCE|NOTICE|USE_POLICY)(\.\w+)?",
)


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
        found = next((found for place in places if (found := place.get("quantization_config"))), None)
        if not isinstance(found, Mapping | None):
            raise CheckpointError(
                f"The quantization_config of {self.name} is not a JSON object.", "Download the checkpoint again."
            )
        return found

    @property
    def first_dtype(self) -> str | None:
        """torch's name for the type of the first floating-point tensor; None if there is none."""
        return next((t.dtype for t in self.tensors.values() if t.dtype in FLOATS), None)

    @property
    def format(self) -> Format:
        """The format of the weights. Raises UnsupportedModelError or CheckpointError."""
        return format_of(self.tensors, self.quantization, self.config)

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
        from .trunk import decoded_trunk  # imports torch, which a daemon does without

        return decoded_trunk(self.format.sources(str(dtype or self.first_dtype or "float32").removeprefix("torch.")))

    def made_files(self) -> dict[str, bytes]:
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
                read_at(tensor.file, offset, sample)
                state.update(sample.data)
        return state.hexdigest()


def is_gguf(path: Path) -> bool:
    """Return whether a path is that of a GGUF file."""
    return path.suffix == SUFFIX and path.is_file()


def open_checkpoint(source: str | Path, *, ignore_code: bool = False) -> Checkpoint:
    """Open the checkpoint ``source``: a folder, or a hub id, whose files are downloaded first.

    ``ignore_code``: accept a checkpoint that names code of its own. The code is never run. Raises CheckpointError if
    the checkpoint is missing or damaged, and UnsafeCheckpointError if it names code of its own, holds pickles, or
    names files outside its folder.
    """
    name, folder = locate(source)
    of_hub = not Path(source).is_dir()
    config = read_json(folder, "config.json")
    if not ignore_code:
        refuse_code(folder, config)
    if of_hub:
        hub.fetch(name, weights_of(folder, config)[0], revision=folder.name)
    return Checkpoint(
        name=name,
        folder=folder,
        source=str(source if of_hub else folder),
        ignored_code=ignore_code,
        config=config,
        tensors=_read_tensors(folder, config),
        copied=copied_files(folder),
        revision=folder.name if _is_snapshot(folder) else None,
    )


def copied_files(folder: Path) -> tuple[str, ...]:
    """Return the names, relative to ``folder``, of the files that a model directory copies."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.glob("*") if not p.is_dir())
    names += sorted(p.relative_to(folder).as_posix() for p in folder.glob("additional_chat_templates/*"))
    return tuple(name for name in names if COPIED.fullmatch(name) and contained(folder, name))


def locate(source: str | Path, files: Sequence[str] = hub.SMALL_FILES) -> tuple[str, Path]:
    """Return the name and the folder of a checkpoint. For a hub id, only ``files`` (names, patterns) are downloaded."""
    folder = check_source(source)
    if folder is None:
        return str(source), hub.fetch(str(source), files, or_folder=True)
    if _is_snapshot(folder):
        return folder.parents[1].name.removeprefix("models--").replace("--", "/"), folder
    return folder.name, folder


def check_source(source: str | Path) -> Path | None:
    """Return the path of the folder or GGUF file that ``source`` names; None if ``source`` is a hub id.

    Raises CheckpointError if it is neither.
    """
    folder = Path(source)
    if is_gguf(folder):
        return folder.absolute()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise CheckpointError(
            f"{source} is not a folder.", "Give the folder that holds config.json, a .gguf file, or a hub id."
        )
    if folder.suffix == SUFFIX:
        raise CheckpointError(f"There is no file {source}.", "Check the path of the GGUF file.")
    if not hub.HUB_ID.fullmatch(str(source)) or str(source).startswith("."):
        raise CheckpointError(f"There is no folder {source}.", "Give a folder that holds config.json, or a hub id.")
    return None


def _is_snapshot(folder: Path) -> bool:
    """Return whether a folder is a snapshot in a hub cache. A snapshot's folder is named by its commit."""
    return folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")


def contained(folder: Path, name: str) -> Path:
    """Return the path of a checkpoint's file. Raises UnsafeCheckpointError if it leads out of the checkpoint.

    Links in a snapshot of a hub cache may lead to the cache's blobs.
    """
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\\" in name or "\0" in name:
        raise UnsafeCheckpointError(f"{folder} names a file outside itself: {name!r}.", "Don't use this checkpoint.")
    path = folder / relative
    real, allowed = path.resolve(), [folder.resolve()]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parents[1].resolve() / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise UnsafeCheckpointError(
            f"{path} is a link that leads out of the checkpoint, to {real}.", "Don't use this checkpoint."
        )
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return the object in a checkpoint's JSON file.

    Raises CheckpointError if the file can't be read or is not a JSON object, and UnsafeCheckpointError if ``name``
    leads out of ``folder``.
    """
    path = contained(folder, name)
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {name}.", "Give the folder of a Hugging Face checkpoint.") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}.", "Check the file and its disk.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}).", "Download the checkpoint again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object.", "Download the checkpoint again.")
    return found


def refuse_code(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise UnsafeCheckpointError if a config of the checkpoint names code of the checkpoint's own."""
    others = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
    found = {name: read_json(folder, name) for name in others if contained(folder, name).exists()}
    for name, value in {"config.json": config, **found}.items():
        if names_code(value):
            raise UnsafeCheckpointError(
                f"{folder / name} names code of the checkpoint's own (auto_map), which moetier never runs.",
                "If transformers supports this architecture, its own class can be used: give --ignore-code to "
                "moetier link, or to moetier convert.",
            )


def names_code(value: object) -> bool:
    """Return whether a config, or a part of it, names code of the checkpoint's own."""
    if isinstance(value, dict):
        return "auto_map" in value or any(map(names_code, value.values()))
    return isinstance(value, list) and any(map(names_code, value))


def weights_of(folder: Path, config: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Return the names of the files with weights, and the index's dictionary from tensors to files.

    The dictionary is empty if there is no index. The files are those that transformers reads: ``transformers_weights``
    of the config, else model.safetensors, else those that the index names. The index must have been downloaded.
    """
    weights = config.get("transformers_weights")
    if not isinstance(weights, str):
        weights = INDEX if contained(folder, INDEX).is_file() and not (folder / WEIGHTS).is_file() else WEIGHTS
    contained(folder, weights)
    places = read_places(folder, weights) if weights.endswith(".index.json") else {}
    return sorted(set(places.values())) or [weights], places


def read_places(folder: Path, index: str) -> dict[str, str]:
    """Return the weight_map of an index, a dictionary from tensors to files.

    Raises CheckpointError if it is malformed, and UnsafeCheckpointError if it names a file that is not safetensors or
    not in the checkpoint.
    """
    places = read_json(folder, index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{folder / index} has no weight_map.", "Download the checkpoint again.")
    for name in sorted(set(places.values())):
        contained(folder, name)
        if not name.endswith(".safetensors"):
            raise UnsafeCheckpointError(
                f"{folder / index} names weights that are not safetensors: {name}.",
                "Get the checkpoint as safetensors.",
            )
    return places


def _read_tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    files, places = weights_of(folder, config)
    paths = {name: contained(folder, name) for name in files}
    if missing := [name for name, path in paths.items() if not path.is_file()]:
        if missing == [WEIGHTS] and not places:
            raise without_weights(folder, (path.name for path in folder.iterdir()))
        raise CheckpointError(
            f"{folder} lacks {some(missing)}, which {INDEX if places else 'config.json'} names.",
            "Download the checkpoint again.",
        )
    named = {tensor: paths[file] for tensor, file in places.items()}
    return gathered({path: read_tensors(path) for path in paths.values()}, named, folder / INDEX)


def gathered(
    headers: Mapping[Path, Mapping[str, StoredTensor]], places: Mapping[str, Path], index: Path
) -> dict[str, StoredTensor]:
    """Merge the tensors of all files into one dictionary from names to tensors. ``headers`` has one for each file.

    ``places`` is a dictionary from tensors to files, as the file ``index`` names them. Raises CheckpointError if a
    tensor is in two files, or not in the file that ``places`` names.
    """
    named: dict[Path, list[str]] = {}
    for name, path in places.items():
        named.setdefault(path, []).append(name)
    tensors: dict[str, StoredTensor] = {}
    for path, own in headers.items():
        found = _with_whole_names(own, named.get(path, []))
        if doubled := tensors.keys() & found.keys():
            raise CheckpointError(f"{path} holds {some(doubled)} a second time.", "Download the checkpoint again.")
        tensors |= found
    if absent := [name for name, path in places.items() if name not in tensors or tensors[name].file != path]:
        raise CheckpointError(
            f"{index} names tensors that are not in their files: {some(absent)}.", "Download the checkpoint again."
        )
    return tensors


def _with_whole_names(own: Mapping[str, StoredTensor], names: list[str]) -> Mapping[str, StoredTensor]:
    """Return the tensors of a file, ``own``, by the names that the index has for them, ``names``.

    In the checkpoint of mixtral-offloading, each file holds one expert, and its names lack the prefix that all of them
    have in the index. The tensors of any other file are returned as they are.
    """
    first, last = min(names, default=""), max(names, default="")
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    prefix = first[: first.rfind(".", 0, common) + 1]
    whole = {f"{prefix}{name}": tensor for name, tensor in own.items()}
    is_whole = not prefix or not own.keys().isdisjoint(names) or not whole.keys() >= set(names)
    return own if is_whole or max(map(len, whole)) > MAX_NAME else whole


def without_weights(place: str | Path, names: Iterable[str]) -> CheckpointError:
    """Return the error for a checkpoint that has no weights in safetensors. ``names`` are those of its files."""
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        return UnsafeCheckpointError(
            f"{place} holds its weights as pickle ({some(pickles)}), which can run code when it is read.",
            "Get the checkpoint as safetensors.",
        )
    return CheckpointError(
        f"{place} has neither {WEIGHTS} nor {INDEX}.", "Give the folder of a checkpoint in safetensors."
    )


def samples(tensor: StoredTensor) -> list[tuple[int, int]]:
    """Return (offset in the file, bytes) of a tensor's samples.

    They are its first and last SAMPLE_BYTES, and SAMPLE_BYTES at each SAMPLE_STRIDE between them.
    """
    last = max(0, tensor.nbytes - SAMPLE_BYTES)
    starts = sorted({*range(0, last, SAMPLE_STRIDE), last})
    return [(tensor.offset + start, min(SAMPLE_BYTES, tensor.nbytes)) for start in starts]


def some(names: Iterable[str]) -> str:
    """Format ``names`` for a user: at most three of them, and the number of the others."""
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
