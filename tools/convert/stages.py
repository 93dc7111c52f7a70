"""Stages: in which order blocks are made of a checkpoint's files that pass by, and which are here meanwhile; pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moetier.runtime.checkpoint.safetensors import StoredTensor

from .draft import Draft

AT_ONCE = 2  # files, where one of them is downloaded while blocks are made of the other


@dataclass(frozen=True)
class Stage:
    """Blocks that are made of the same ``files``, one after the other; ``present`` are all that are there meanwhile:
    others have been before, and will be needed behind them. ``following`` is the first that the next stage lacks."""

    blocks: tuple[int, ...]
    files: frozenset[Path]
    present: frozenset[Path]
    following: Path | None

    @property
    def ahead(self) -> Path | None:
        """What is downloaded while the blocks are made: no more than AT_ONCE files are there for that."""
        return self.following if len(self.present) < AT_ONCE else None

    @property
    def at_once(self) -> frozenset[Path]:
        return self.present if self.ahead is None else self.present | {self.ahead}


def stages(files: Mapping[int, frozenset[Path]]) -> list[Stage]:
    """Of the files that each block is made from. The order is that of files, so that few are there at a time: blocks
    may lie in them by number, or by name ("10" before "2")."""
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
        route.append(Stage(tuple(blocks), needed, present, min(lacking, default=None)))
    return route


def most_bytes(draft: Draft, tensors: Iterable[StoredTensor]) -> int:
    """About what is on the disk at a time of a checkpoint that passes by: files, and the trunk's tensors."""
    sizes = Counter[Path]()
    for tensor in tensors:
        sizes[tensor.file] += tensor.nbytes
    route = stages(dict(enumerate(block.files for block in draft.blueprint.blocks)))
    parts = {part for file in draft.trunk({}) for tensor in file.tensors.values() for part in tensor.parts}
    parts |= {part for recipe in draft.blueprint.matrices.values() for part in recipe.parts}
    return max(sum(sizes[path] for path in stage.at_once) for stage in route) + sum(part.nbytes for part in parts)
