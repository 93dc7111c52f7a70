"""Open a checkpoint in safetensors: find it, check it, and list its tensors.

Code in the checkpoint is never run, and the checkpoint is not changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from moetier.runtime.formats.tensors import MAX_NAME, StoredTensor, read_tensors
from moetier.tiers.errors import DOWNLOAD_AGAIN, CheckpointError, StoreFormatError, UnsafeCheckpointError
from moetier.tiers.extents.table import read_table
from moetier.tiers.small_names import COPIED, DOWNLOADED, SETTINGS, VOCABULARY
from moetier.tiers.store.folder import MAX_LEVELS, is_deep, remaking
from moetier.tiers.text import some

from . import hub
from .config_json import ADAPTER, carried, with_floats
from .containers import FILES, Checkpoint, Container, is_one_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class SafetensorsFolder(Container):
    """A folder: a checkpoint in safetensors, or a model directory. ``open`` also takes an id on the hub."""

    def open(self, path: str | Path, *, ignore_code: bool) -> Checkpoint:
        """Open the checkpoint."""
        return open_safetensors(path, ignore_code=ignore_code)

    def config(self, path: Path) -> dict[str, Any]:
        """Return the keys of config.json that a model directory has. A linked checkpoint may name code of its own."""
        config = read_json(path, "config.json")
        if not ((table := read_table(path)) and table.ignored_code):
            refuse_code(path, config)
        weights_of(path, config)  # refuses an index that names files elsewhere, or files that are not safetensors
        for name, names in (("transformers_weights", config), (ADAPTER, [entry.name for entry in path.iterdir()])):
            if name in names:
                raise UnsafeCheckpointError(
                    f"{path} has {name}, which makes transformers load other weights.", "Use another checkpoint."
                )
        return with_floats(carried(config))

    def weight_files(self, path: Path) -> list[Path]:
        """Return model.safetensors, or the files that the index names."""
        return [contained(path, name) for name in weights_of(path, {})[0]]  # {}: ``config`` refuses other weights

    def has_vocabulary(self, path: Path) -> bool:
        """Return whether the folder has a file of VOCABULARY."""
        return any(VOCABULARY.fullmatch(entry.name) for entry in path.iterdir())

    def tokenizer(self, path: Path) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer that transformers makes of the folder's files."""
        if not (self.has_vocabulary(path) or (path / SETTINGS[0]).exists()):
            return None
        from transformers import AutoTokenizer

        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises plain Exception
            said = next(iter(str(error).splitlines()), "")
            raise StoreFormatError(
                f"The tokenizer of {path} can't be loaded: {type(error).__name__}: {said}{_damage(path)}",
                remaking(
                    path / "tokenizer.json",
                    "Copy the tokenizer's files from the source again, or convert the model again.",
                ),
            ) from error
        return tokenizer


def _damage(folder: Path) -> str:
    """Return what is wrong with the first damaged JSON file of a tokenizer, in brackets; "" if none is damaged."""
    for name in ("tokenizer.json", "vocab.json", *SETTINGS):
        try:
            if name.endswith(".json") and (folder / name).exists():
                read_json(folder, name)
        except UnsafeCheckpointError:
            continue  # a link out of the folder, which the tokenizer may have
        except CheckpointError as error:
            return f" ({error.cause})"
    return ""


def open_safetensors(source: str | Path, *, ignore_code: bool = False) -> Checkpoint:
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


def locate(source: str | Path, files: Sequence[str] = DOWNLOADED) -> tuple[str, Path]:
    """Return the name and the folder of a checkpoint. For a hub id, only ``files`` (names, patterns) are downloaded."""
    if (folder := check_source(source)) is None:
        return str(source), hub.fetch(str(source), files, or_folder=True)
    if _is_snapshot(folder):
        return folder.parents[1].name.removeprefix("models--").replace("--", "/"), folder
    return folder.name, folder


def check_source(source: str | Path) -> Path | None:
    """Return the path of the folder or GGUF file that ``source`` names; None if ``source`` is a hub id.

    Raises CheckpointError if it is neither.
    """
    folder = Path(source)
    if is_one_file(folder):
        return folder.absolute()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise CheckpointError(
            f"{source} is not a folder.", "Give the folder that holds config.json, a .gguf file, or a hub id."
        )
    if folder.suffix in FILES:
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

    Raises CheckpointError if the file can't be read, is not a JSON object or is nested too deeply, and
    UnsafeCheckpointError if ``name`` leads out of ``folder``.
    """
    path = contained(folder, name)
    try:
        value = json.loads(path.read_bytes())
        deep = is_deep(value)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {name}.", "Give the folder of a Hugging Face checkpoint.") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}.", "Check the file and its disk.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}).", DOWNLOAD_AGAIN) from error
    except RecursionError:
        deep = True
    if deep:
        raise CheckpointError(f"{path} has values that are nested in more than {MAX_LEVELS} levels.", DOWNLOAD_AGAIN)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object.", DOWNLOAD_AGAIN)
    return value


def refuse_code(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise UnsafeCheckpointError if a config of the checkpoint names code of the checkpoint's own."""
    others = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
    configs = {name: read_json(folder, name) for name in others if contained(folder, name).exists()}
    for name, value in {"config.json": config, **configs}.items():
        if names_code(value):
            raise UnsafeCheckpointError(
                f"{folder / name} asks to run Python code from the checkpoint (auto_map); moetier never does.",
                "If transformers supports the architecture itself, give --ignore-code to moetier convert, pull or "
                "link.",
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
        raise CheckpointError(f"{folder / index} has no weight_map.", DOWNLOAD_AGAIN)
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
            f"{folder} lacks {some(missing)}, which {INDEX if places else 'config.json'} names.", DOWNLOAD_AGAIN
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
        of_file = _with_whole_names(own, named.get(path, []))
        if doubled := tensors.keys() & of_file.keys():
            name = min(doubled)
            raise CheckpointError(f"{name} is in both {tensors[name].file} and {path}.", DOWNLOAD_AGAIN)
        tensors |= of_file
    if absent := [name for name, path in places.items() if name not in tensors or tensors[name].file != path]:
        raise CheckpointError(f"{index} names tensors that are not in their files: {some(absent)}.", DOWNLOAD_AGAIN)
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
        f"{place} has neither {WEIGHTS} nor {INDEX}.",
        f"Give the folder of a checkpoint in safetensors. For moetier plan, {INDEX} beside config.json is enough.",
    )
