"""The screens of moetier top, driven by textual's pilot, on real daemons."""

from __future__ import annotations

import asyncio
import queue
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
from stores import layout_of, make_plan, make_records, write_store
from textual.pilot import Pilot
from textual.widgets import OptionList, Static

from moetier.runtime.wire.address import Address, Credentials
from moetier.runtime.wire.probe import running_daemons
from moetier.tiers.errors import MoetierError
from moetier.tiers.manifest import Manifest
from moetier.tools.top.app import Top
from moetier.tools.top.watch import DaemonReading, Watch
from moetier.tools.top.widgets import DaemonPicker, Panel

SLOT = layout_of().slot_bytes
# with what else stands in the command line
HOLD = (
    "import sys; from pathlib import Path; from moetier.runtime.wire.control import ControlConnection; "
    "side = ControlConnection.open(Path(sys.argv[1]), sys.argv[2]); print(flush=True); sys.stdin.read()"
)


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


@pytest.mark.slow
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
    told: queue.Queue[DaemonReading | MoetierError] = queue.Queue()
    restarted = threading.Event()

    def tell(seen: DaemonReading | MoetierError) -> None:
        told.put(seen)
        restarted.wait()  # no look is under way meanwhile

    watch = Watch(Credentials(insecure=True), 0.05)
    with running_daemon(
        store[0], ram=12 * SLOT, folder=tmp_path / "d", extra=["--listen", listen, "--insecure"]
    ) as daemon:
        watch.begin(Address.parse(listen), tell)
        try:
            first = told.get(timeout=PATIENCE)
            assert isinstance(first, DaemonReading)
            former = daemon.pid
            daemon.restart()
            restarted.set()
            seen = told.get(timeout=PATIENCE)
            while not isinstance(seen, DaemonReading):  # the old connection may be found to be gone first
                seen = told.get(timeout=PATIENCE)
        finally:
            restarted.set()
            watch.end()
    assert (first.described.pid, seen.described.pid) == (former, daemon.pid)
