"""A folder with config.json and files in safetensors: a checkpoint, or a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetier.tiers.errors import StoreFormatError, UnsafeCheckpointError
from moetier.tiers.extents.table import read_table
from moetier.tiers.small_names import SETTINGS, VOCABULARY
from moetier.tiers.store.folder import remaking

from .checkpoint import Checkpoint
from .config_json import ADAPTER, carried, with_floats
from .containers import Container
from .files import contained, open_checkpoint, read_json, refuse_code, weights_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SafetensorsFolder(Container):
    """A folder. To ``open`` one, its id on the hub may be given, too."""

    def open(self, path: str | Path, *, ignore_code: bool) -> Checkpoint:
        """Open the checkpoint."""
        return open_checkpoint(path, ignore_code=ignore_code)

    def config(self, path: Path) -> dict[str, Any]:
        """Return the keys of config.json that a model directory has. A linked checkpoint may name code of its own."""
        config = read_json(path, "config.json")
        if not ((table := read_table(path)) and table.ignored_code):
            refuse_code(path, config)
        weights_of(path, config)  # refuses an index that names files elsewhere, or other kinds of files
        for name, names in (("transformers_weights", config), (ADAPTER, [each.name for each in path.iterdir()])):
            if name in names:
                raise UnsafeCheckpointError(
                    f"{path} has {name}, which makes transformers load other weights.", "Use another checkpoint."
                )
        found: dict[str, Any] = with_floats(carried(config))
        return found

    def weight_files(self, path: Path) -> list[Path]:
        """Return model.safetensors, or the files that the index names."""
        return [contained(path, name) for name in weights_of(path, {})[0]]  # {}: ``config`` refuses other weights

    def has_vocabulary(self, path: Path) -> bool:
        """Return whether the folder has a file of VOCABULARY."""
        return any(VOCABULARY.fullmatch(each.name) for each in path.iterdir())

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
                f"The tokenizer of {path} can't be loaded: {type(error).__name__}: {said}",
                remaking(
                    path / "tokenizer.json",
                    "Copy the tokenizer's files from the source again, or convert the model again.",
                ),
            ) from error
        return tokenizer
