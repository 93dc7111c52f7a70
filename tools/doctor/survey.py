"""Survey of a model directory: its contents, from its manifest and the sizes of its files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moetier.tiers.layout import RecordLayout
    from moetier.tiers.manifest import Manifest
    from moetier.tiers.store.base import DirectoryStore

NO_TOKENIZER = "none: generate, chat and serve need the tokenizer files of the model"


def survey(store: DirectoryStore) -> dict[str, Any]:
    """Return the JSON that ``moetier inspect --json`` prints. Sizes are in bytes. No record is read."""
    from moetier.runtime.checkpoint.containers import container_of
    from moetier.runtime.checkpoint.model_config import is_checkpoint
    from moetier.tiers.errors import StoreError
    from moetier.tiers.manifest import FORMAT
    from moetier.tiers.store.mirror import read_mirrors
    from moetier.tiers.store.trunk import trunk_records
    from moetier.tools.convert.model_files import small_faults

    manifest = store.manifest
    directory = store.directory
    as_it_is = is_checkpoint(directory)
    # a store from before trunk files had checksums does not list them
    trunk = sum(store.other_files.values()) or sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    of_blocks = [fault for _, fault in sorted(store.faults.items())]
    # without duplicates, as blocks of a checkpoint share files
    faults = list(dict.fromkeys([*of_blocks, *store.other_file_faults().values()]))
    matrices = 0
    if manifest.trunk_records and not faults:
        try:
            matrices = len(trunk_records(directory, manifest))
        except StoreError as error:
            faults.append(error)
    mirrors: list[Path] = []
    try:
        mirrors = read_mirrors(directory)
    except StoreError as error:
        faults.append(error)
    small = list(small_faults(directory)) if manifest.trunk else []
    weights = sum(block.experts * manifest.layouts[block.array].weights for block in manifest.blocks)
    return {
        "directory": str(directory),
        "model": manifest.model,
        "format": FORMAT,
        "version": manifest.version,
        "requires": list(manifest.requires),
        "checkpoint": as_it_is,
        "linked": store.has_checksums if as_it_is else None,
        "source_digest": manifest.source_digest,
        "digest": manifest.digest,
        "blocks": [
            {"path": block.path, "array": block.array, "experts": block.experts, "top_k": block.top_k}
            for block in manifest.blocks
        ],
        "records": manifest.record_count,
        "layouts": {name: _layout(layout, manifest, name) for name, layout in manifest.layouts.items()},
        "expert_weights": weights,
        "expert_bytes": manifest.stored_bytes,
        "bits_per_weight": 8 * manifest.stored_bytes / weights,
        "trunk_bytes": trunk,
        "trunk_records": asdict(manifest.trunk_records) if manifest.trunk_records else None,
        "trunk_matrices": matrices,
        "varying_part": _varying_part(directory, manifest),
        "direct": store.is_direct,
        "trunk_files": {name: asdict(entry) for name, entry in sorted(manifest.trunk.items())},
        "tokenizer": container_of(directory).has_vocabulary(directory),
        "mirrors": [*map(str, mirrors)],
        "faults": [fault.cause for fault in [*faults, *small]],
    }


def _varying_part(directory: Path, manifest: Manifest) -> str | None:
    from moetier.runtime.checkpoint.model_config import config_of
    from moetier.runtime.model.same_bits import varying_part_by_default
    from moetier.tiers.errors import MoetierError

    try:
        return varying_part_by_default(config_of(directory), manifest)
    except MoetierError:  # the model can't be loaded, as `moetier verify` says
        return "unknown without config.json"


def _layout(layout: RecordLayout, manifest: Manifest, array: str) -> dict[str, Any]:
    return {
        "blocks": manifest.shape(array)[0],
        "record_bytes": layout.record_bytes,
        "slot_bytes": layout.slot_bytes,
        "projections": [
            {
                "name": p.name,
                "shape": list(p.shape),
                "bits": p.bits,
                "group": p.group,
                "pairs": p.pairs,
                "dtype": p.dtype,
                **({"coding": p.coding, "scales": p.scales} if p.coding else {}),
            }
            for p in layout.projections
        ],
        "biases": [{"name": b.name, "size": b.size, "dtype": b.dtype} for b in layout.biases],
        "sections": [
            {"name": s.name, "dtype": s.dtype, "shape": list(s.shape), "offset": s.offset} for s in layout.sections
        ],
    }
