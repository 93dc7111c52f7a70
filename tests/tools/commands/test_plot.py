"""Real pictures of real traces: what is drawn is what the trace says."""

from __future__ import annotations

import re
import subprocess
import sys
from argparse import ArgumentParser
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from places import ASSETS
from stores import NASTY

from moetier.runtime.trace.trace import NO_EXPERT, Trace
from moetier.tiers.cache.policies import DEFAULT_POLICY
from moetier.tiers.errors import ConfigError, TargetError
from moetier.tools.commands import plot
from moetier.tools.main import main
from moetier.tools.traces import figures
from moetier.tools.traces.simulation import simulate

TRACES = ASSETS / "traces"
MIXTRAL = TRACES / "mixtral_8x7b_instruct_h39s.npz"
GPT_OSS = TRACES / "gptoss_20b_12seq.npz"


def few_blocks(path: Path) -> Trace:
    """Every eighth block of a trace: simulating all of them takes seconds."""
    trace = Trace.load(path)
    return replace(trace, experts=trace.experts[:, ::8], num_experts=trace.num_experts[::8], weights=None, blocks=())


def run(*words: object) -> None:
    parser = ArgumentParser()
    plot.add_arguments(parser)
    plot.run(parser.parse_args([str(word) for word in words]))


def recorded(folder: Path) -> Path:
    """A small trace with everything: texts, predictions of which a known part is right, a token without experts."""
    experts = np.asarray(
        [[[0, 1], [2, 3], [4, 5]], [[1, 2], [3, 4], [5, 0]], [[NO_EXPERT, NO_EXPERT], [2, 3], [4, 5]]] * 4, np.int16
    )
    predictions = np.stack([experts, np.where(np.arange(2) == 0, experts, NO_EXPERT)]).astype(np.int16)
    Trace(
        experts=experts,
        offsets=(0, 6, 12),
        num_experts=(6, 6, 6),
        pieces=(" cost", "$5", "\n", "<b>", "é", "\x1b字", " a", "\t", "_", "&", "", "^x$"),
        lookaheads=(0, 1),
        predictions=predictions,
        model="acme/<tiny>",
    ).save(folder / "t.npz")
    return folder / "t.npz"


@pytest.fixture(scope="module", autouse=True)
def fonts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """matplotlib keeps the files of fonts open that it has used once: they are not what a test leaves behind."""
    folder = tmp_path_factory.mktemp("fonts")
    run("figure1", recorded(folder), "-o", folder / "a.png")


@pytest.mark.parametrize("kind", plot.OF_TRACES)
@pytest.mark.parametrize("form", ["png", pytest.param("svg", marks=pytest.mark.slow)])
def test_every_picture_can_be_made_and_is_the_same_again(kind: str, form: str, tmp_path: Path) -> None:
    trace = recorded(tmp_path)
    run(kind, trace, "-o", tmp_path / f"a.{form}")
    run(kind, trace, "-o", tmp_path / f"b.{form}")
    assert (tmp_path / f"a.{form}").read_bytes() == (tmp_path / f"b.{form}").read_bytes()
    if form == "png":
        picture = imread(tmp_path / "a.png")
        assert picture.shape[0] >= 200
        assert picture.shape[1] >= 500
        assert 0.01 < (picture[..., :3].min(-1) < 0.9).mean() < 0.9, "neither empty nor full"
    else:
        root = ElementTree.parse(tmp_path / "a.svg").getroot()
        assert "acme/<tiny>" in "".join(root.itertext())


@pytest.mark.parametrize("kind", plot.OF_TRACES)
def test_a_name_that_no_svg_can_have(kind: str, tmp_path: Path) -> None:
    trace = replace(Trace.load(recorded(tmp_path)), model=NASTY)
    trace.save(tmp_path / "nasty.npz")
    run(kind, tmp_path / "nasty.npz", "-o", tmp_path / "a.svg")
    assert "x?[31m?]0;owned??y" in "".join(ElementTree.parse(tmp_path / "a.svg").getroot().itertext())


def test_the_text_is_under_the_tokens(tmp_path: Path) -> None:
    run("figure1", recorded(tmp_path), "-o", tmp_path / "a.svg")
    words = [text.strip() for text in ElementTree.parse(tmp_path / "a.svg").getroot().itertext() if text.strip()]
    expected = ["·cost", "$5", "↵", "<b>", "é", "▯字", "·a", "→", "_", "&", "▯", "^x$"]
    first = words.index(expected[0])
    assert words[first : first + len(expected)] == expected


def images(figure: Figure) -> list[np.ndarray]:  # type: ignore[type-arg]
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]


def test_figure_1_shows_used_experts_by_weight_and_cached_ones() -> None:
    trace = Trace.load(GPT_OSS)
    tokens = range(505, 525)  # over the end of a sequence, at 511
    figure = figures.draw_use(trace, tokens=tokens, blocks=[3, 20], cached=6, policy="lru")
    assert trace.weights is not None
    for axes, shades, block in zip(figure.axes, images(figure), [3, 20], strict=True):
        assert shades.shape == (32, 20)
        for column, token in enumerate(tokens):
            assert set(np.nonzero(shades[:, column])[0]) == set(trace.experts[token, block].tolist())
            weights = trace.weights[token, block].astype(float)
            np.testing.assert_allclose(shades[trace.experts[token, block], column], 0.25 + 0.75 * weights, atol=1e-3)
        cache: OrderedDict[int, None] = OrderedDict()
        expected = set()
        for token in range(tokens.stop):
            if token in trace.offsets:
                cache.clear()
            if token in tokens:
                expected |= {(token - tokens.start, expert) for expert in cache}
            for expert in sorted(trace.experts[token, block].tolist(), reverse=True):
                cache[expert] = None
                cache.move_to_end(expert)
                if len(cache) > 6:
                    cache.popitem(last=False)
        drawn = {(int(x), int(y)) for x, y in np.asarray(axes.collections[0].get_offsets())}
        assert drawn == expected


def test_figure_2_left() -> None:
    trace = few_blocks(MIXTRAL)
    figure = figures.draw_hits(trace, policy="lru")
    belady, lru, chance = (np.asarray(line.get_ydata(), float) for line in figure.axes[0].lines)
    expected = [simulate(trace, "lru", number).decoding.hit_ratio for number in range(1, 9)]
    np.testing.assert_allclose(lru, expected)
    assert (belady >= lru).all()
    np.testing.assert_allclose(chance, np.arange(1, 9) / 8)


def test_figure_2_right(tmp_path: Path) -> None:
    figure = figures.draw_recall(Trace.load(recorded(tmp_path)))
    line = figure.axes[0].lines[0]
    assert list(line.get_xdata()) == [0, 1]
    np.testing.assert_allclose(np.asarray(line.get_ydata(), float), [1.0, 0.5])


def test_a_look_ahead_without_predictions_has_no_point(tmp_path: Path) -> None:
    trace = Trace.load(recorded(tmp_path))
    assert trace.predictions is not None
    predictions = np.where(np.arange(2)[:, None, None, None] == 1, NO_EXPERT, trace.predictions)
    figure = figures.draw_recall(replace(trace, predictions=predictions))
    values = [np.asarray(line.get_ydata(), float) for line in figure.axes[0].lines]
    assert [np.isnan(ratios).tolist() for ratios in values] == [[False, True]] * 3
    assert [text.get_text() for text in figure.axes[0].texts] == ["100%"]
    figure.savefig(tmp_path / "a.png")


def test_the_heatmap() -> None:
    trace = Trace.load(MIXTRAL)
    use, hits = images(figures.draw_heatmap(trace, cached=4, policy="lru"))
    assert use.shape == hits.shape == (32, 8)
    counts = np.asarray([np.bincount(trace.experts[:, block].ravel(), minlength=8) for block in range(32)])
    np.testing.assert_allclose(use, counts / 773 / (2 / 8))
    assert (hits * counts).sum() / counts.sum() == pytest.approx(0.574, abs=0.001)


@pytest.mark.parametrize("kind", ["figure1", "hits", "heatmap"])
def test_the_default_policy_is_drawn_and_named(kind: str, tmp_path: Path) -> None:
    few_blocks(MIXTRAL).save(tmp_path / "t.npz")
    run(kind, tmp_path / "t.npz", "-o", tmp_path / "a.svg")
    words = " ".join(ElementTree.parse(tmp_path / "a.svg").getroot().itertext())
    assert re.findall(r"policy (\w+)", words) == [DEFAULT_POLICY]
    assert "LRU" not in words


def test_hit_ratios_are_those_of_the_default_policy() -> None:
    trace = few_blocks(MIXTRAL)
    line = figures.draw_hits(trace).axes[0].lines[1]
    expected = [simulate(trace, DEFAULT_POLICY, number).decoding.hit_ratio for number in range(1, 9)]
    np.testing.assert_allclose(np.asarray(line.get_ydata(), float), expected)
    assert expected != [simulate(trace, "lru", number).decoding.hit_ratio for number in range(1, 9)]
    use, hits = images(figures.draw_heatmap(trace, cached=4))
    assert (hits * use).sum() / use.sum() > simulate(trace, "lru", 4).decoding.hit_ratio


def test_models_whose_blocks_differ(tmp_path: Path) -> None:
    experts = np.asarray([[[0, 1], [2, 3]], [[1, NO_EXPERT], [6, 7]]] * 5, np.int16)
    trace = Trace(experts=experts, offsets=(0, 10), num_experts=(2, 8), n_prefill=(3,))
    use, hits = images(figures.draw_heatmap(trace, cached=2))
    assert np.isnan(use[0, 2:]).all(), "there are none"
    assert np.isnan(hits[1, 4]), "it is not used"
    assert not np.isnan(use[1]).any()
    assert [array.shape for array in images(figures.draw_use(trace, tokens=range(10), blocks=[0, 1], cached=0))] == [
        (2, 10),
        (8, 10),
    ]


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["recall", MIXTRAL, "-o", "a.png"], "has no predictions"),
        (["hits", MIXTRAL, "-o", "a.jpeg"], "not a .png or .svg file"),
        (["figure1", MIXTRAL, "-o", "a.png", "--tokens", "770-773"], "can't be drawn"),
        (["figure1", MIXTRAL, "-o", "a.png", "--tokens", "9-8"], "is empty"),
        (["figure1", MIXTRAL, "-o", "a.png", "--tokens", "0-300"], "can't be drawn"),
        (["figure1", MIXTRAL, "-o", "a.png", "--blocks", "1,32"], "no block 32"),
        (["heatmap", MIXTRAL, "-o", "a.png", "--cached", "9"], "a block has at most"),
        (["heatmap", MIXTRAL, "-o", "a.png", "--cached", "0"], "a block has at most"),
    ],
)
def test_what_cannot_be_drawn(words: list[object], cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=cause):
        run(*words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "option", "fix"),
    [
        ("hits", ("--tokens", "1-5"), "for plot figure1."),
        ("heatmap", ("--blocks", "1"), "for plot figure1."),
        ("recall", ("--cached", "0"), "figure1 and heatmap"),
        ("resident", ("--cached", "2"), "figure1 and heatmap"),
        ("figure1", ("--insecure",), "for plot resident."),
        ("hits", ("--token-file", "/nonexistent"), "for plot resident."),
    ],
)
def test_an_option_of_another_picture_is_a_wrong_command_line(
    kind: str, option: tuple[str, ...], fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plot", kind, str(MIXTRAL), "-o", "a.png", *option]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"moetier: plot {kind} has no option {option[0]}."
    assert fix in said[1]


def test_what_is_set_beforehand_for_another_picture_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETIER_PLOT_TOKENS", "0-3")
    assert main(["plot", "hits", str(recorded(tmp_path)), "-o", str(tmp_path / "a.png")]) == 0


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="can't be written"):
        run("hits", recorded(tmp_path), "-o", tmp_path / "nowhere" / "a.png")


@pytest.mark.parametrize("picture", [["hits", str(MIXTRAL)], ["resident", "default"]], ids=lambda words: words[0])
def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, picture: list[str]) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from moetier.tools.main import main\n"
        f"sys.exit(main(['plot', *{picture!r}, '-o', {str(tmp_path / 'a.png')!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "moetier: moetier plot needs matplotlib, which is not installed.",
        '  In the repository of moetier, run: pip install ".[plots]"',
    ]


def test_a_trace_without_a_name_is_named_by_its_file(tmp_path: Path) -> None:
    replace(Trace.load(recorded(tmp_path)), model="").save(tmp_path / "evening.npz")
    run("hits", tmp_path / "evening.npz", "-o", tmp_path / "a.svg")
    assert "evening" in (tmp_path / "a.svg").read_text()
