"""Model directory that a conversion writes: what is there already, how that differs from the plan, and small files.

The manifest inside ``experts.zarr`` is written last of all, so a directory without it has an incomplete conversion.
Until then ``conversion.json`` has the command that resumes it, and the quantisation errors of the finished blocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

from moetier.runtime.checkpoint.files import COPIED, INDEX, Checkpoint, carried, contained
from moetier.tiers.errors import CheckpointError, DiskSpaceError, StoreError, TargetError, TargetExistsError
from moetier.tiers.manifest import FORMAT, Manifest
from moetier.tiers.store.atomic import PARTIAL, make_folders, sync_folder, write_durably
from moetier.tiers.store.folder import (
    GROUP,
    JOURNAL,
    METADATA,
    MIRRORS,
    ORIGIN,
    PLAN,
    read_json,
    read_origin,
    read_plan,
)
from moetier.tiers.store.shard import ShardFile
from moetier.tiers.store.writer import is_complete
from moetier.tools.convert.files import free_bytes

from .files import delete, empty, locked
from .trunk import TrunkFile, index_of

METHODS = {"hqq": "HQQ", "rounding": "plain rounding (--fast)"}


def _of_experts(name: str, manifest: Manifest) -> str:
    """Return the value of the field ``name`` in the experts' projections, as text; different values are joined."""
    projections = [each for layout in manifest.layouts.values() for each in layout.projections]
    return " and ".join(sorted({str(getattr(each, name)) for each in projections}))


# options that a manifest shows: the fields that an option affects, its description, and a function for its value
OPTIONS: tuple[tuple[set[str], str, Callable[[Manifest], str]], ...] = (
    ({"layouts"}, "experts of {} bits", partial(_of_experts, "bits")),
    ({"layouts"}, "experts in groups of {}", partial(_of_experts, "group")),
    ({"layouts"}, "scales of experts in {}", partial(_of_experts, "pairs")),
    ({"trunk_records", "requires"}, "a trunk of {} bits", lambda manifest: str(manifest.trunk_bits)),
    ({"method"}, "{}", lambda manifest: METHODS.get(manifest.method, manifest.method)),
)


def difference(found: Manifest, asked: Manifest) -> str:
    """Return a text that says how two plans differ, "" if they are the same.

    It names options with their values, and fields that no option sets.
    """
    if found.model != asked.model:
        return f"of {found.model}, and {asked.model} was asked for"
    rest = [each.name for each in fields(asked) if getattr(found, each.name) != getattr(asked, each.name)]
    said = []
    for names, option, of in OPTIONS:
        if names & set(rest) and (old := of(found)) != (new := of(asked)):
            said.append(f"with {option.format(old)}, and {new} {'were' if 'bits' in option else 'was'} asked for")
            rest = [each for each in rest if each not in names]  # they follow from the option
    return "; ".join([*said, *([f"they differ in {', '.join(rest)}"] if rest else [])])


CONFIG = "config.json"
DOWNLOAD = "download"  # folder of the download; removed when the conversion is finished
WRITTEN = re.compile(rf"trunk-[\d-]+of-\d+\.safetensors|{re.escape(INDEX)}|{CONFIG}|{ORIGIN}|{JOURNAL}|{MIRRORS}")
SLACK_BYTES = 1 << 20  # folders and small files
COMMIT_LENGTH = 40  # characters of the hub's commits; a digest has more


@dataclass(frozen=True)
class Target:
    """Model directory that a conversion is to write.

    ``small`` holds the bytes of every file that is neither trunk nor experts, by relative name.

    ``passing``: the source is downloaded during the conversion, so that its digest is known only at the end. Until then
    ``plan`` has the hub's commit in place of the digest. The file ``ORIGIN`` keeps that commit.
    """

    folder: Path
    plan: Manifest
    trunk: tuple[TrunkFile, ...]
    small: Mapping[str, bytes]
    passing: bool = False

    @property
    def store(self) -> Path:
        """Folder of the expert store."""
        return self.folder / GROUP

    def is_complete(self) -> bool:
        """Return whether the folder holds this conversion completely.

        Raises TargetExistsError where it holds anything but this conversion or a part of it.
        """
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return False
        if not self.folder.is_dir():
            raise TargetExistsError(f"{self.folder} is not a folder.", "Choose another place.")
        if not is_ours(self.folder):
            raise TargetExistsError(
                f"{self.folder} holds files that are no moetier model.",
                "Choose another folder, or empty this one; moetier deletes nothing that it did not write.",
            )
        try:
            found = read_plan(self.store)
        except StoreError as error:
            raise self._differs(f"one that can't be read ({error.cause})") from error
        if found is None:
            if any(not path.name.endswith(PARTIAL) for path in self.store.iterdir()):
                raise self._differs("one without its plan, as when its removal was cut")
            return False
        finished = (self.store / METADATA).exists()
        if finished and self.passing:
            found = replace(found, source_digest=read_origin(self.folder).get("revision", ""))
        if differing := difference(found, self.plan):
            raise self._differs(differing)
        whole = (
            finished
            and all(file.is_complete(self.folder) for file in self.trunk)
            and all((self.folder / name).is_file() for name in self.small)
            and len(self.finished_blocks) == len(self.plan.blocks)
        )
        if finished and self.passing and not whole:  # its source was removed, so it can't be completed
            raise self._differs("the same, of which files are missing")
        return whole

    def _differs(self, what: str) -> TargetExistsError:
        return TargetExistsError(
            f"{self.folder} holds a different conversion: {what}.",
            "Choose another folder, or replace it with --overwrite.",
        )

    @property
    def finished_blocks(self) -> frozenset[int]:
        """Blocks whose shards are complete."""
        blocks = range(len(self.plan.blocks))
        return frozenset(block for block in blocks if is_complete(ShardFile.of(self.store, self.plan, block)))

    def missing_bytes(self, *, replacing: bool = False) -> int:
        """Bytes that are still to be written; with ``replacing``, all of them."""
        shards = [ShardFile.of(self.store, self.plan, block) for block in range(len(self.plan.blocks))]
        return (
            sum(shard.file_bytes for shard in shards if replacing or not is_complete(shard))
            + sum(file.size for file in self.trunk if replacing or not file.is_complete(self.folder))
            + sum(map(len, self.small.values()))
        )

    def check_disk(self, beside: int = 0, *, replacing: bool = False) -> None:
        """Raise DiskSpaceError unless the disk has room for what is still to be written and ``beside`` bytes of source.

        With ``replacing``, the present content of the folder counts as removed.
        """
        free = free_bytes(self.folder) + (_freed_bytes(self.folder) if replacing else 0)
        needed = self.missing_bytes(replacing=replacing) + beside + SLACK_BYTES
        if needed > free:
            source = f", {beside:,} of them for files of the checkpoint" if beside else ""
            then = " once what is there is removed" if replacing else ""
            raise DiskSpaceError(
                f"{self.folder} needs {needed:,} bytes more{source}; {free:,} are free{then}.",
                "Free some space, choose fewer --bits and --trunk-bits, or another disk.",
            )

    def write_small(self) -> None:
        """Write the files of ``small``."""
        for name, data in self.small.items():
            make_folders((self.folder / name).parent)
            write_durably(self.folder / name, data)

    def read_journal(self) -> dict[int, float]:
        """Return the relative error of each block that an earlier run finished."""
        try:
            found = read_json(self.folder / JOURNAL)
            return {int(block): float(error) for block, error in found["errors"].items()}
        except (StoreError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return {}

    def write_journal(self, command: list[str], errors: Mapping[int, float]) -> None:
        """Write the command that resumes the conversion, and the errors of finished blocks."""
        journal = {"command": command, "errors": {str(block): error for block, error in sorted(errors.items())}}
        write_durably(self.folder / JOURNAL, json.dumps(journal).encode())

    def tidy(self) -> None:
        """Remove the files that are needed only during a conversion. For after the manifest is written."""
        for path in (self.store / PLAN, self.folder / JOURNAL):
            if path.exists():
                path.unlink()
                sync_folder(path.parent)
        for path in _downloaded(self.folder):
            delete(path)
            sync_folder(self.folder)


def revision_under_way(folder: Path, name: str) -> str | None:
    """Return the commit from which a cut conversion of the hub's ``name`` into ``folder`` is made, or None."""
    try:
        plan = read_plan(folder / GROUP)
    except StoreError:
        return None
    return plan.source_digest if plan and plan.model == name and len(plan.source_digest) == COMMIT_LENGTH else None


def is_ours(folder: Path) -> bool:
    """Return whether a conversion wrote, or began to write, this folder."""
    return (folder / GROUP).is_dir()


def check_place(folder: Path, source: Path) -> None:
    """Raise TargetError if the target ``folder`` is, contains or lies in its own source."""
    target, source = folder.resolve(), source.resolve()
    if target == source or target.is_relative_to(source) or source.is_relative_to(target):
        raise TargetError(f"{folder} overlaps with the source, {source}.", "Choose a folder outside it.")


def remove(folder: Path) -> None:
    """Remove everything that moetier writes into a model directory, except the store's own folder, which is left empty.

    Raises TargetError where another conversion is under way.
    """
    with locked(str(folder), folder):
        empty(folder, [*_downloaded(folder), *_beside_store(folder)])


def _beside_store(folder: Path) -> Iterator[Path]:
    """Yield the files that moetier writes into a model directory, but for the store and downloads."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix().removesuffix(PARTIAL)
        if WRITTEN.fullmatch(name) or COPIED.fullmatch(name):
            yield path


def _freed_bytes(folder: Path) -> int:
    """Return the bytes of the disk that ``remove`` frees, without downloads.

    A file that is downloaded already does not count as needed, so it must not count as freed either.
    """
    found = [path.lstat() for path in (*_beside_store(folder), *(folder / GROUP).rglob("*"))]
    return sum(512 * file.st_blocks for file in found if file.st_nlink == 1)  # else another name keeps the data


def _downloaded(folder: Path) -> list[Path]:
    path = folder / DOWNLOAD
    return [path] if path.is_dir() and not path.is_symlink() else []


def small_files(
    checkpoint: Checkpoint, bits: int, trunk_bits: int, dtype: str, trunk: tuple[TrunkFile, ...]
) -> dict[str, bytes]:
    """Return small files by name: config.json, the trunk's index, and copies of tokenizer, chat template, configs."""
    made = {name: _without_code(contained(checkpoint.folder, name)) for name in checkpoint.copied}
    if checkpoint.revision is not None:
        origin = {"id": checkpoint.name, "revision": checkpoint.revision}
        made[ORIGIN] = json.dumps(origin, indent=2).encode() + b"\n"
    config = carried(checkpoint.config)
    if not config.keys() & {"dtype", "torch_dtype"}:
        config["dtype"] = dtype
    config["quantization_config"] = {"quant_method": "moetier", "format": FORMAT, "bits": bits}
    if trunk_bits != 16:
        config["quantization_config"]["trunk_bits"] = trunk_bits
    config["experts_implementation"] = "moetier"  # loading without moetier fails then, and makes no random experts
    return {**made, INDEX: index_of(trunk), CONFIG: json.dumps(config, indent=2).encode() + b"\n"}


def _without_code(path: Path) -> bytes:
    """Return a copied file's bytes, without the code (auto_map) that a JSON file names."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}.", "Check the file and its disk.") from error
    if path.suffix == ".json" and b'"auto_map"' in data:
        found = json.loads(data, object_hook=lambda d: {name: value for name, value in d.items() if name != "auto_map"})
        return json.dumps(found, indent=2, ensure_ascii=False).encode() + b"\n"
    return data
