"""Choices for a model before it is converted: the sizes of experts and trunk for each number of bits.

No weights are needed. The names, types and shapes of tensors come from the headers of the checkpoint's files, on this
machine or on the hub. If only the checkpoint's index is on this machine, it gives the names, and a model on the meta
device gives the shapes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moetier.runtime.checkpoint import hub
from moetier.runtime.checkpoint.blueprint import build_on_meta, destinations
from moetier.runtime.checkpoint.config_json import read_config
from moetier.runtime.checkpoint.containers import Checkpoint, is_one_file, open_checkpoint
from moetier.runtime.checkpoint.decoded_trunk import trunk_matrices
from moetier.runtime.checkpoint.model_config import is_checkpoint
from moetier.runtime.checkpoint.safetensors_folder import (
    INDEX,
    WEIGHTS,
    locate,
    names_code,
    open_safetensors,
    read_json,
    read_places,
    weights_of,
)
from moetier.runtime.formats.tensors import SourceTensor, StoredTensor, listed
from moetier.runtime.model.names import listed_name
from moetier.runtime.moe.linear import matrix_layout
from moetier.runtime.stores.checkpoint_store import table_of
from moetier.tiers.errors import CheckpointError, ConfigError, StoreError
from moetier.tiers.layout import BITS, TRUNK_BITS, Bits, RecordLayout
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.folder import check_directory, read_manifest, store_folder
from moetier.tiers.store.trunk import check_trunk, trunk_records
from moetier.tiers.text import some
from moetier.tools.convert.conversion_plan import ConversionPlan, most_bytes
from moetier.tools.convert.model_files import is_ours
from moetier.tools.convert.options import NATIVE, Options
from moetier.tools.convert.trunk_writer import SPELLINGS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


ON_HUB = ("config.json", INDEX)  # files that are downloaded before the headers


@dataclass(frozen=True)
class CheckpointHeaders:
    """Headers of a checkpoint. Its weights need not be on this machine.

    If ``shaped`` is false, only the names of its tensors are known; their types, shapes and offsets are placeholders.
    """

    checkpoint: Checkpoint
    shaped: bool
    nbytes: int | None  # size of the checkpoint; None if its index does not give it
    names_code: bool  # whether the checkpoint names Python code: convert then requires --ignore-code
    on_hub: bool  # whether the checkpoint must be downloaded

    def tensors(self, model: PreTrainedModel, dtype: torch.dtype) -> dict[str, SourceTensor]:
        """Return the source tensors, by name. ``dtype``: the type in which the model will be loaded.

        If ``shaped``, the shapes are those in the headers. Otherwise they come from ``model``, which is on the meta
        device and must still have all its experts. A tensor that transformers merges with others, or splits, on loading
        then has the shape [n], where n is an equal share of the weights that result.
        """
        name = str(dtype).removeprefix("torch.")
        sources = self.checkpoint.sources(model, name)
        return sources if self.shaped else _shaped(model, sources, name)


def open_headers(source: str | Path) -> CheckpointHeaders:
    """Read the headers of a checkpoint: ``source`` is a folder or a hub id.

    From the hub, only config.json, the index and the headers are downloaded. A checkpoint may name Python code, as the
    code is not run. Raises CheckpointError or UnsafeCheckpointError.
    """
    on_hub = not Path(source).is_dir()
    name, folder = locate(source, ON_HUB)
    config = read_json(folder, "config.json")
    files, _ = weights_of(folder, config)
    absent = [file for file in files if not (folder / file).is_file()]
    if not absent:
        checkpoint = open_safetensors(folder, ignore_code=True)
        return CheckpointHeaders(checkpoint, True, checkpoint.nbytes, names_code(dict(config)), on_hub=False)
    if on_hub:
        tensors = _of_hub(name, folder, files)
    elif len(absent) == len(files) and (folder / INDEX).is_file():
        places = read_places(folder, INDEX)
        tensors = {name: StoredTensor(name, "BF16", (), folder / file, 0) for name, file in places.items()}
    elif (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} lacks {some(absent)}, which {INDEX} names.",
            "Download the checkpoint again, or give a folder that holds only config.json and the index.",
        )
    else:
        open_safetensors(folder, ignore_code=True)  # raises CheckpointError
        raise AssertionError(f"{folder} was opened, and lacks {WEIGHTS}")
    checkpoint = Checkpoint(name, folder, str(source), True, config, tensors, copied=())
    nbytes = checkpoint.nbytes if on_hub else _total(folder)
    return CheckpointHeaders(checkpoint, on_hub, nbytes, names_code(dict(config)), on_hub=on_hub)


def _of_hub(name: str, folder: Path, files: list[str]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file, header in hub.headers(name, files, folder.name).items():
        try:
            tensors |= listed(folder / file, header, 0)[0]
        except ValueError as error:
            raise CheckpointError(
                f"{file} of {name} has a malformed header ({error}).", "Choose another revision, or another model."
            ) from error
    return tensors


def _total(folder: Path) -> int | None:
    metadata = read_json(folder, INDEX).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    return int(total) if isinstance(total, int | float) and total > 0 else None


def _shaped(model: PreTrainedModel, names: Iterable[str], dtype: str) -> dict[str, SourceTensor]:
    """Return the source tensors called ``names``, with shapes from ``model``.

    A tensor that becomes one parameter on loading has the parameter's shape. Tensors that are merged or split have the
    shape [n], where n is an equal share of the weights that result.
    """
    shapes: Mapping[str, Any] = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors: dict[str, SourceTensor] = {}
    for members, targets in destinations(model, names):
        target_shapes = [shapes[target] for target in targets if target in shapes]
        plain = len(members) == 1 and len(target_shapes) == 1
        numbers = sum(map(math.prod, target_shapes)) // len(members)
        for name in members:
            shape = target_shapes[0] if plain else (numbers,)
            tensors[name] = StoredTensor(name, SPELLINGS[dtype], shape, Path(name), 0)
    return tensors


@dataclass(frozen=True)
class Choice:
    """Sizes of a model with ``bits`` per expert weight and ``trunk_bits`` per weight of the trunk's matrices."""

    bits: Bits
    trunk_bits: Bits
    manifest: Manifest
    trunk_bytes: int  # size of the trunk's files, and of the trunk in memory
    matrices: tuple[RecordLayout, ...]  # of the trunk's quantised matrices
    plain_bytes: int  # bytes of the trunk's other weights that are multiplied with for each token
    layers: int
    as_it_is: bool = False  # the experts are those of the checkpoint itself, and nothing is converted
    native: bool = False  # the experts are quantised in the checkpoint, and stay so (``--bits native``)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the model directory, without its small files."""
        return self.manifest.stored_bytes + self.trunk_bytes

    @property
    def options(self) -> str:
        """Options of `moetier convert` for this choice."""
        return f"--bits {NATIVE if self.native else self.bits}" + (
            f" --trunk-bits {self.trunk_bits}" if self.trunk_bits != 16 else ""
        )


@dataclass(frozen=True)
class ModelChoices:
    """A model and its choices. For a converted model, ``headers`` is None and there is one choice."""

    name: str
    source: str
    headers: CheckpointHeaders | None
    model: Any  # on the meta device, its Experts modules cut down where possible
    choices: tuple[Choice, ...]
    passing_bytes: int = 0  # most bytes of downloaded files that are on the disk at any one time during a conversion
    quantised_with: str | None = None  # format of experts that records can't hold as they are stored; None: they can
    perhaps_native: str | None = None  # format that config.json names, if there are no headers to tell more

    @property
    def source_bytes(self) -> int:
        """Size of the checkpoint in bytes; if its index does not give it, the size of the largest choice."""
        if self.headers is not None and self.headers.nbytes is not None:
            return self.headers.nbytes
        return max(choice.disk_bytes for choice in self.choices)

    def chosen(self, bits: Collection[int] | None, trunk_bits: Collection[int] | None) -> list[Choice]:
        """Return the choices with the given bits; None stands for any. Raises ConfigError if there are none."""
        choices = [
            choice
            for choice in self.choices
            if (bits is None or choice.bits in bits) and (trunk_bits is None or choice.trunk_bits in trunk_bits)
        ]
        if not choices:
            (only, *_) = self.choices
            raise ConfigError(
                f"{self.source} is {'used as it is' if only.as_it_is else 'converted already'}, with experts of "
                f"{only.bits} bits and a trunk of {only.trunk_bits} bits.",
                "Leave out --bits and --trunk-bits, or give the checkpoint that the model was made from.",
            )
        return choices


def open_choices(source: str | Path) -> ModelChoices:
    """Return the choices for the model ``source``, a checkpoint's folder, a hub id or a model directory.

    The folder of a checkpoint may lack the files with weights. Raises CheckpointError or StoreError.
    """
    check_directory(Path(source))
    if is_ours(Path(source)):
        return _converted(Path(source))
    if is_one_file(Path(source)):
        return _one_file(Path(source))
    headers, as_it_is = open_headers(source), _is_usable(Path(source))
    checkpoint, choices, model, passing, quantised = headers.checkpoint, list[Choice](), None, 0, None
    for trunk_bits in TRUNK_BITS:
        model, dtype = build_on_meta(checkpoint.config, checkpoint.first_dtype if headers.shaped else None)
        planned = ConversionPlan.of(model, dtype, headers.tensors(model, dtype), trunk_bits)
        if headers.on_hub:
            passing = max(passing, most_bytes(planned, checkpoint.tensors.values()))
        if planned.has_only_values:
            quantised = checkpoint.quantised_with
        matrices = planned.matrices(workers=1, fast=False)
        layouts = {path: matrix.layout for path, matrix in matrices.items()}
        size = sum(file.size for file in planned.trunk(matrices))
        own: Literal["native", 16] = NATIVE if headers.shaped and planned.kept else 16  # as the checkpoint stores them
        for bits in (*BITS, own) if own == NATIVE else BITS:
            manifest = planned.manifest(Options(bits, trunk_bits), model=checkpoint.name, digest="")
            choice = _choice(manifest.bits, trunk_bits, manifest, size, layouts, model)
            usable = as_it_is and bits == own and trunk_bits == 16
            choices.append(replace(choice, as_it_is=usable, native=bits == NATIVE))
    named = (checkpoint.quantization or {}).get("quant_method")
    stated = str(named) if named and not headers.shaped else None
    return ModelChoices(checkpoint.name, str(source), headers, model, tuple(choices), passing, quantised, stated)


def _is_usable(folder: Path) -> bool:
    """Return whether a folder holds a checkpoint that can be used as it is."""
    try:
        return is_checkpoint(folder) and bool(table_of(folder).blocks)
    except (CheckpointError, StoreError):
        return False


def _converted(folder: Path) -> ModelChoices:
    manifest = read_manifest(store_folder(folder))  # a cache that lacks records has one, too
    check_trunk(folder, manifest)
    model, _ = build_on_meta(read_config(folder), None)
    layouts = {}
    if manifest.trunk_records is not None:
        for path in trunk_records(folder, manifest):
            linear: Any = model.get_submodule(path)
            layouts[path] = matrix_layout(linear.out_features, linear.in_features, manifest.trunk_records)
    files = [folder / name for name in manifest.trunk] or folder.glob("trunk-*.safetensors")
    size = sum(path.stat().st_size for path in files)
    trunk_bits: Any = manifest.trunk_bits
    choice = _choice(manifest.bits, trunk_bits, manifest, size, layouts, model)
    return ModelChoices(listed_name(folder) or manifest.model, str(folder), None, model, (choice,))


def _one_file(path: Path) -> ModelChoices:
    """Return the one choice for a GGUF file, which is used as it is."""
    checkpoint, manifest = open_checkpoint(path), table_of(path).manifest
    model, dtype = build_on_meta(checkpoint.config, None)
    tensors = checkpoint.sources(model, str(dtype).removeprefix("torch."))
    records = {name: matrix.layout for name, matrix in trunk_matrices(model, dtype, tensors).values()}
    experts = {f"{block.path}." for block in manifest.blocks}
    plain = [
        math.prod(tensor.shape) * dtype.itemsize
        for name, tensor in tensors.items()
        if name not in records and not any(map(name.startswith, experts))
    ]
    table = f"{next(path for path, part in model.named_modules() if part is model.get_input_embeddings())}.weight"
    head = model.get_output_embeddings()
    multiplied = [
        layout
        for name, layout in records.items()
        if name != table or (head is not None and head.weight is model.get_input_embeddings().weight)
    ]
    size = sum(plain) + sum(layout.payload_bytes for layout in records.values())
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    bits: Bits = min(width for width in BITS if width >= manifest.bits)
    trunk_bits = _most_common(records.values())
    choice = Choice(bits, trunk_bits, manifest, size, tuple(multiplied), sum(plain), layers, as_it_is=True)
    return ModelChoices(checkpoint.name, str(path), None, model, (choice,))


def _most_common(matrices: Iterable[RecordLayout]) -> Bits:
    """Return the bits of most weights of a trunk's quantised ``matrices``, rounded up to TRUNK_BITS; 16 without any."""
    weights = Counter[int]()
    for layout in matrices:
        weights[layout.projections[0].bits] += layout.weights
    return min(width for width in TRUNK_BITS if width >= max(weights, key=weights.__getitem__, default=16))


def _choice(
    bits: Bits, trunk_bits: Bits, manifest: Manifest, size: int, records: Mapping[str, RecordLayout], model: Any
) -> Choice:
    """Return the choice with a trunk of ``size`` bytes. ``records``: layouts of the trunk's quantised matrices.

    The embedding is counted in ``plain_bytes`` only if it is also the head. Otherwise a token reads one row of it.
    """
    quantised = sum(layout.payload_bytes for layout in records.values())
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    recorded = any(model.get_submodule(path) is head for path in records)
    is_head = head is not None and head.weight is table and not recorded
    plain = size - quantised - (0 if is_head else table.numel() * model.dtype.itemsize)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return Choice(bits, trunk_bits, manifest, size, tuple(records.values()), max(plain, 0), layers)
