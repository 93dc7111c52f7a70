"""Plan of a conversion: what is made, and in which order. No weights are needed for a plan.

Linear modules of the trunk are quantised, except where that would do harm or not save memory. Blocks of a hub
checkpoint are made in such an order that few of its files are on the disk at any one time.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from moetier.runtime.checkpoint.blueprint import Blueprint, loaded_dtype, make_blueprint, records_of
from moetier.runtime.checkpoint.tensors import SourceTensor, StoredTensor
from moetier.runtime.config import OPTIONS
from moetier.runtime.moe.experts import experts_modules
from moetier.runtime.moe.gates import GATE_NAMES
from moetier.runtime.moe.linear import matrix_layout
from moetier.tiers.errors import ConfigError
from moetier.tiers.layout import TRUNK_BITS, Bits, RecordLayout
from moetier.tiers.manifest import TRUNK_RECORDS, Manifest, TrunkRecords
from moetier.tiers.quant.codec import DEFAULTS, group_and_pairs
from moetier.tiers.quant.hqq import SOLVER
from moetier.tiers.store.trunk import RECORD

from .encoder import MatrixRecord
from .trunk import TrunkFile, TrunkTensor, plan_trunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AT_ONCE = 2  # files on the disk at any one time: one is downloaded while blocks are made from the other


@dataclass(frozen=True)
class Options:
    """Options of a conversion. None stands for a default that depends on the bits or on the machine.

    Raises ConfigError if no model can be stored with the combination.
    """

    bits: Bits = 4  # per expert weight
    trunk_bits: Bits = 16  # per weight of the trunk's matrices
    group_size: int | None = None  # weights that share a pair
    pairs: str | None = None  # format of the pairs
    fast: bool = False  # round to the nearest value instead of using HQQ
    workers: int | None = None  # threads that quantise
    threads: int | None = None

    def __post_init__(self) -> None:
        OPTIONS["threads"].read("threads", self.threads)
        trunk_form(self.trunk_bits)
        fast = self.fast and self.trunk_bits == 16
        if self.bits == 16 and (self.group_size is not None or self.pairs is not None or fast):
            raise ConfigError(
                "With 16 bits nothing is quantised, so --group-size, --pairs and --fast have no effect.",
                "Leave out --group-size, --pairs and --fast, or choose fewer --bits.",
            )
        group_and_pairs(self.bits, self.group_size, self.pairs)


def trunk_form(bits: Bits) -> TrunkRecords | None:
    """Return the default format of the trunk's matrices with ``bits`` per weight; None for 16, if none is quantised.

    Raises ConfigError if a trunk can't have that many bits.
    """
    if bits not in TRUNK_BITS:
        raise ConfigError(
            f"A trunk of {bits} bits is not supported.", f"Give --trunk-bits {' or '.join(map(str, TRUNK_BITS))}."
        )
    return None if bits == 16 else TrunkRecords(bits, *DEFAULTS[bits])


def choose_matrices(model: PreTrainedModel, dtype: torch.dtype, form: TrunkRecords) -> dict[str, RecordLayout]:
    """Choose the linear modules whose weights are quantised. Return the layouts of their records, by module path.

    ``dtype``: the type in which ``model`` will be loaded. These are not quantised: gates; parts without experts, such
    as encoders of images and sound; weights that the architecture's code reads directly, keeps in another type or
    shares between modules; and weights that would not get smaller.
    """
    apart = _gates(model) + _towers(model)
    found = {}
    for path, module in model.named_modules():
        if type(module) is not nn.Linear or _within(path, apart):  # a subclass may do more than multiply
            continue
        weight, layout = f"{path}.weight", matrix_layout(module.out_features, module.in_features, form)
        if (
            layout.projections[0].bits != 16
            and layout.payload_bytes < 2 * layout.weights
            and path.rpartition(".")[2] not in _read_by(model, path)
            and loaded_dtype(model, weight, module.weight.dtype, dtype) == dtype
            and _stands_alone(model, weight)
        ):
            found[path] = layout
    return found


def _within(path: str, places: list[str]) -> bool:
    return any(path == place or path.startswith(f"{place}.") for place in places)


def _gates(model: PreTrainedModel) -> list[str]:
    """Return the module paths that a router beside an Experts module may have."""
    parents = [path.rpartition(".")[0] for path in experts_modules(model)]
    return [f"{parent}.{name}".removeprefix(".") for parent in parents for name in GATE_NAMES]


def _towers(model: PreTrainedModel) -> list[str]:
    from transformers import PreTrainedModel

    experts = list(experts_modules(model))
    parts = [path for path, module in model.named_modules() if path and isinstance(module, PreTrainedModel)]
    return [part for part in parts if not any(_within(path, [part]) for path in experts)]


def _stands_alone(model: PreTrainedModel, weight: str) -> bool:
    """Return whether no other module shares the parameter ``weight``. A head may share that of its embedding."""
    tied = model.all_tied_weights_keys
    if weight in tied.values():
        return False
    source = tied.get(weight)
    return source is None or isinstance(model.get_submodule(source.rpartition(".")[0]), nn.Embedding)


def _read_by(model: PreTrainedModel, path: str) -> set[str]:
    """Return the names of modules whose ``weight`` is read by the classes that contain the module at ``path``.

    Such classes, with fused kernels for example, read the weights instead of calling the module.
    """
    parts = path.split(".")
    around = [type(model.get_submodule(".".join(parts[:depth]))) for depth in range(len(parts))]
    return {name for made_by in around for base in made_by.__mro__ for name in _names_read(base)}


@cache
def _names_read(made_by: type) -> frozenset[str]:
    if not made_by.__module__.startswith("transformers.models."):
        return frozenset()
    return frozenset(re.findall(r"\bself(?:\.\w+)*\.(\w+)\.weight\b", inspect.getsource(made_by)))


@dataclass(frozen=True)
class ConversionPlan:
    """Plan of a conversion with given bits of the trunk. The bits of experts are chosen later, in ``manifest``."""

    blueprint: Blueprint
    form: TrunkRecords | None
    tensors: Mapping[str, SourceTensor]  # of the checkpoint

    @classmethod
    def of(
        cls, model: PreTrainedModel, dtype: torch.dtype, tensors: Mapping[str, SourceTensor], trunk_bits: Bits
    ) -> ConversionPlan:
        """Plan the conversion of ``model``, which is on the meta device. Remove all experts of each block but one.

        Blocks whose experts can't be read one by one keep all experts. ``tensors``: the tensors of the checkpoint, of
        any shape, by name. ``dtype``: the type in which the model will be loaded. Raises UnsupportedModelError or
        CheckpointError.
        """
        form = trunk_form(trunk_bits)
        chosen = choose_matrices(model, dtype, form) if form else ()
        return cls(make_blueprint(model, dtype, tensors, chosen), form, tensors)

    def manifest(self, options: Options, *, model: str, digest: str) -> Manifest:
        """Return the manifest of the store. ``model`` and ``digest``: name and digest of the source."""
        blocks, layouts = records_of(self.blueprint, bits=options.bits, group=options.group_size, pairs=options.pairs)
        return Manifest(
            model=model,
            source_digest=digest,
            blocks=blocks,
            layouts=layouts,
            version=version("moetier"),
            requires=(TRUNK_RECORDS,) if self.form else (),
            method="rounding" if options.fast else "hqq",
            solver=SOLVER,
            trunk_records=self.form,
        )

    def records(self, *, workers: int, fast: bool) -> dict[str, MatrixRecord]:
        """Return a MatrixRecord for each quantised matrix, by module path. Its ``chunks`` makes the bytes later.

        ``workers``: number of threads that quantise; ``fast``: round to the nearest value instead of using HQQ.
        """
        return {
            path: MatrixRecord(path, recipe, self.form, workers=workers, fast=fast)
            for path, recipe in self.blueprint.matrices.items()
            if self.form
        }

    def trunk(self, records: Mapping[str, MatrixRecord]) -> tuple[TrunkFile, ...]:
        """Return the files of the trunk; ``records`` are those of its quantised matrices."""
        of_trunk: dict[str, TrunkTensor] = {name: self.tensors[name] for name in self.blueprint.trunk}
        return plan_trunk(of_trunk | {f"{path}{RECORD}": record for path, record in records.items()})


@dataclass(frozen=True)
class Stage:
    """Blocks that are made from the same files, one after the other."""

    blocks: tuple[int, ...]
    files: frozenset[Path] = frozenset()
    present: frozenset[Path] = frozenset()  # ``files``, and files of earlier stages that later stages need
    ahead: Path | None = None  # file of the next stage to download meanwhile; None if ``present`` has AT_ONCE or more

    @property
    def at_once(self) -> frozenset[Path]:
        """All files that may be on the disk during the stage."""
        return self.present if self.ahead is None else self.present | {self.ahead}


def stages(files: Mapping[int, frozenset[Path]]) -> list[Stage]:
    """Group and order blocks by the files that they are made from, so that few files are on the disk at any one time.

    ``files``: the files that each block is made from, by its number. In a checkpoint, blocks are spread over files in
    the order of their numbers, or of their names ("10" before "2").
    """
    groups: list[tuple[list[int], frozenset[Path]]] = []
    for block in sorted(files, key=lambda block: (max(files[block]), min(files[block]), block)):
        if groups and files[block] == groups[-1][1]:
            groups[-1][0].append(block)
        else:
            groups.append(([block], files[block]))
    made = [group[1] for group in groups]
    none = frozenset[Path]()
    route = []
    for place, (blocks, needed) in enumerate(groups):
        present = none.union(*made[: place + 1]) & none.union(*made[place:])
        lacking = none.union(*made[place + 1 : place + 2]) - present
        ahead = min(lacking, default=None) if len(present) < AT_ONCE else None
        route.append(Stage(tuple(blocks), needed, present, ahead))
    return route


def most_bytes(planned: ConversionPlan, tensors: Iterable[StoredTensor]) -> int:
    """Estimate the most bytes of a hub checkpoint on the disk at any one time: its files, and the trunk's tensors.

    ``tensors``: all tensors of the checkpoint, of any shape.
    """
    sizes = Counter[Path]()
    for tensor in tensors:
        sizes[tensor.file] += tensor.nbytes
    route = stages(dict(enumerate(block.files for block in planned.blueprint.blocks)))
    parts = {part for file in planned.trunk({}) for tensor in file.tensors.values() for part in tensor.parts}
    parts |= {part for recipe in planned.blueprint.matrices.values() for part in recipe.parts}
    return max(sum(sizes[path] for path in stage.at_once) for stage in route) + sum(part.nbytes for part in parts)
