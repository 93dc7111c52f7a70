"""What stands in the parts of ``moetier top``: texts for a terminal, of what was seen of one model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from rich.table import Table
from rich.text import Text

from moetier.proto.expert_store_pb2 import Tier
from moetier.runtime.config import format_bytes
from moetier.tools.cli.failure import plain
from moetier.tools.cli.report import format_seconds

from .history import ModelHistory, reads_of

BAR = 16  # characters
WIDTH = 68  # columns that every part must fit into: of a screen of 120, or of 80, without borders
LEVELS = " ▁▂▃▄▅▆▇█"
BLUE, ORANGE, GREEN, RED = "#5aa9ff", "#e0862b", "#57b894", "#d9534f"


def tiers(model: ModelHistory) -> Table:
    """What is now, and since the daemon was started."""
    host, last = model.stats.host, model.last
    demands = host.hits + host.misses

    def rate(value: float | None) -> str:
        return "-" if value is None else f"{value:,.0f}/s"

    ratio = None if last is None else last.hit_ratio
    share = host.ready / host.slots if host.slots else 0.0
    rows: list[tuple[str, str, str | Text, str]] = [
        ("host", "slots", _bar([(share, BLUE)]), f"{host.ready:,} of {host.slots:,}, {format_bytes(host.slot_bytes)}"),
        ("", "hit ratio", "-" if ratio is None else f"{ratio:.1%}", f"{host.hits / demands:.1%}" if demands else "-"),
        ("", "hits", rate(None if last is None else last.hits), f"{host.hits:,}"),
        ("", "misses", rate(None if last is None else last.misses), f"{host.misses:,}, {host.joined:,} joined"),
        ("", "evictions", rate(None if last is None else last.evictions), f"{host.evictions:,}"),
        (
            "",
            "waits",
            "-" if last is None else f"{last.waiting:.2f} s/s",
            f"median {_milliseconds(host.wait_median)}, p99 {_milliseconds(host.wait_p99)}",
        ),
        ("", "leases", f"{model.stats.leases:,}", ""),
        ("store", "reads", rate(None if last is None else last.reads), f"{reads_of(host):,}, {host.failures:,} failed"),
        ("", "", "-" if last is None else f"{format_bytes(last.bytes_read)}/s", format_bytes(host.bytes_in)),
    ]
    if model.stats.fetches:
        rows += [
            ("others", "fetches", rate(None if last is None else last.fetches), f"{model.stats.fetches:,}"),
            (
                "",
                "",
                "-" if last is None else f"{format_bytes(last.bytes_fetched)}/s",
                format_bytes(model.stats.fetched_bytes),
            ),
        ]
    table = _table()
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_row(*(Text(word, "dim") for word in ("", "", "now", "since the start")))
    for tier, what, now, total in rows:
        table.add_row(Text(tier, "bold"), Text(what, "dim"), now, Text(total, no_wrap=True, overflow="ellipsis"))
    return table


def history(model: ModelHistory, width: int) -> Text:
    """A line each of what changed; the last is at the right."""
    changes = list(model.changes)
    rows = (
        ("hit ratio", [change.hit_ratio for change in changes], 1.0, "{:.0%}".format, GREEN),
        ("demands/s", [change.demands for change in changes], None, "{:,.0f}".format, BLUE),
        ("reads/s", [change.reads for change in changes], None, "{:,.0f}".format, ORANGE),
        ("bytes/s", [change.bytes_read for change in changes], None, format_bytes, ORANGE),
        ("waits s/s", [change.waiting for change in changes], None, "{:.2f}".format, RED),
    )
    text = Text(no_wrap=True, overflow="crop")
    for name, values, top, shown, colour in rows:
        most = top or max((value for value in values if value is not None), default=0.0)
        text.append(f"{name:<10}", "dim")
        text.append(sparkline(values, max(width - 26, 1), most), colour)
        text.append(f" max {shown(most)}\n", "dim")
    text.right_crop(1)
    return text


def sparkline(values: Iterable[float | None], width: int, top: float) -> str:
    """The last of them, against ``top``; more than nothing is seen as more than nothing."""
    last = list(values)[-width:]
    marks = (" " if value is None else LEVELS[_level(value, top)] for value in last)
    return "".join(marks).rjust(width)


def clients(model: ModelHistory, *, local: bool) -> Table:
    """With what they are called where they are processes of this machine."""
    table = _table(gap=1)
    numbers = ("leases", "hits/s", "miss/s", "hits")
    head = ["pid", *(["program"] if local else []), "for", *numbers]
    for name in head:
        table.add_column(
            Text(name, "dim"),
            justify="right" if name in numbers else "left",
            no_wrap=True,
            overflow="ellipsis",
            ratio=1 if name == "program" else None,
        )
    table.expand = local
    table.show_header = True
    for client in model.details.clients:
        hits, misses = model.rates.get(client.number, (0.0, 0.0))
        wanted = client.hits + client.misses
        table.add_row(
            str(client.pid),
            *([Text(program_of(client.pid))] if local else []),  # no markup
            format_seconds(client.connected_s),
            f"{client.leases:,}",
            f"{hits:,.0f}",
            f"{misses:,.0f}",
            f"{client.hits / wanted:.1%}" if wanted else "-",
        )
    if not model.details.clients:
        table.add_row(Text("none", "dim"))
    return table


def program_of(pid: int) -> str:
    """The command line of a process of this machine, of moetier's own the command alone; "?" where there is none, or
    it may not be seen."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "?"
    if os.path.basename(words[0]).startswith("python") and len(words) > 2:  # noqa: PTH119 - it may be no path
        words = words[2 if words[1] == "-m" else 1 :]
    name = os.path.basename(words[0])  # noqa: PTH119
    if name in ("moetier", "moetier.tools.main"):
        return plain(" ".join(["moetier", *words[1:2]]))
    text = " ".join([name, *words[1:]]).strip()
    return plain(text) or "?"


def prefetches(host: Tier) -> Text:
    """What became of the wishes."""
    found = (
        ("useful", host.useful, GREEN),
        ("late", host.late, BLUE),
        ("wasted", host.wasted, RED),
        ("cancelled", host.cancelled, "#8a8f98"),
    )
    total = sum(count for _, count, _ in found)
    text = _bar([(count / total, colour) for _, count, colour in found] if total else [], width=40)
    text.append("\n")
    for name, count, colour in found:
        text.append("■ ", colour).append(f"{name} ", "dim").append(f"{count:,}  ")
    text.append(f"\n{host.prefetched:,} read, {host.saved_seconds:.1f} s of waiting saved", "dim")
    if host.warmed:
        text.append(f"\n{host.warmed:,} read beforehand, {host.recalled:,} of them used", "dim")
    return text


def _table(gap: int = 2) -> Table:
    """``gap``: columns between two of its own."""
    return Table.grid(padding=(0, gap, 0, 0))


def _bar(parts: Iterable[tuple[float, str]], width: int = BAR) -> Text:
    """Shares of a whole, in colours; a share that is there is seen."""
    text = Text()
    for share, colour in parts:
        text.append("█" * min(max(round(share * width), share > 0), width - len(text)), colour)
    return text.append("░" * (width - len(text)), "#3a3f47")


def _level(value: float, top: float) -> int:
    if value <= 0 or top <= 0:
        return 1
    return min(max(round(value / top * (len(LEVELS) - 1)), 2), len(LEVELS) - 1)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
