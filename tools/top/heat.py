"""Map of a model's experts on a terminal, a row for each block: which experts are in slots, and how often used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from moetier.proto.expert_store_pb2 import Block

Colour = tuple[int, int, int]
Cell = tuple[float, float]  # share of the cell's experts that are in slots, mean uses of an expert

ABSENT: tuple[Colour, Colour] = (44, 48, 55), (232, 140, 45)  # colour of an unused expert, and of the most used one
READY: tuple[Colour, Colour] = (25, 62, 112), (128, 194, 255)
TALLEST = 3  # maximum number of lines of a block
TICK = 8  # minimum number of columns between two numbers of the axis


@dataclass(frozen=True, slots=True)
class Grid:
    """Layout of a model's map. If the map would not fit the screen, several experts or blocks share a cell."""

    label: int  # characters before each line
    width: int  # characters of a cell
    lines: int  # lines of a cell; 0: two rows of cells share a line, as its upper and lower half
    experts: int  # experts of each block in a cell
    blocks: int  # blocks in a cell

    @classmethod
    def of(cls, blocks: int, experts: int, width: int, height: int) -> Grid:
        """Return the layout of a map of ``width`` columns and ``height`` lines, for blocks of at most ``experts``.

        The first line is the axis, the last one the legend.
        """
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
    """Return the map of ``blocks`` in ``width`` columns and ``height`` lines.

    ``uses[block][expert]`` is the number of uses of an expert, in which older uses may count less.
    """
    most = max((len(row) for row in uses), default=0)
    if not most:
        return Text("The daemon is of an earlier version, which does not report its experts.", "dim")
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
    """Return the colour of a cell, as "#rrggbb".

    ``ready`` is the share of the cell's experts that are in slots, 0 to 1. ``heat`` is the mean uses of these experts,
    divided by those of the most used cell, 0 to 1.
    """
    heat = math.sqrt(max(heat, 0.0))  # the square root keeps a few much used experts from making all others pale
    red, green, blue = _mix(_mix(*ABSENT, heat), _mix(*READY, heat), ready)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _cells(blocks: Sequence[Block], uses: Sequence[Sequence[float]], together: int, most: int) -> list[Cell | None]:
    """Return a row of cells, each of ``together`` experts of each of ``blocks``; None for a cell without experts.

    ``uses`` are those of ``blocks``. ``most`` is the number of experts in the largest block of the model.
    """
    ready = [set(block.ready) for block in blocks]
    cells: list[Cell | None] = []
    for at in range(0, most, together):
        one = [
            (expert in is_ready, row[expert])
            for is_ready, row in zip(ready, uses, strict=True)
            for expert in range(at, min(at + together, len(row)))
        ]
        count = len(one)
        cells.append(
            (sum(is_ready for is_ready, _ in one) / count, sum(use for _, use in one) / count) if one else None
        )
    return cells


def _append(text: Text, row: Sequence[str | None], width: int, mark: str) -> None:
    """Append a line of cells to ``text``, with gaps between the cells if they are wide enough."""
    gap = " " if width > 2 else ""
    for value in row:
        text.append((" " if value is None else mark) * (width - len(gap)) + gap, value or "")


def _append_pairs(text: Text, upper: Sequence[str | None], lower: Sequence[str | None], width: int) -> None:
    """Append two rows of cells as one line: half blocks have the upper row's colour, their background the lower's."""
    for above, below in zip(upper, lower, strict=True):
        if above is not None:
            text.append("▀" * width, above if below is None else f"{above} on {below}")
        else:
            text.append(("▄" if below else " ") * width, below or "")


def _axis(grid: Grid, cells: int, width: int) -> str:
    """Return the axis: numbers of experts above their cells, as many as fit into ``width`` columns."""
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
    for is_ready, name in ((1, "ready"), (0, "absent")):
        for heat in (0.0, 0.1, 0.4, 1.0):
            text.append("■", colour(is_ready, heat))
        text.append(f" {name}  ", "dim")
    if grid.experts * grid.blocks > 1:
        text.append(f"{grid.blocks} x {grid.experts} a cell", "dim")
    return text


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue
