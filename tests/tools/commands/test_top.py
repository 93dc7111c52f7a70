"""``moetier top`` in a terminal, on real daemons."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import outlets  # noqa: F401 - keeps gRPC's event loop from one test to the next
import pytest
from daemons import DaemonProcess, running_daemon
from raw_client import RawClient
from screens import DrawnTerminal
from stores import layout_of

from moetier.tiers.manifest import Manifest
from moetier.tools.top.app import TERMINATED
from moetier.tools.top.heat import colour

SLOT = layout_of().slot_bytes
COMMAND = ("-m", "moetier.tools.main", "top")
ALTERNATE, NORMAL = "\x1b[?1049h", "\x1b[?1049l"


@pytest.fixture
def daemon(store: tuple[Path, Manifest], runtime: Path) -> Iterator[DaemonProcess]:
    with running_daemon(store[0], ram=12 * SLOT, folder=runtime / "moetier/default") as daemon:
        yield daemon


def ask(client: RawClient, request: int, block: int, *experts: int) -> None:
    """Asks for what is granted, and gives it back."""
    client.acquire(request, block, experts)
    for _ in experts:
        client.granted()
    client.release(request)


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
    with DrawnTerminal(*COMMAND, "--interval", "0.2") as terminal:
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


@pytest.mark.parametrize(("columns", "lines"), [(120, 40), pytest.param(80, 48, marks=pytest.mark.slow)])
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
