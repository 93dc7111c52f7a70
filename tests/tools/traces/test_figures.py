"""Pictures of real daemons: what is drawn is what the daemon says."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import grpc
import numpy as np
import outlets  # noqa: F401 - keeps gRPC's event loop from one test to the next
import pytest
from daemons import DaemonProcess, running_daemon
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from raw_client import RawClient
from stores import NASTY, layout_of

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreServicer, add_ExpertStoreServicer_to_server
from moetier.runtime.wire.probe import probe
from moetier.tiers.errors import ConfigError, DaemonError, NoDaemonError, RefusedError, TargetError
from moetier.tiers.manifest import Manifest
from moetier.tools.commands import plot
from moetier.tools.traces.figures import ORANGE, draw_resident

SLOT = layout_of().slot_bytes


def run(*words: object) -> None:
    parser = ArgumentParser()
    plot.add_arguments(parser)
    plot.run(parser.parse_args([str(word) for word in ("resident", *words)]))


@pytest.fixture(scope="module", autouse=True)
def fonts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """matplotlib keeps the files of fonts open that it has used once: they are not what a test leaves behind."""
    stats = pb.StatsReply(models=[pb.ModelStats()], details=[pb.Details(blocks=[pb.Block(uses=[1])])])
    draw_resident(stats, time="").savefig(tmp_path_factory.mktemp("fonts") / "a.png")


@pytest.fixture
def daemon(store: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DaemonProcess]:
    """Of the default name, that has read 0 and 3 of block 1, the latter twice."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "moetier").mkdir(mode=0o700)
    with running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "moetier/default") as daemon:
        with RawClient(daemon.folder, store[1]) as client:
            for request, experts in enumerate(([0, 3], [3]), 1):
                client.acquire(request, 1, experts)
                for _ in experts:
                    client.granted()
                client.release(request)
        yield daemon


def looked(daemon: DaemonProcess) -> pb.StatsReply:
    with probe(daemon.address) as connected:
        return connected.stats(details=True)


def marked(figure: Figure) -> list[set[tuple[int, int]]]:
    """(block, expert) of each mark, by model."""
    return [
        {(int(y), int(x)) for x, y in np.asarray(axes.collections[0].get_offsets())}
        for axes in figure.axes
        if axes.images
    ]


def test_the_picture_is_what_the_daemon_says(daemon: DaemonProcess, store: tuple[Path, Manifest]) -> None:
    figure = draw_resident(looked(daemon), time="today")
    assert marked(figure) == [{(1, 0), (1, 3)}]
    shown = np.asarray(figure.axes[0].images[0].get_array())
    assert shown.shape[1] == 8
    assert {(int(row), int(column)): int(shown[row, column]) for row, column in np.argwhere(shown)} == {
        (1, 0): 1,
        (1, 3): 2,
    }
    title = figure.axes[0].get_title(loc="left").splitlines()
    assert title[0].startswith(f"{store[1].model}, today, up ")
    assert title[1] == f"2 of {shown.size} experts are resident, in 12 slots; 100% of 3 uses were of these"


def test_a_png_has_the_marks(daemon: DaemonProcess, tmp_path: Path) -> None:
    run("default", "-o", tmp_path / "a.png")
    picture = imread(tmp_path / "a.png")[..., :3]
    assert picture.shape[0] >= 200
    assert picture.shape[1] >= 700
    orange = np.argwhere(np.abs(picture - to_rgb(ORANGE)).max(-1) < 0.02)
    assert len(np.unique(orange[:, 1] // 40)) >= 2, "the legend's and two of block 1"
    (tmp_path / "a.png").unlink()
    daemon.restart()  # and has nothing
    run("default", "-o", tmp_path / "a.png")
    picture = imread(tmp_path / "a.png")[..., :3]
    alone = np.argwhere(np.abs(picture - to_rgb(ORANGE)).max(-1) < 0.02)
    assert 0 < len(alone) < len(orange) * 0.6, "the legend's"


def test_an_svg_says_model_and_time(daemon: DaemonProcess, store: tuple[Path, Manifest], tmp_path: Path) -> None:
    run(daemon.folder, "-o", tmp_path / "a.svg")
    said = " ".join(ElementTree.parse(tmp_path / "a.svg").getroot().itertext())
    assert f"{store[1].model}, 20" in said
    for part in ("2 of ", "block", "expert", "resident: in a slot of the host tier now", "uses since the daemon's"):
        assert part in said


def test_models_of_any_size_and_blocks_that_differ() -> None:
    def block(count: int, *ready: int) -> pb.Block:
        return pb.Block(uses=range(count), ready=ready)

    stats = pb.StatsReply(
        models=[pb.ModelStats(name="$a$"), pb.ModelStats(name="b")],
        details=[pb.Details(blocks=[block(384, 383)] * 60), pb.Details(blocks=[block(0), block(3, 1), block(8, 1, 7)])],
    )
    figure = draw_resident(stats, time="now")
    assert marked(figure) == [{(row, 383) for row in range(60)}, {(1, 1), (2, 1), (2, 7)}]
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]
    assert [array.shape for array in shown] == [(60, 384), (3, 8)]
    assert np.isfinite(shown[1]).sum(axis=1).tolist() == [0, 3, 8]
    assert (figure.get_size_inches() <= (16, 10)).all()
    assert figure.axes[0].get_title(loc="left").startswith("$a$, now")


def test_a_name_that_no_svg_can_have(tmp_path: Path) -> None:
    stats = pb.StatsReply(
        models=[pb.ModelStats(name=NASTY)], details=[pb.Details(blocks=[pb.Block(uses=[1, 2], ready=[1])])]
    )
    figure = draw_resident(stats, time="now")
    assert figure.axes[0].get_title(loc="left").startswith("x?[31m?]0;owned??y, now, up 0 s\n1 of 2 experts")
    figure.savefig(tmp_path / "a.svg")
    ElementTree.parse(tmp_path / "a.svg")


def test_nobody_is_there(tmp_path: Path) -> None:
    with pytest.raises(NoDaemonError, match="No daemon runs in"):
        run(tmp_path / "nobody", "-o", tmp_path / "a.png")
    with pytest.raises(ConfigError, match="not the address"):
        run("a b", "-o", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_a_stranger_is_refused(store: tuple[Path, Manifest], tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    token.chmod(0o600)
    extra = ["--listen", "127.0.0.1:0", "--token-file", token]
    with running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "daemon", extra=extra) as daemon:
        with pytest.raises(RefusedError):
            run(daemon.card.listen, "--insecure", "-o", tmp_path / "a.png")
        assert not (tmp_path / "a.png").exists()
        run(daemon.card.listen, "--insecure", "--token-file", token, "-o", tmp_path / "a.png")


class Earlier(ExpertStoreServicer):
    """A daemon that knows nothing of details."""

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        return pb.DescribeReply(version="0.0.1")

    def Stats(self, request: pb.StatsRequest, context: grpc.ServicerContext) -> pb.StatsReply:
        return pb.StatsReply(models=[pb.ModelStats(name="a")])


def test_a_daemon_that_tells_nothing_of_experts(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        add_ExpertStoreServicer_to_server(Earlier(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with pytest.raises(DaemonError, match="does not report its experts"):
                run(f"127.0.0.1:{port}", "--insecure", "-o", tmp_path / "a.png")
        finally:
            server.stop(None).wait()
    assert not (tmp_path / "a.png").exists()


def test_what_cannot_be_written(daemon: DaemonProcess, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a \.png or \.svg file"):
        run("default", "-o", tmp_path / "a.jpeg")
    with pytest.raises(TargetError, match="can't be written"):
        run("default", "-o", tmp_path / "nowhere" / "a.png")
