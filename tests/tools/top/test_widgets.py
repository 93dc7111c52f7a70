"""Texts of the panels: sparklines, large numbers, and names of programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from replies import SEVEN, block, reply
from rich.console import Console

from moetier.proto import expert_store_pb2 as pb
from moetier.tools.top import widgets
from moetier.tools.top.history import History


def test_sparklines() -> None:
    assert widgets.sparkline([0, 0.001, 0.5, 1, None], 6, 1.0) == " ▁▂▄█ "
    assert widgets.sparkline([], 3, 0.0) == "   "
    assert widgets.sparkline([1, 2, 3, 4], 2, 4.0) == "▆█"


def test_large_numbers_fit_into_the_least_width() -> None:
    """Of a screen of 120 columns, or of 80."""
    many, seconds = 12_345_678, 0.1234
    host = pb.Tier(
        slots=9_999, ready=9_999, memory_bytes=999 << 30, hits=10 * many, misses=many, joined=many // 20,
        evictions=many, wait_median=seconds, wait_p99=seconds, bytes_in=9 << 50, prefetched=many,
        useful=many // 20, late=9_999, wasted=9_999, cancelled=9_999, dropped=many,
        saved_seconds=many, warmed=many, recalled=many,
    )  # fmt: skip
    clients = [pb.Client(number=1, pid=4_194_303, connected_s=9e6, leases=64, reported_hits=many, requested=1)]
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
