"""The heat map of experts: it fits, and its colours say what is in memory and used."""

from __future__ import annotations

import pytest
from replies import SEVEN, block

from moetier.proto import expert_store_pb2 as pb
from moetier.tools.top.heat import ABSENT, READY, Grid, colour, heatmap
from moetier.tools.top.history import History


def test_a_daemon_of_an_earlier_version_has_no_details() -> None:
    history = History()
    for uptime in (1, 2):
        history.add(SEVEN, pb.StatsReply(models=[pb.ModelStats(name="acme/one", digest="1")], uptime_s=uptime))
    (model,) = history.models.values()
    assert "earlier version" in heatmap(model.details.blocks, model.lately, 40, 20).plain


@pytest.mark.parametrize(
    ("blocks", "experts", "width", "height", "grid"),
    [
        (8, 8, 70, 34, Grid(label=2, width=8, lines=3, experts=1, blocks=1)),
        (32, 8, 80, 36, Grid(label=3, width=4, lines=1, experts=1, blocks=1)),
        (48, 128, 140, 40, Grid(label=3, width=1, lines=0, experts=1, blocks=1)),
        (61, 384, 100, 20, Grid(label=3, width=1, lines=0, experts=4, blocks=2)),
        (1, 1, 0, 0, Grid(label=2, width=1, lines=1, experts=1, blocks=1)),
    ],
)
def test_every_model_fits(blocks: int, experts: int, width: int, height: int, grid: Grid) -> None:
    assert Grid.of(blocks, experts, width, height) == grid
    text = heatmap([block(experts, 0)] * blocks, [[1.0] * experts] * blocks, width, height)
    lines = text.plain.splitlines()
    assert len(lines) <= max(height, 3)
    if width:
        assert max(len(line.rstrip()) for line in lines[1:-1]) <= width


def test_colours_say_what_is_there_and_used() -> None:
    dark, bright = ("#{:02x}{:02x}{:02x}".format(*value) for value in ABSENT)
    there, hot = ("#{:02x}{:02x}{:02x}".format(*value) for value in READY)
    assert [colour(0, 0), colour(0, 1), colour(1, 0), colour(1, 1)] == [dark, bright, there, hot]
    assert colour(0, -0.5) == dark
    blocks = [block(3, 0, 1), block(2)]
    text = heatmap(blocks, [[0, 8, 0], [8, 0]], 20, 4)
    styles = [str(span.style) for span in text.spans if text.plain[span.start] in "▆█"]
    assert styles == [there, hot, dark, bright, dark]
    halves = heatmap([*blocks, block(3)], [[0, 8, 0], [8, 0], [0, 0, 0]], 20, 4)
    assert [str(span.style) for span in halves.spans if halves.plain[span.start] == "▀"] == [
        f"{there} on {bright}",
        f"{hot} on {dark}",
        dark,
        *[dark] * 3,
    ]


@pytest.mark.parametrize(("blocks", "experts"), [(8, 8), (32, 8), (24, 32), (48, 128), (60, 384)])
def test_axis_and_legend_fit(blocks: int, experts: int) -> None:
    for width in (44, 76, 100):
        text = heatmap([block(experts)] * blocks, [[0.0] * experts] * blocks, width, 30).plain
        assert max(map(len, text.splitlines())) <= width
        assert "absent" in text
