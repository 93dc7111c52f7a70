"""Map of a model's experts on a terminal, block by expert: which are in slots, and how much they are used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from moetier.proto.expert_store_pb2 import Block

Colour = tuple[int, int, int]
Cell = tuple[float, float]  # share of the cell's experts that are in slots, mean uses of an expert

ABSENT: tuple[Colour, Colour] = (44, 48, 55), (232, 140, 45)  # not used, used most
READY: tuple[Colour, Colour] = (25, 62, 112), (128, 194, 255)
TALLEST = 3  # lines of a block at most
TICK = 8  # columns between two numbers of the axis, at least


@dataclass(frozen=True, slots=True)
class Grid:
    """Layout of a model's map. Where the map does not fit, several experts or blocks share a cell."""

    label: int  # characters before each line
    width: int  # characters of a cell
    lines: int  # of a cell; 0: two rows of cells share a line, as upper and lower half
    experts: int  # of a cell
    blocks: int  # of a cell

    @classmethod
    def of(cls, blocks: int, experts: int, width: int, height: int) -> Grid:
        """Lay out a map of ``width`` columns and ``height`` lines; the first is the axis, the last the legend."""
        label = len(str(max(blocks - 1, 0))) + 1
        columns, left = max(width - label, 1), max(height - 2, 1)
        lines = min(left // max(blocks, 1), TALLEST)
        return cls(
            label,
            width=max(min(columns // max(experts, 1), 3 * lines + 1), 1),
            lines=lines,
            experts=max(math.ceil(experts / columns), 1),
            blocks=1 if lines else math.ceil(blocks / (2 * left)),
        )


def heatmap(blocks: Sequence[Block], uses: Sequence[Sequence[float]], width: int, height: int) -> Text:
    """Draw the map, in ``width`` columns and ``height`` lines. ``uses``: of every expert, by block."""
    most = max((len(row) for row in uses), default=0)
    if not most:
        return Text("The daemon, of an earlier version, tells nothing of experts.", "dim")
    grid = Grid.of(len(blocks), most, width, height)
    cells = [
        _cells(blocks[at : at + grid.blocks], uses[at : at + grid.blocks], grid.experts, most)
        for at in range(0, len(blocks), grid.blocks)
    ]
    top = max((cell[1] for row in cells for cell in row if cell is not None), default=0.0) or 1.0
    rows = [[None if cell is None else colour(cell[0], cell[1] / top) for cell in row] for row in cells]
    text = Text(no_wrap=True, overflow="crop").append(_axis(grid, len(rows[0]), width), "dim")
    for at in range(0, len(rows), 1 if grid.lines else 2):
        number = f"\n{at * grid.blocks:>{grid.label - 1}} "
        if grid.lines:
            for line in range(grid.lines):
                text.append(number if line == 0 else "\n" + " " * grid.label, "dim")
                _append(text, rows[at], grid.width, "▆" if line == 0 else "█")
        else:
            text.append(number, "dim")
            _append_pairs(text, rows[at], rows[at + 1] if at + 1 < len(rows) else [None] * len(rows[at]), grid.width)
    return text.append_text(_legend(grid))


def colour(ready: float, heat: float) -> str:
    """Return the colour, "#rrggbb", of experts of which the share ``ready`` is in slots.

    ``heat``: how much they are used, as a share of the most used.
    """
    heat = math.sqrt(max(heat, 0.0))  # the root, so that a few experts do not make all others pale
    red, green, blue = _mix(_mix(*ABSENT, heat), _mix(*READY, heat), ready)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _cells(blocks: Sequence[Block], uses: Sequence[Sequence[float]], together: int, most: int) -> list[Cell | None]:
    """Return one row of cells for ``blocks``, each of ``together`` experts; None for a cell without experts.

    ``most``: number of experts in the largest block.
    """
    ready = [set(block.ready) for block in blocks]
    found: list[Cell | None] = []
    for at in range(0, most, together):
        one = [
            (expert in there, row[expert])
            for there, row in zip(ready, uses, strict=True)
            for expert in range(at, min(at + together, len(row)))
        ]
        count = len(one)
        found.append((sum(there for there, _ in one) / count, sum(use for _, use in one) / count) if one else None)
    return found


def _append(text: Text, row: Sequence[str | None], width: int, mark: str) -> None:
    """Append a line of cells, with a gap between those that are wide enough."""
    gap = " " if width > 2 else ""
    for value in row:
        text.append((" " if value is None else mark) * (width - len(gap)) + gap, value or "")


def _append_pairs(text: Text, upper: Sequence[str | None], lower: Sequence[str | None], width: int) -> None:
    """Append two rows as one line of half blocks: foreground colour for the upper row, background for the lower."""
    for above, below in zip(upper, lower, strict=True):
        if above is not None:
            text.append("▀" * width, above if below is None else f"{above} on {below}")
        else:
            text.append(("▄" if below else " ") * width, below or "")


def _axis(grid: Grid, cells: int, width: int) -> str:
    """Return the axis: numbers of experts above their cells, without those that would not fit into ``width``."""
    line = " " * grid.label
    step = 1 if grid.width > 3 else max(TICK // grid.width, 1)
    for at in range(0, cells, step):
        longer = line.ljust(grid.label + at * grid.width) + str(at * grid.experts)
        if len(longer) > max(width, grid.label + 1):
            break
        line = longer
    return line


def _legend(grid: Grid) -> Text:
    text = Text("\n" + " " * grid.label)
    for there, name in ((1, "ready"), (0, "absent")):
        for heat in (0.0, 0.1, 0.4, 1.0):
            text.append("■", colour(there, heat))
        text.append(f" {name}  ", "dim")
    if grid.experts * grid.blocks > 1:
        text.append(f"{grid.blocks} x {grid.experts} a cell", "dim")
    return text


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue
