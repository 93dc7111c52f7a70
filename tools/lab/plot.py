"""A picture of a daemon's experts, block by expert: how often each was used, and which are in host slots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moetier.proto.expert_store_pb2 import Block, StatsReply
from moetier.tools.cli.failure import plain
from moetier.tools.cli.report import format_seconds

from .figures import MOST_HEIGHT, MOST_WIDTH, ORANGE

WIDEST, HIGHEST = 0.6, 0.36  # of a cell, in inches
ROUND = 5.0  # points from which a mark is a dot with an edge
Uses = npt.NDArray[np.float64]  # [blocks, experts]; nan where there is no expert
Ready = npt.NDArray[np.bool_]


def draw_resident(stats: StatsReply, *, time: str) -> Figure:
    """Draw ``stats`` with details, taken at ``time``: a part for each model of the daemon."""
    models = [_uses_and_ready(details.blocks) for details in stats.details]
    rows, columns = (max(uses.shape[side] for uses, _ in models) for side in (0, 1))
    cell = (
        min(WIDEST, (MOST_WIDTH - 2) / columns),
        min(HIGHEST, (MOST_HEIGHT / len(models) - 1.8) / rows),
    )
    figure = Figure(
        figsize=(max(columns * cell[0] + 2, 7), sum(len(uses) * cell[1] + 1.8 for uses, _ in models)),
        layout="constrained",
    )
    grid = figure.subplots(len(models), 1, squeeze=False, height_ratios=[len(uses) for uses, _ in models])
    for axes, model, (uses, ready) in zip(grid[:, 0], stats.models, models, strict=True):
        _draw(axes, uses, ready, mark=min(cell) * 72 * 0.5)
        title = f"{plain(model.name)}, {time}, up {format_seconds(stats.uptime_s)}"
        title += f"\n{_summary(uses, ready, model.host.slots)}"
        axes.set_title(title, fontsize=10, loc="left", pad=22, parse_math=False)  # above the legend
    return figure


def _uses_and_ready(blocks: Sequence[Block]) -> tuple[Uses, Ready]:
    uses = np.full((len(blocks), max(len(block.uses) for block in blocks)), np.nan)
    ready = np.zeros(uses.shape, np.bool_)
    for row, block in enumerate(blocks):
        uses[row, : len(block.uses)] = block.uses
        ready[row, list(block.ready)] = True
    return uses, ready


def _draw(axes: Axes, uses: Uses, ready: Ready, *, mark: float) -> None:
    """``mark``: the size of what marks an expert in a slot, in points."""
    top = max(float(np.nanpercentile(uses, 98)), 1.0)  # a few experts must not make all others pale
    shown = axes.imshow(uses, cmap="Blues", vmin=0, vmax=top, aspect="auto", interpolation="nearest", rasterized=True)
    y, x = np.nonzero(ready)
    is_round = mark >= ROUND
    axes.scatter(
        x,
        y,
        s=max(mark, 1.6) ** 2,
        marker="o" if is_round else "s",
        color=ORANGE,
        edgecolors="white",
        linewidths=1.0 if is_round else 0.0,
        label="resident: in a slot of the host tier now",
    )
    axes.set_facecolor("#e4e7ea")
    axes.set_xlabel("expert")
    axes.set_ylabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    bar = axes.figure.colorbar(shown, ax=axes, pad=0.02, extend="max" if np.nanmax(uses) > top else "neither")
    bar.set_label("uses since the daemon's start")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=9, borderpad=0, borderaxespad=0.4)


def _summary(uses: Uses, ready: Ready, slots: int) -> str:
    """ "16 of 64 experts are resident, in 16 slots; 41% of 5,120 uses were of these"."""
    experts, total = int(np.isfinite(uses).sum()), float(np.nansum(uses))
    text = f"{int(ready.sum()):,} of {experts:,} experts are resident, in {slots:,} slots"
    return text + (
        f"; {np.nansum(uses[ready]) / total:.0%} of {total:,.0f} uses were of these" if total else "; no uses"
    )
