"""Survey of a model directory: its contents, from its manifest and the sizes of its files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moetier.tiers.extents.reader import ExtentStore
    from moetier.tiers.layout import RecordLayout
    from moetier.tiers.manifest import Manifest
    from moetier.tiers.store.reader import ExpertStore

NO_TOKENIZER = "none: generate, chat and serve need the tokenizer files of the model"


def remedy(store: ExpertStore | ExtentStore) -> str:
    """Return what to do about damaged files, as inspect, verify and doctor print it."""
    from moetier.tiers.extents.reader import ExtentStore
    from moetier.tiers.store.folder import CACHE

    if isinstance(store, ExtentStore):
        return "Get the checkpoint's own files again. If they were changed on purpose, run moetier link again."
    if (store.directory / CACHE).exists():
        return (
            f"Remove {store.directory}, and give the address again. If that does not help, push the original there "
            "again with `moetier push --overwrite`."
        )
    return "Restore the files named, or remove them and run the same conversion again: it makes only what is missing."


def survey(store: ExpertStore | ExtentStore) -> dict[str, Any]:
    """Return the JSON that ``moetier inspect --json`` prints. Sizes are in bytes. No record is read."""
    from moetier.runtime.checkpoint.containers import container_of
    from moetier.tiers.errors import StoreError
    from moetier.tiers.extents.reader import ExtentStore
    from moetier.tiers.manifest import FORMAT
    from moetier.tiers.store.mirror import read_mirrors
    from moetier.tiers.store.trunk import trunk_faults, trunk_records
    from moetier.tools.convert.files import small_faults

    manifest = store.manifest
    directory = store.directory
    files = store.paths if isinstance(store, ExtentStore) else list(directory.glob("*.safetensors"))
    trunk = sum(file.stat().st_size for file in files if file.is_file())
    faults, linked = [fault for _, fault in sorted(store.faults.items())], None
    if isinstance(store, ExtentStore):  # the experts are in the same files
        trunk -= sum(block.experts * manifest.layouts[block.array].payload_bytes for block in manifest.blocks)
        faults, linked = list(store.file_faults.values()), store.table.is_linked
    if manifest.trunk:  # else it is a store without a trunk, or from before trunk files had checksums
        faults += trunk_faults(directory, manifest).values()
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
        "checkpoint": linked is not None,
        "linked": linked,
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
        "direct": store.direct,
        "trunk_files": {name: asdict(entry) for name, entry in sorted(manifest.trunk.items())},
        "tokenizer": container_of(directory).has_vocabulary(directory),
        "mirrors": [*map(str, mirrors)],
        "faults": [fault.cause for fault in [*faults, *small]],
    }


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
