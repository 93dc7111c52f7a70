"""Figures of a trace, and of a daemon's experts.

Figures 1 and 2 show what Figures 1 and 2 of Eliseev & Mazur 2023 (arXiv 2312.17238) show.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moetier.proto.expert_store_pb2 import Block, StatsReply
from moetier.runtime.trace.recall import compare
from moetier.runtime.trace.trace import NO_EXPERT, Trace
from moetier.tiers.cache.policies import DEFAULT_POLICY, POLICIES
from moetier.tiers.layout import ExpertKey
from moetier.tools.cli.failure import plain
from moetier.tools.cli.report import format_seconds

from .simulation import SimulatedTier, demands_of, simulate

BLUE, ORANGE, GREY, DARK = "#1f5fa8", "#d9822b", "#8a8f98", "#22262b"
MAX_WIDTH, MAX_HEIGHT = 16.0, 9.0  # inches
WIDEST, HIGHEST = 0.6, 0.36  # largest width and height of a cell, in inches
ROUND = 5.0  # size in points from which a mark is drawn as a dot with an edge
Uses = npt.NDArray[np.float64]  # [blocks, experts]; nan where there is no expert
Ready = npt.NDArray[np.bool_]


def draw_use(
    trace: Trace, *, tokens: range, blocks: Sequence[int], cached: int, policy: str = DEFAULT_POLICY
) -> Figure:
    """Draw Figure 1: the experts that each token uses, darker if they have more weight.

    Small squares mark the experts that a simulated cache holds before each token. The cache has ``cached`` slots for
    each block (0: no cache) and evicts by ``policy``. The text of the tokens is below the figure. A line marks where a
    sequence begins.
    """
    width = min(max(0.22 * len(tokens) + 1.2, 6.0), MAX_WIDTH)
    heights = [min(0.15 * trace.num_experts[block], MAX_HEIGHT / len(blocks)) for block in blocks]  # inches
    figure = Figure(figsize=(width, sum(heights) + 0.15 * len(blocks) + (1.2 if trace.pieces else 0.8)))
    figure.set_layout_engine("constrained", h_pad=0.03)
    grid = figure.subplots(len(blocks), 1, sharex=True, squeeze=False, height_ratios=heights)
    rows: list[Axes] = list(grid[:, 0])
    for axes, block, height in zip(rows, blocks, heights, strict=True):
        cell = min(height / trace.num_experts[block], (width - 1.2) / len(tokens)) * 72  # points
        shades = _shades(trace, tokens, block)
        axes.imshow(
            shades,
            cmap="Blues",
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="nearest",
            origin="lower",
            rasterized=True,
        )
        if cached:
            x, y = np.nonzero(_resident(trace, tokens, block, cached, policy))
            axes.scatter(x, y, s=max(cell * 0.36, 2) ** 2, marker="s", color=GREY, linewidths=0)
        for first in trace.offsets:
            if first > tokens.start and first in tokens:
                axes.axvline(first - tokens.start - 0.5, color=ORANGE, linewidth=1.5)
        axes.set_ylabel(f"block {block}\nexpert", fontsize=9)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_xticks(np.arange(-0.5, len(tokens)), minor=True)
        axes.set_yticks(np.arange(-0.5, trace.num_experts[block]), minor=True)
        axes.grid(which="minor", color="#e4e7ea", linewidth=0.5)
        axes.tick_params(which="minor", length=0)
        axes.tick_params(labelsize=8)
    _write_text(rows[-1], trace, tokens)
    note = f"; grey: held before the token by a cache of {cached} experts a block, policy {policy}" if cached else ""
    shade = "darker: more weight" if trace.weights is not None else "blue: used"
    rows[0].set_title(f"Experts by token{_of(trace)} ({shade}{note})", fontsize=10, loc="left")
    return figure


def draw_hits(trace: Trace, *, policy: str = DEFAULT_POLICY) -> Figure:
    """Draw Figure 2, left: the hit ratio by the number of slots that each block has.

    There is a line each for ``policy``, for Belady's bound, and for experts that are cached at random.
    """
    most = max(trace.num_experts)
    slots = sorted({max(round(number), 1) for number in np.linspace(1, most, min(most, 16))})
    figure, axes = _line_figure()
    for way, name, colour in (("belady", "Belady, the bound", ORANGE), (policy, f"policy {policy}", BLUE)):
        ratios = [simulate(trace, way, number).decoding.hit_ratio for number in slots]
        axes.plot(slots, ratios, "o-", color=colour, label=name, markersize=4)
    chance = [number / most for number in slots]
    axes.plot(slots, chance, ":", color=GREY, label="as many experts, uniform at random")
    axes.set_xlabel(f"experts cached for each block, of {most}")
    axes.set_ylabel("hit ratio while decoding")
    axes.set_xlim(0, most * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_title(f"Hit ratio{_of(trace)}, top-{trace.top_k}", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def draw_recall(trace: Trace) -> Figure:
    """Draw Figure 2, right: the recall of predictions, by the look-ahead."""
    compared = compare(trace)
    ahead = [comparison.lookahead for comparison in compared]
    gates, previous, popular = (
        np.asarray([getattr(comparison, name) for comparison in compared], float)  # nan where it is None
        for name in ("gates", "previous_token", "popularity")
    )
    figure, axes = _line_figure()
    axes.plot(ahead, gates, "o-", color=BLUE, label="gates asked ahead")
    for place in zip(ahead, gates, strict=True):
        if not np.isnan(place[1]):
            axes.annotate(f"{place[1]:.0%}", place, (0, 7), textcoords="offset points", ha="center", fontsize=8)
    others = ((previous, "--", ORANGE, "the previous token's experts"), (popular, ":", GREY, "each block's most used"))
    for ratios, style, colour, name in others:
        axes.plot(ahead, ratios, style, marker="o", markersize=3, color=colour, label=name)
    axes.set_xlabel("look-ahead in blocks")
    axes.set_ylabel("recall")
    axes.set_ylim(0, 1.08)
    axes.set_xticks(ahead)
    guesses = 0 if trace.predictions is None else trace.predictions.shape[3]
    axes.set_title(f"Recall of {guesses} predictions{_of(trace)}, top-{trace.top_k}", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    return figure


def draw_heatmap(trace: Trace, *, cached: int, policy: str = DEFAULT_POLICY) -> Figure:
    """Draw two maps of the experts by block: uses relative to an even share, and hit ratio in a simulated cache.

    The cache holds ``cached`` experts of each block and evicts by ``policy``.
    """
    most = max(trace.num_experts)
    even = np.asarray([trace.top_k / count for count in trace.num_experts])[:, None]
    used, hits = _uses(trace, cached, policy)
    counted = np.arange(most) < np.asarray(trace.num_experts)[:, None]
    share = np.where(counted, used / trace.tokens / even, np.nan)
    ratios = np.divide(hits, used, out=np.full_like(used, np.nan), where=used > 0)
    panels = (
        (share, "use, 1.0 = an even share", "Blues", _shown_top(share, 2.0)),
        (ratios, f"hit ratio, {cached} a block, policy {policy}", "Greens", 1.0),
    )
    figure = Figure(figsize=(11, min(max(2.4, 0.13 * trace.block_count + 1.2), 9)), layout="constrained")
    for axes, (values, title, colours, top) in zip(figure.subplots(1, 2), panels, strict=True):
        _draw_map(axes, values, top=top, colours=colours)
        axes.set_title(title, fontsize=10, loc="left")
    figure.suptitle(f"{trace.tokens:,} tokens{_of(trace)}", fontsize=10, x=0.01, ha="left")
    return figure


def draw_resident(stats: StatsReply, *, time: str) -> Figure:
    """Draw which experts a daemon holds and how often they were used, with one map for each model.

    ``stats`` must have details. ``time`` is a text for the title: the time at which the daemon sent ``stats``.
    """
    models = [_uses_and_ready(details.blocks) for details in stats.details]
    rows, columns = (max(uses.shape[side] for uses, _ in models) for side in (0, 1))
    cell = (
        min(WIDEST, (MAX_WIDTH - 2) / columns),
        min(HIGHEST, (MAX_HEIGHT / len(models) - 1.8) / rows),
    )
    figure = Figure(
        figsize=(max(columns * cell[0] + 2, 7), sum(len(uses) * cell[1] + 1.8 for uses, _ in models)),
        layout="constrained",
    )
    grid = figure.subplots(len(models), 1, squeeze=False, height_ratios=[len(uses) for uses, _ in models])
    for axes, model, (uses, ready) in zip(grid[:, 0], stats.models, models, strict=True):
        _draw_map(axes, uses, top=_shown_top(uses, 1.0), label="uses since the daemon's start", ticks=16)
        _mark_resident(axes, ready, size=min(cell) * 72 * 0.5)
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


def _mark_resident(axes: Axes, ready: Ready, *, size: float) -> None:
    """Mark the experts that are in a slot, with marks of ``size`` points. ``ready``: bool [blocks, experts]."""
    y, x = np.nonzero(ready)
    is_round = size >= ROUND
    axes.scatter(
        x,
        y,
        s=max(size, 1.6) ** 2,
        marker="o" if is_round else "s",
        color=ORANGE,
        edgecolors="white",
        linewidths=1.0 if is_round else 0.0,
        label="resident: in a slot of the host tier now",
    )
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=9, borderpad=0, borderaxespad=0.4)


def _summary(uses: Uses, ready: Ready, slots: int) -> str:
    """Return a line for the title: "16 of 64 experts are resident, in 16 slots; 41% of 5,120 uses were of these"."""
    experts, total = int(np.isfinite(uses).sum()), float(np.nansum(uses))
    text = f"{int(ready.sum()):,} of {experts:,} experts are resident, in {slots:,} slots"
    return text + (
        f"; {np.nansum(uses[ready]) / total:.0%} of {total:,.0f} uses were of these" if total else "; no uses"
    )


def _draw_map(axes: Axes, values: Uses, *, top: float, label: str = "", colours: str = "Blues", ticks: int = 8) -> None:
    """Draw ``values`` [blocks, experts] as colours, with a colour bar. From ``top`` on, the colour is the darkest."""
    shown = axes.imshow(values, cmap=colours, vmin=0, vmax=top, aspect="auto", interpolation="nearest", rasterized=True)
    axes.set_facecolor("#e4e7ea")
    axes.set_xlabel("expert")
    axes.set_ylabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    extend = "max" if np.nanmax(values) > top else "neither"
    axes.figure.colorbar(shown, ax=axes, pad=0.02, extend=extend).set_label(label)


def _shown_top(values: Uses, least: float) -> float:
    """Return the value for the darkest colour: the 98th percentile of ``values``, or ``least`` if that is more.

    If it were the maximum, a few experts would make all others pale.
    """
    return max(float(np.nanpercentile(values, 98)), least)


def _shades(trace: Trace, tokens: range, block: int) -> npt.NDArray[np.float32]:
    """Return shades [experts, tokens]: 0 if unused, 0.25 to 1 depending on the weight, 0.8 if the weight is unknown."""
    shades = np.zeros((trace.num_experts[block], len(tokens)), np.float32)
    for column, token in enumerate(tokens):
        for place, expert in enumerate(trace.experts[token, block]):
            if expert != NO_EXPERT:
                weight = None if trace.weights is None else float(trace.weights[token, block, place])
                shades[expert, column] = 0.8 if weight is None else 0.25 + 0.75 * min(max(weight, 0.0), 1.0)
    return shades


def _resident(trace: Trace, tokens: range, block: int, cached: int, policy: str) -> npt.NDArray[np.bool_]:
    """Return which experts are in the simulated cache before each token: [tokens, experts].

    The cache is empty at the beginning of each sequence.
    """
    experts = trace.num_experts[block]
    resident = np.zeros((len(tokens), experts), np.bool_)
    for span in trace.sequences:
        tier = SimulatedTier.of_block(block, min(cached, experts), POLICIES[policy])
        for token in range(span.start, min(span.stop, tokens.stop)):
            if token in tokens:
                resident[token - tokens.start, [key.expert for key in tier.resident]] = True
            used = np.unique(trace.experts[token, block])
            tier.demand([ExpertKey(block, int(expert)) for expert in used if expert != NO_EXPERT])
    return resident


def _uses(trace: Trace, cached: int, policy: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return how many tokens use each expert, and how many of them find it in the cache: each [blocks, experts].

    An expert that a prompt misses is loaded once. So all but one of the prompt's tokens that use it count as hits.
    """
    used = np.zeros((trace.block_count, max(trace.num_experts)))
    hits = np.zeros_like(used)
    for block, experts in enumerate(trace.num_experts):
        for sequence, span in enumerate(trace.sequences):
            tier = SimulatedTier.of_block(block, min(cached, experts), POLICIES[policy])
            rows = trace.experts[span.start : span.stop, block]
            np.add.at(used[block], rows[rows != NO_EXPERT], 1)
            for demand in demands_of(trace, sequence, block):
                missing = tier.demand(demand.keys, is_prompt=demand.is_prompt)
                hits[block, [key.expert for key in missing]] -= 1
    return used, used + hits


def _write_text(axes: Axes, trace: Trace, tokens: range) -> None:
    if trace.pieces:
        axes.set_xticks(range(len(tokens)))
        labels = axes.set_xticklabels([_visible(trace.pieces[token]) for token in tokens], rotation=90, fontsize=8)
        for label in labels:
            label.set_parse_math(False)
            label.set_fontfamily("monospace")
    else:
        axes.set_xlabel("token")
        step = max(len(tokens) // 16, 1)
        axes.set_xticks(range(0, len(tokens), step), [str(token) for token in tokens[::step]])


def _visible(piece: str) -> str:
    """Return a piece of text as a label shows it: " a\n" -> "·a↵"."""
    shown = piece.replace("\n", "↵").replace("\t", "→").replace(" ", "·")
    return "".join(letter if letter.isprintable() else "▯" for letter in shown) or "▯"


def _of(trace: Trace) -> str:
    return f" of {plain(trace.model)}" if trace.model else ""


def _line_figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(color="#e4e7ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
