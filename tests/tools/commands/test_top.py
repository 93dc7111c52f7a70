"""``moetier top`` in a terminal, on real daemons; and its screens, driven by textual's pilot."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import outlets  # noqa: F401 - keeps gRPC's event loop from one test to the next
import pytest
from daemons import DaemonProcess, running_daemon
from raw_client import RawClient
from readers import PATIENCE
from rich.console import Console
from screens import DrawnTerminal
from stores import layout_of, make_plan, make_records, write_store
from textual.pilot import Pilot
from textual.widgets import OptionList, Static

from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.wire.address import Address, Credentials
from moetier.runtime.wire.probe import running_daemons
from moetier.tiers.errors import MoetierError
from moetier.tiers.manifest import Manifest
from moetier.tools.top import widgets
from moetier.tools.top.app import TERMINATED, Top
from moetier.tools.top.heat import ABSENT, READY, Grid, colour, heatmap
from moetier.tools.top.history import History
from moetier.tools.top.watch import Look, Watch
from moetier.tools.top.widgets import DaemonPicker, Panel

SLOT = layout_of().slot_bytes
COMMAND = ("-m", "moetier.tools.main", "top")
SEVEN, EIGHT = (pb.DescribeReply(pid=pid, version="1") for pid in (7, 8))
HOLD = (
    "import sys; from pathlib import Path; from moetier.runtime.wire.control import ControlConnection; "
    "side = ControlConnection.open(Path(sys.argv[1]), sys.argv[2]); print(flush=True); sys.stdin.read()"
)  # with what else stands in the command line
ALTERNATE, NORMAL = "\x1b[?1049h", "\x1b[?1049l"


@pytest.fixture
def daemon(store: tuple[Path, Manifest], runtime: Path) -> Iterator[DaemonProcess]:
    with running_daemon(store[0], ram=12 * SLOT, folder=runtime / "moetier/default") as daemon:
        yield daemon


@pytest.fixture
def port() -> Iterator[int]:
    """Nobody else gets it, and a daemon may listen on it again and again."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC's have it
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def ask(client: RawClient, request: int, block: int, *experts: int) -> None:
    """Asks for what is granted, and gives it back."""
    client.acquire(request, block, experts)
    for _ in experts:
        client.granted()
    client.release(request)


# -- in a terminal -----------------------------------------------------------------------------------------------------


def first_expert(terminal: DrawnTerminal, block: int) -> str | None:
    """The colour of its cell, wherever the block stands now."""
    for line, row in enumerate(terminal.text.splitlines()):
        if (column := row.rfind(f"│ {block} ▆▆▆")) >= 0:
            return terminal.colour(column + 4, line)
    return None


def test_a_daemon_is_watched_goes_away_and_comes_back(
    daemon: DaemonProcess, store: tuple[Path, Manifest], runtime: Path
) -> None:
    model = store[1].model
    with DrawnTerminal(*COMMAND, "--interval", "0.05") as terminal:
        text = terminal.shows(model, "0 of 12, 192 KiB", f"process {daemon.pid}", "none", "absent")
        assert all(part in text for part in ("history", "prefetches", "clients of ", "experts by block"))
        terminal.shows_that(lambda: "│ 1 ▆▆▆" in terminal.text, "block 1")
        absent, ready = colour(0, 0)[1:], colour(1, 1)[1:]
        terminal.shows_that(lambda: first_expert(terminal, 1) == absent, "an expert that is absent")
        with RawClient(daemon.folder, store[1]) as client:
            terminal.shows(str(os.getpid()))
            ask(client, 1, 1, 0, 3)
            terminal.shows("2 of 12", "2, 0 failed")
            terminal.shows_that(lambda: first_expert(terminal, 1) == ready, "the expert")
        terminal.shows("none")
        daemon.kill()
        terminal.shows("Trying again.", "2 of 12")
        daemon.restart()
        terminal.shows(f"process {daemon.pid}", "0 of 12")
        assert "Trying" not in terminal.text
        terminal.type("q")
        assert terminal.status() == 0
        assert terminal.attributes == terminal.before
        assert terminal.written.index(ALTERNATE) < terminal.written.index(NORMAL)
        assert "\x1b[?25h" in terminal.written[terminal.written.index(ALTERNATE) :], "the cursor is seen again"
        assert "Traceback" not in terminal.written


@pytest.mark.parametrize(("end", "status"), [(signal.SIGTERM, TERMINATED), ("\x03", 0)])
def test_any_size_will_do_and_the_terminal_is_left_as_it_was(
    daemon: DaemonProcess, runtime: Path, end: signal.Signals | str, status: int
) -> None:
    with DrawnTerminal(*COMMAND, "default", "--interval", "0.05", columns=24, lines=8) as terminal:
        terminal.shows("moetier top", "slots")
        terminal.resize(3, 2)
        terminal.resize(80, 24)
        terminal.shows("0 of 12", "hit ratio", "every 0.05 s")
        if isinstance(end, str):
            terminal.type(end)
        else:
            terminal.send(end)
        assert terminal.status() == status
        assert terminal.attributes == terminal.before
        assert NORMAL in terminal.written


@pytest.mark.parametrize(("columns", "lines"), [(120, 40), (80, 48)])
def test_nothing_is_cut(
    daemon: DaemonProcess, store: tuple[Path, Manifest], runtime: Path, columns: int, lines: int
) -> None:
    """But for the command line of a client that is no command of moetier's: pytest's, here."""
    with (
        RawClient(daemon.folder, store[1]) as client,
        DrawnTerminal(*COMMAND, "--interval", "0.05", columns=columns, lines=lines) as terminal,
    ):
        ask(client, 1, 1, 0, 3)
        terminal.shows("2 of 12, 192 KiB", "2, 0 joined", "median", "2, 0 failed", str(os.getpid()))
        text = terminal.shows("miss/s", "useful 0  ■ late 0  ■ wasted 0  ■ cancelled 0", "max 0.00", "? help")
        assert f"process {daemon.pid}, moetier {daemon.card.version}, up " in text
        assert [line for line in text.splitlines() if "…" in line and str(os.getpid()) not in line] == []
        if columns >= 120:
            assert "ready  ■■■■ absent" in text
        terminal.type("q")
        assert terminal.status() == 0


def test_nobody_is_there(runtime: Path) -> None:
    with DrawnTerminal(*COMMAND) as terminal:
        assert terminal.status() == 1
        cause, fix = terminal.written.split("\r\n")[:2]
        assert cause == f"moetier: No daemon runs in {runtime}/moetier/default."
        assert fix.startswith("  ")
        assert ALTERNATE not in terminal.written


def test_without_a_terminal_it_names_what_needs_none(runtime: Path) -> None:
    result = subprocess.run([sys.executable, *COMMAND], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    cause, fix = result.stderr.splitlines()
    assert "terminal" in cause
    assert "moetier stats" in fix


def test_without_textual_it_says_what_to_install(runtime: Path) -> None:
    code = "import sys; sys.modules['textual'] = None\nfrom moetier.tools.main import main\nsys.exit(main(['top']))"
    with DrawnTerminal("-c", code) as terminal:
        assert terminal.status() == 1
        assert terminal.written.split("\r\n")[:2] == [
            "moetier: moetier top needs textual, which is not installed.",
            '  In the repository of moetier, run: pip install ".[tui]"',
        ]


# -- keys --------------------------------------------------------------------------------------------------------------


def drive(app: Top, person: Callable[[Pilot[None]], Awaitable[None]], size: tuple[int, int] = (150, 40)) -> None:
    async def do() -> None:
        async with app.run_test(size=size) as pilot:
            await person(pilot)

    asyncio.run(do())


async def until(pilot: Pilot[None], condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await pilot.pause(0.01)


def shown(app: Top, selector: str) -> str:
    """What a part says now, or a widget."""
    widget = app.screen_stack[0].query_one(selector)
    static = widget if isinstance(widget, Static) else widget.query_one(Static)
    return "\n".join("".join(segment.text for segment in line) for line in static.render_lines(static.size.region))


def test_pausing_and_the_interval(daemon: DaemonProcess, store: tuple[Path, Manifest]) -> None:
    watch = Watch(Credentials(), 0.05)
    app = Top([], daemon.address, watch)

    async def person(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "0 of 12" in shown(app, "#tiers"))
        await pilot.press("p")
        assert "paused" in shown(app, "#head")
        await asyncio.to_thread(asked, daemon, store[1])
        await pilot.pause(0.2)  # four looks, if there were any
        assert "0 of 12" in shown(app, "#tiers")
        await pilot.press("p")
        await until(pilot, lambda: "2 of 12" in shown(app, "#tiers"))
        await pilot.press("plus")
        assert (watch.interval, "every 0.1 s" in shown(app, "#head")) == (0.1, True)
        await pilot.press(*["plus"] * 9)
        assert watch.interval == 60
        await pilot.press(*["minus"] * 9)
        assert watch.interval == 0.1
        await pilot.press("q")

    drive(app, person)


def asked(daemon: DaemonProcess, manifest: Manifest) -> None:
    with RawClient(daemon.folder, manifest) as client:
        ask(client, 1, 0, 1, 2)


def test_parts_and_help(daemon: DaemonProcess) -> None:
    app = Top([], daemon.address, Watch(Credentials(), 1))  # a key takes as long as what is drawn meanwhile

    async def person(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "0 of 12" in shown(app, "#tiers"))
        names = ["tiers", "history", "prefetches", "clients", "experts"]
        visited = [app.focused.id if app.focused else ""]
        for key in ("tab", "right", "tab", "right"):
            await pilot.press(key)
            visited.append(app.focused.id if app.focused else "")
        assert visited == names
        for key, name in (("left", "clients"), ("shift+tab", "prefetches")):
            await pilot.press(key)
            assert isinstance(app.focused, Panel)
            assert app.focused.id == name
        assert "since the start" in str(app.query_one("#experts", Panel).border_title)
        await pilot.press("u")
        assert "lately" in str(app.query_one("#experts", Panel).border_title)
        await pilot.press("question_mark")
        assert len(app.screen_stack) == 2
        assert "pause, or continue" in "".join(str(one.content) for one in app.screen.query(Static))
        await pilot.press("x")
        assert len(app.screen_stack) == 1

    drive(app, person)


def test_a_look_that_comes_while_the_screen_is_taken_down(daemon: DaemonProcess) -> None:
    app = Top([], daemon.address, Watch(Credentials(), 0.05))

    async def person(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "0 of 12" in shown(app, "#tiers"))
        for name in ("#head", "#away", "#columns"):
            await app.query_one(name).remove()
        (model,) = app.history.models.values()
        seen = len(model.changes)
        await until(pilot, lambda: len(model.changes) > seen + 1)

    drive(app, person)


def test_one_of_several_daemons_and_of_several_models(
    daemon: DaemonProcess, store: tuple[Path, Manifest], runtime: Path, tmp_path: Path
) -> None:
    plan = make_plan(model="acme/other")
    write_store(tmp_path / "other", plan, make_records(plan, 1))
    with running_daemon([tmp_path / "other", store[0]], ram=16 * SLOT, folder=runtime / "moetier/second") as second:
        app = Top(running_daemons(), None, Watch(Credentials(), 1))

        async def person(pilot: Pilot[None]) -> None:
            listed = app.screen.query_one(OptionList)
            names = [str(listed.get_option_at_index(number).prompt) for number in range(listed.option_count)]
            assert ["default" in names[0], "acme/other" in names[1]] == [True, True]
            await pilot.press("down", "enter")
            await until(pilot, lambda: f"process {second.pid}" in shown(app, "#head"))
            tiers = app.query_one("#tiers", Panel)
            assert tiers.border_title == "acme/other (1 of 2)"
            await pilot.press("m")
            assert tiers.border_title == f"{store[1].model} (2 of 2)"
            await pilot.press("m")
            assert tiers.border_title == "acme/other (1 of 2)"

        drive(app, person)


def test_names_are_neither_markup_nor_escape_sequences(runtime: Path, tmp_path: Path) -> None:
    plan = make_plan(model="acme/m [/b]\x1b[31m")
    manifest = write_store(tmp_path / "odd", plan, make_records(plan, 1))
    with (
        running_daemon(tmp_path / "odd", ram=12 * SLOT, folder=runtime / "moetier/default") as daemon,
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(daemon.folder), manifest.digest, "[/b]"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as client,
    ):
        assert client.stdout is not None
        client.stdout.readline()  # it is connected
        listed, app = DaemonPicker(running_daemons()), Top([], daemon.address, Watch(Credentials(), 0.05))

        async def person(pilot: Pilot[None]) -> None:
            await until(pilot, lambda: "-c import sys" in shown(app, "#clients"))
            picture = "\n".join(strip.text for strip in app.screen._compositor.render_strips())
            assert "acme/m [/b]?[31m" in picture
            await app.push_screen(listed)
            prompt = listed.query_one(OptionList).get_option_at_index(0).prompt
            assert "acme/m [/b]?[31m" in str(prompt)
            await pilot.press("q")

        drive(app, person, (200, 40))
        client.communicate()


def test_a_cause_is_no_escape_sequence(runtime: Path) -> None:
    app = Top([], Address.of(runtime / "moetier/a\x1b[31mb"), Watch(Credentials(), 0.05))

    async def person(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "Trying again." in shown(app, "#away"))
        assert "a?[31mb" in shown(app, "#away")
        assert "a?[31mb" in shown(app, "#head")
        await pilot.press("q")

    drive(app, person)


def test_a_daemon_on_tcp_that_is_started_anew_between_two_looks(
    store: tuple[Path, Manifest], tmp_path: Path, port: int
) -> None:
    """gRPC connects again by itself."""
    listen = f"127.0.0.1:{port}"
    told: queue.Queue[Look | MoetierError] = queue.Queue()
    restarted = threading.Event()

    def tell(seen: Look | MoetierError) -> None:
        told.put(seen)
        restarted.wait()  # no look is under way meanwhile

    watch = Watch(Credentials(insecure=True), 0.05)
    with running_daemon(
        store[0], ram=12 * SLOT, folder=tmp_path / "d", extra=["--listen", listen, "--insecure"]
    ) as daemon:
        watch.begin(Address.parse(listen), tell)
        try:
            first = told.get(timeout=PATIENCE)
            assert isinstance(first, Look)
            former = daemon.pid
            daemon.restart()
            restarted.set()
            seen = told.get(timeout=PATIENCE)
            while not isinstance(seen, Look):  # the old connection may be found to be gone first
                seen = told.get(timeout=PATIENCE)
        finally:
            restarted.set()
            watch.end()
    assert (first.described.pid, seen.described.pid) == (former, daemon.pid)


# -- what is shown -----------------------------------------------------------------------------------------------------


def block(count: int, *ready: int, uses: dict[int, int] | None = None) -> pb.Block:
    return pb.Block(ready=ready, uses=[(uses or {}).get(expert, 0) for expert in range(count)])


def reply(uptime: float, host: pb.Tier, *blocks: pb.Block, clients: list[pb.Client] | None = None) -> pb.StatsReply:
    return pb.StatsReply(
        models=[pb.ModelStats(name="acme/one", digest="1", host=host)],
        details=[pb.Details(blocks=blocks, clients=clients or [])],
        uptime_s=uptime,
    )


def test_changes_are_by_the_second_and_another_daemon_begins_anew() -> None:
    history = History()
    history.add(
        SEVEN, reply(10, pb.Tier(hits=10, misses=2), block(2, uses={0: 8}), clients=[pb.Client(number=1, hits=10)])
    )
    assert history.models["1"].last is None
    now = pb.Tier(hits=40, misses=12, joined=4, prefetched=5, warmed=1, bytes_in=64, evictions=3, wait_seconds=0.5)
    clients = [pb.Client(number=1, hits=30, misses=8), pb.Client(number=2, misses=4)]
    history.add(SEVEN, reply(12, now, block(2, uses={0: 12}), clients=clients))
    model = history.models["1"]
    change = model.last
    assert change is not None
    assert (change.hits, change.misses, change.hit_ratio) == (15, 5, 0.75)
    assert (change.reads, change.bytes_read, change.evictions, change.waiting) == (6, 32, 1.5, 0.25)
    assert model.rates == {1: (10, 4), 2: (0, 2)}
    assert model.lately == [[4, 0]]
    history.add(SEVEN, reply(42, now, block(2, uses={0: 12})))
    assert history.models["1"].lately == [[2, 0]]
    assert history.models["1"].changes[-1].hit_ratio is None
    history.add(EIGHT, reply(43, pb.Tier(hits=1), block(2)))  # at the same address
    assert not history.models["1"].changes
    history.add(EIGHT, reply(1, pb.Tier(), block(2)))  # of the same number, in another namespace
    assert not history.models["1"].changes


@pytest.mark.parametrize(
    ("described", "host", "uses"),
    [
        (pb.DescribeReply(pid=7, version="1", started_unix_ms=5), pb.Tier(hits=12), {0: 8}),
        (SEVEN, pb.Tier(hits=9), {0: 8}),
        (SEVEN, pb.Tier(hits=12), {0: 7}),
    ],
    ids=["started later", "fewer hits", "fewer uses"],
)
def test_another_daemon_of_the_same_number_begins_anew(
    described: pb.DescribeReply, host: pb.Tier, uses: dict[int, int]
) -> None:
    history = History()
    history.add(SEVEN, reply(10, pb.Tier(hits=10), block(2, uses={0: 8})))
    history.add(SEVEN, reply(11, pb.Tier(hits=10), block(2, uses={0: 8})))
    assert len(history.models["1"].changes) == 1
    history.add(described, reply(12, host, block(2, uses=uses)))
    model = history.models["1"]
    assert (list(model.changes), model.lately, model.stats.host) == ([], [], host)


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


def test_sparklines() -> None:
    assert widgets.sparkline([0, 0.001, 0.5, 1, None], 6, 1.0) == " ▁▂▄█ "
    assert widgets.sparkline([], 3, 0.0) == "   "
    assert widgets.sparkline([1, 2, 3, 4], 2, 4.0) == "▆█"


def test_large_numbers_fit_into_the_least_width() -> None:
    """Of a screen of 120 columns, or of 80."""
    many, seconds = 12_345_678, 0.1234
    host = pb.Tier(
        slots=9_999, ready=9_999, slot_bytes=999 << 30, hits=10 * many, misses=many, joined=many // 20, evictions=many,
        wait_median=seconds, wait_p99=seconds, bytes_in=9 << 50, prefetched=many,
        useful=many // 20, late=9_999, wasted=9_999, cancelled=9_999, saved_seconds=many, warmed=many, recalled=many,
    )  # fmt: skip
    clients = [pb.Client(number=1, pid=4_194_303, connected_s=9e6, leases=64, hits=many, misses=1)]
    history = History()
    for uptime in (1, 2):
        history.add(SEVEN, reply(uptime, host, block(2), clients=clients))
    (model,) = history.models.values()
    console = Console(width=widgets.WIDTH, force_terminal=False, color_system=None)
    for part in (
        widgets.tiers(model),
        widgets.history(model, widgets.WIDTH),
        widgets.prefetches(host),
        widgets.clients(model, local=True),
    ):
        with console.capture() as capture:
            console.print(part)
        assert "…" not in capture.get(), capture.get()
        assert all(len(line.rstrip()) <= widgets.WIDTH for line in capture.get().splitlines())


@pytest.mark.parametrize(("blocks", "experts"), [(8, 8), (32, 8), (24, 32), (48, 128), (60, 384)])
def test_axis_and_legend_fit(blocks: int, experts: int) -> None:
    for width in (44, 76, 100):
        text = heatmap([block(experts)] * blocks, [[0.0] * experts] * blocks, width, 30).plain
        assert max(map(len, text.splitlines())) <= width
        assert "absent" in text


def test_programs_by_their_command_lines() -> None:
    assert widgets.program_of(2**22 + 1) == "?"
    command = [sys.executable, "-c", "print(flush=True); input()", "a\x1bb"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # before it has begun, it has no command line
        assert widgets.program_of(process.pid) == "-c print(flush=True); input() a?b"
        process.kill()
    command = [sys.executable, "-m", "moetier.tools.main", "quality", "/nothing", "--text", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert widgets.program_of(process.pid) == "moetier quality"
        process.kill()
