"""Target of a conversion: what the folder holds already, how that differs from the plan, and its small files.

The manifest in ``experts.zarr`` is written last, so a directory without a manifest holds an incomplete conversion.
Until then, ``conversion.json`` has the command that resumes the conversion, and the errors of the finished blocks.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

from moetier.runtime.checkpoint.config_json import carried
from moetier.runtime.checkpoint.containers import Checkpoint
from moetier.runtime.checkpoint.safetensors_folder import INDEX, contained
from moetier.tiers.errors import (
    DOWNLOAD_AGAIN,
    CheckpointError,
    DiskSpaceError,
    StoreError,
    TargetError,
    TargetExistsError,
)
from moetier.tiers.manifest import FORMAT, FileSum, Manifest
from moetier.tiers.small_names import COPIED
from moetier.tiers.store.atomic import PARTIAL, make_folders, sync_folder, write_durably
from moetier.tiers.store.folder import (
    GROUP,
    JOURNAL,
    METADATA,
    ORIGIN,
    PLAN,
    parse_json,
    read_json,
    read_origin,
    read_plan,
)
from moetier.tiers.store.shard import ShardFile
from moetier.tiers.store.writer import is_complete

from .model_card import LIBRARY
from .model_files import (
    COMMIT,
    CONFIG,
    DOWNLOAD,
    delete,
    downloaded_folders,
    file_sum,
    free_bytes,
    freed_bytes,
    has_lost_store,
    is_ours,
)
from .trunk_writer import TrunkFile, index_of

INSTEAD = "Choose another folder, or replace it with --overwrite."
METHODS = {"hqq": "HQQ", "rounding": "plain rounding (--fast)", "native": "their checkpoint"}


def _of_experts(name: str, manifest: Manifest) -> str:
    """Return the value of the field ``name`` of the experts' projections, as text; if they differ, all the values."""
    projections = [projection for layout in manifest.layouts.values() for projection in layout.projections]
    return " and ".join(sorted({str(getattr(projection, name)) for projection in projections}))


# options that can be told from a manifest: the fields that an option affects, its description, and how to get its value
COMPARED_OPTIONS: tuple[tuple[set[str], str, Callable[[Manifest], str]], ...] = (
    ({"layouts"}, "experts of {} bits", partial(_of_experts, "bits")),
    ({"layouts"}, "experts in groups of {}", partial(_of_experts, "group")),
    ({"layouts"}, "scales of experts in {}", partial(_of_experts, "pairs")),
    ({"trunk_records", "requires"}, "a trunk of {} bits", lambda manifest: str(manifest.trunk_bits)),
    ({"method"}, "weights quantised by {}", lambda manifest: METHODS.get(manifest.method, manifest.method)),
)


def difference(earlier: Manifest, asked: Manifest) -> str:
    """Return a text that says how the ``earlier`` plan differs from the one ``asked`` for; "" if it does not.

    The text gives both values of options, and only the names of fields that no option sets.
    """
    if earlier.model != asked.model:
        return f"it is of {earlier.model}, not of {asked.model}"
    rest = [field.name for field in fields(asked) if getattr(earlier, field.name) != getattr(asked, field.name)]
    said = []
    for names, option, of in COMPARED_OPTIONS:
        if names & set(rest) and (old := of(earlier)) != (new := of(asked)):
            said.append(f"it has {option.format(old)}, not {new}")
            rest = [field for field in rest if field not in names]  # the option explains these fields
    return "; ".join([*said, *([f"its manifest differs in {', '.join(rest)}"] if rest else [])])


SLACK_BYTES = 1 << 20  # allowed for folders and small files


@dataclass(frozen=True)
class Target:
    """Model directory that a conversion will write.

    ``small`` has the content of every file that belongs neither to the trunk nor to the store, by its path in
    ``folder``.

    ``is_streamed``: whether the source is downloaded during the conversion. If so, its digest is known only at the end.
    Until then, ``manifest`` has the commit in place of the digest. The file ``ORIGIN`` keeps the commit.
    """

    folder: Path
    manifest: Manifest  # of the store, without what is known only at the end (``Manifest.plan``)
    trunk: tuple[TrunkFile, ...]
    small: Mapping[str, bytes]
    is_streamed: bool = False

    @property
    def store(self) -> Path:
        """Folder of the expert store."""
        return self.folder / GROUP

    def is_complete(self) -> bool:
        """Return whether the folder holds the complete result of this conversion.

        If it holds a part of the result, is empty or does not exist, return False. If it holds anything else, raise
        TargetExistsError. Only names and sizes of files are checked.
        """
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return False
        if not self.folder.is_dir():
            raise TargetExistsError(f"{self.folder} is not a folder.", "Choose another path for the model directory.")
        if has_lost_store(self.folder):
            raise TargetExistsError(f"{self.folder} is incomplete: its {GROUP} is missing.", INSTEAD)
        if not is_ours(self.folder):
            raise TargetExistsError(
                f"{self.folder} holds files, but is not a model directory of moetier.",
                "Choose another folder, or empty this one; moetier deletes no files that it did not write.",
            )
        try:
            earlier = self.existing_manifest()
        except StoreError as error:
            raise self._differs(f"its plan can't be read ({error.cause})") from error
        if earlier is None:
            if any(not path.name.endswith(PARTIAL) for path in self.store.iterdir()):
                raise self._differs("its plan is missing, as after an interrupted removal")
            return False
        finished = (self.store / METADATA).exists()
        if differing := difference(earlier, self.manifest):
            raise self._differs(differing)
        whole = (
            finished
            and all(file.is_complete(self.folder) for file in self.trunk)
            and all((self.folder / name).is_file() for name in self.small)
            and len(self.finished_blocks) == len(self.manifest.blocks)
        )
        if finished and self.is_streamed and not whole:  # the downloaded source was deleted, so it can't be completed
            raise self._differs("it was complete, and some of its files are missing now")
        return whole

    def existing_manifest(self) -> Manifest | None:
        """Return the planned manifest of what the folder holds, to compare it with ``manifest``; None if there is none.

        Raises StoreError if it can't be read.
        """
        earlier = read_plan(self.store)
        if earlier is not None and self.is_streamed and (self.store / METADATA).exists():
            return replace(earlier, source_digest=read_origin(self.folder).get("revision", ""))
        return earlier

    def _differs(self, what: str) -> TargetExistsError:
        return TargetExistsError(
            f"{self.folder} holds a different conversion: {what}.",
            INSTEAD,
        )

    @property
    def finished_blocks(self) -> frozenset[int]:
        """Numbers of the blocks whose shards are complete."""
        blocks = range(len(self.manifest.blocks))
        return frozenset(block for block in blocks if is_complete(ShardFile.of(self.store, self.manifest, block)))

    def missing_bytes(self, *, replacing: bool = False) -> int:
        """Return how many bytes are still to be written; with ``replacing``, the bytes of the whole result."""
        shards = [ShardFile.of(self.store, self.manifest, block) for block in range(len(self.manifest.blocks))]
        return (
            sum(shard.file_bytes for shard in shards if replacing or not is_complete(shard))
            + sum(file.size for file in self.trunk if replacing or not file.is_complete(self.folder))
            + sum(map(len, self.small.values()))
        )

    def check_disk(self, beside: int = 0, *, replacing: bool = False) -> None:
        """Raise DiskSpaceError unless the disk has room for what is still to be written, and for ``beside`` bytes more.

        ``beside``: bytes of downloaded files. With ``replacing``, the folder's present content counts as removed.
        """
        free = free_bytes(self.folder) + (freed_bytes(self.folder) if replacing else 0)
        needed = self.missing_bytes(replacing=replacing) + beside + SLACK_BYTES
        if needed > free:
            source = f", {beside:,} of them for files of the checkpoint" if beside else ""
            then = " once the old conversion is removed" if replacing else ""
            raise DiskSpaceError(
                f"{self.folder} needs {needed:,} bytes more{source}; {free:,} are free{then}.",
                "Free some space, choose fewer --bits and --trunk-bits, or another disk.",
            )

    def write_small(self) -> None:
        """Write the files of ``small``."""
        for name, data in self.small.items():
            make_folders((self.folder / name).parent)
            write_durably(self.folder / name, data)

    @property
    def copied(self) -> dict[str, FileSum]:
        """The sums of the files of the checkpoint in ``small``, by name."""
        return {name: file_sum(data) for name, data in self.small.items() if COPIED.fullmatch(name)}

    def read_journal(self) -> dict[int, float]:
        """Return the relative errors of the blocks that earlier runs finished, by number; {} if they can't be read."""
        try:
            return {int(block): float(error) for block, error in read_json(self.folder / JOURNAL)["errors"].items()}
        except (StoreError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return {}

    def write_journal(self, command: Sequence[str], errors: Mapping[int, float]) -> None:
        """Write the command that resumes the conversion, and the relative errors of finished blocks, by number."""
        journal = {"command": command, "errors": {str(block): error for block, error in sorted(errors.items())}}
        write_durably(self.folder / JOURNAL, json.dumps(journal).encode())

    def tidy(self) -> None:
        """Remove the files that are needed only during a conversion. Call this after the manifest is written."""
        for path in (self.store / PLAN, self.folder / JOURNAL):
            if path.exists():
                path.unlink()
                sync_folder(path.parent)
        for path in downloaded_folders(self.folder):
            delete(path)
        with contextlib.suppress(OSError):  # there is none, or it has files of the user
            (self.folder / DOWNLOAD).rmdir()
            sync_folder(self.folder)


def revision_under_way(folder: Path, name: str) -> str | None:
    """Return the commit of the hub checkpoint ``name`` whose conversion into ``folder`` was interrupted, or None."""
    try:
        plan = read_plan(folder / GROUP)
    except StoreError:
        return None
    return plan.source_digest if plan and plan.model == name and COMMIT.fullmatch(plan.source_digest) else None


def check_place(folder: Path, source: Path) -> None:
    """Raise TargetError if ``folder`` and ``source`` are the same, or if one of them contains the other."""
    target, source = folder.resolve(), source.resolve()
    if target == source or target.is_relative_to(source) or source.is_relative_to(target):
        raise TargetError(
            f"{folder} and the source {source} overlap.",
            "Choose a folder that neither contains the source nor lies in it.",
        )


def small_files(
    checkpoint: Checkpoint, bits: int, trunk_bits: int, dtype: str, trunk: tuple[TrunkFile, ...]
) -> dict[str, bytes]:
    """Return the content of each small file, by name: config.json, the trunk's index, and files of the checkpoint.

    ``bits`` and ``trunk_bits`` are written into config.json, and ``dtype`` if the checkpoint's config has none.
    """
    contents = {name: _without_code(contained(checkpoint.folder, name)) for name in checkpoint.copied}
    contents |= checkpoint.generated_files()
    if checkpoint.revision is not None:
        origin = {"id": checkpoint.name, "revision": checkpoint.revision}
        contents[ORIGIN] = json.dumps(origin, indent=2).encode() + b"\n"
    config = carried(checkpoint.config)
    if not config.keys() & {"dtype", "torch_dtype"}:
        config["dtype"] = dtype
    config["quantization_config"] = {"quant_method": "moetier", "format": FORMAT, "bits": bits}
    if trunk_bits != 16:
        config["quantization_config"]["trunk_bits"] = trunk_bits
    config["library_name"] = LIBRARY
    config["experts_implementation"] = "moetier"  # without moetier, loading then fails instead of making random experts
    return {**contents, INDEX: index_of(trunk), CONFIG: json.dumps(config, indent=2).encode() + b"\n"}


def _without_code(path: Path) -> bytes:
    """Return the bytes of a file to copy. Of a JSON file, leave out auto_map, which names code."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}.", "Check the file and its disk.") from error
    if path.suffix == ".json" and b'"auto_map"' in data:
        parse_json(data, str(path), DOWNLOAD_AGAIN, limit=len(data))  # refuses most of what the next line can't read
        try:
            parsed = json.loads(
                data, object_hook=lambda d: {name: value for name, value in d.items() if name != "auto_map"}
            )
        except ValueError as error:  # an integer has thousands of digits
            raise CheckpointError(f"{path} can't be read: {error}.", DOWNLOAD_AGAIN) from error
        return json.dumps(parsed, indent=2, ensure_ascii=False).encode() + b"\n"
    return data
