"""Order in which blocks are made of a hub checkpoint's files, and which files are on the disk meanwhile; pure."""

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
    """Blocks that are made of the same files, one after the other."""

    blocks: tuple[int, ...]
    files: frozenset[Path] = frozenset()
    present: frozenset[Path] = frozenset()  # also those of earlier stages that a later one needs
    ahead: Path | None = None  # downloaded meanwhile: the next stage's first, if no more than AT_ONCE are there then

    @property
    def at_once(self) -> frozenset[Path]:
        """Most files that are on the disk during the stage."""
        return self.present if self.ahead is None else self.present | {self.ahead}


def stages(files: Mapping[int, frozenset[Path]]) -> list[Stage]:
    """Group and order blocks by the files that each is made from, so that few files are there at a time.

    Blocks may lie in files by number, or by name ("10" before "2").
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


def most_bytes(draft: Draft, tensors: Iterable[StoredTensor]) -> int:
    """Return about how many bytes of a hub checkpoint are on the disk at a time: files, and the trunk's tensors.

    ``tensors``: all of the checkpoint, of any shape [rows, ...].
    """
    sizes = Counter[Path]()
    for tensor in tensors:
        sizes[tensor.file] += tensor.nbytes
    route = stages(dict(enumerate(block.files for block in draft.blueprint.blocks)))
    parts = {part for file in draft.trunk({}) for tensor in file.tensors.values() for part in tensor.parts}
    parts |= {part for recipe in draft.blueprint.matrices.values() for part in recipe.parts}
    return max(sum(sizes[path] for path in stage.at_once) for stage in route) + sum(part.nbytes for part in parts)
