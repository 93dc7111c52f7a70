"""Widgets of ``moetier top``: parts of the screen and their contents, the help, and the choice among daemons."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.message import Message
from textual.screen import ModalScreen, Screen
from textual.widgets import Footer, OptionList, Static
from textual.widgets.option_list import Option

from moetier.proto.expert_store_pb2 import Tier
from moetier.runtime.wire.address import Address
from moetier.runtime.wire.probe import RunningDaemon
from moetier.tiers.text import format_bytes
from moetier.tools.cli.failure import plain
from moetier.tools.cli.report import format_seconds

from .history import ModelHistory, reads_of

BAR = 16  # characters
WIDTH = 68  # columns, without borders, into which every part must fit on a screen of 80 or 120 columns
LEVELS = " ▁▂▃▄▅▆▇█"
BLUE, ORANGE, GREEN, RED = "#5aa9ff", "#e0862b", "#57b894", "#d9534f"

HELP = """\
q        end
p        pause, or continue
+  -      query the daemon less often, more often
tab  ->  select the next part (back: shift+tab  <-)
up down  scroll a part that does not fit
u        uses of experts: since the daemon was started, or lately
         (a use counts half after 30 seconds)
m        show the next model, if the daemon has several
?        show this help

Rates per second are those between the last two queries. Waits are
the times in which callers had nothing to compute with. Hits of a
client are records that it found in the daemon's memory by itself;
misses are records that it asked for."""


class Panel(VerticalScroll, can_focus=True):
    """Part of the screen, with a border and a title."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("right", "app.focus_next", show=False),
        Binding("left", "app.focus_previous", show=False),
    ]

    def __init__(self, name: str) -> None:
        super().__init__(id=name)
        self.border_title = name
        self._body = Static()

    class Sized(Message):
        """Message that the size of a part has changed, so that its content must be redrawn."""

    def on_resize(self) -> None:
        """Ask the application to redraw the part."""
        self.post_message(self.Sized())

    def compose(self) -> ComposeResult:
        """Yield the part's body."""
        yield self._body

    def show(self, content: RenderableType, title: str = "") -> None:
        """Replace the content and, unless ``title`` is "", the title."""
        self._body.update(content)
        if title:
            self.border_title = Text(title)  # a Text, as a str would be read as markup


class Help(ModalScreen[None]):
    """Screen with the list of keys."""

    def compose(self) -> ComposeResult:
        """Yield the text in a box that scrolls."""
        with VerticalScroll() as box:
            box.border_title = "moetier top"
            yield Static(HELP, markup=False)

    def on_key(self) -> None:
        """Close the help at any key."""
        self.dismiss()


class DaemonPicker(Screen[None]):
    """Screen on which the user chooses one of several daemons."""

    class Made(Message):
        """Message with the address of the chosen daemon."""

        def __init__(self, address: Address) -> None:
            super().__init__()
            self.address = address

    def __init__(self, daemons: Sequence[RunningDaemon]) -> None:
        super().__init__()
        self._daemons = daemons

    def compose(self) -> ComposeResult:
        """Yield the question, the list of daemons and the footer."""
        yield Static("Which daemon?", id="head")
        yield OptionList(*(Option(_line(daemon)) for daemon in self._daemons))
        yield Footer()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Post the address of the selected daemon to the application."""
        self.app.post_message(self.Made(Address.of(self._daemons[event.option_index].folder)))


def _line(daemon: RunningDaemon) -> Text:
    names = ", ".join(plain(model.name) for model in daemon.card.models)
    answers = "" if daemon.stats is not None else ", does not answer"
    return Text.assemble(
        (plain(daemon.folder.name), "bold"),
        f"  {names}",
        (f"  process {daemon.card.pid}{answers}", "dim"),
        f"\n{plain(str(daemon.folder))}",
    )


def tiers(model: ModelHistory) -> Table:
    """Return a table of the tiers' counters: their present rates, and their totals since the daemon was started."""
    host, last = model.stats.host, model.last
    demands = host.hits + host.misses

    def now(name: str, as_text: Callable[[float], str] = "{:,.0f}/s".format) -> str:
        return "-" if last is None else as_text(getattr(last, name))

    ratio = None if last is None else last.hit_ratio
    share = host.ready / host.slots if host.slots else 0.0
    rows: list[tuple[str, str, str | Text, str]] = [
        (
            "host",
            "slots",
            _bar([(share, BLUE)]),
            f"{host.ready:,} of {host.slots:,}, {format_bytes(host.memory_bytes)}",
        ),
        ("", "hit ratio", "-" if ratio is None else f"{ratio:.1%}", f"{host.hits / demands:.1%}" if demands else "-"),
        ("", "hits", now("hits"), f"{host.hits:,}"),
        ("", "misses", now("misses"), f"{host.misses:,}, {host.joined:,} joined"),
        ("", "evictions", now("evictions"), f"{host.evictions:,}"),
        (
            "",
            "waits",
            now("waiting", "{:.2f} s/s".format),
            f"median {_milliseconds(host.wait_median)}, p99 {_milliseconds(host.wait_p99)}",
        ),
        ("", "leases", f"{model.stats.leases:,}", ""),
        ("store", "reads", now("reads"), f"{reads_of(host):,}, {host.failures:,} failed"),
        ("", "", now("bytes_read", lambda rate: f"{format_bytes(rate)}/s"), format_bytes(host.bytes_in)),
    ]
    if model.stats.fetches:
        rows += [
            ("others", "fetches", now("fetches"), f"{model.stats.fetches:,}"),
            (
                "",
                "",
                now("bytes_fetched", lambda rate: f"{format_bytes(rate)}/s"),
                format_bytes(model.stats.fetched_bytes),
            ),
        ]
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_row(*(Text(word, "dim") for word in ("", "", "now", "since the start")))
    for tier, what, rate, total in rows:
        table.add_row(Text(tier, "bold"), Text(what, "dim"), rate, Text(total, no_wrap=True, overflow="ellipsis"))
    return table


def history(model: ModelHistory, width: int) -> Text:
    """Return a line of ``width`` columns for each rate, with the rate over time, the latest value at the right."""
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
    """Return the last ``width`` values as a line of bars. The value ``top`` has the highest bar; None is a space.

    Any value above 0 has a higher bar than 0.
    """
    marks = (" " if value is None else LEVELS[_level(value, top)] for value in list(values)[-width:])
    return "".join(marks).rjust(width)


def clients(model: ModelHistory, *, local: bool) -> Table:
    """Return the table of a daemon's clients. If ``local``, they are processes of this machine: show their programs."""
    table = Table.grid(padding=(0, 1, 0, 0))
    numbers = ("leases", "hits/s", "miss/s", "hits")
    for name in ["pid", *(["program"] if local else []), "for", *numbers]:
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
        demanded = client.reported_hits + client.requested
        table.add_row(
            str(client.pid),
            *([Text(program_of(client.pid))] if local else []),  # a Text, so that it is not read as markup
            format_seconds(client.connected_s),
            f"{client.leases:,}",
            f"{hits:,.0f}",
            f"{misses:,.0f}",
            f"{client.reported_hits / demanded:.1%}" if demanded else "-",
        )
    if not model.details.clients:
        table.add_row(Text("none", "dim"))
    return table


def program_of(pid: int) -> str:
    """Return the command line of a process of this machine; for moetier's own processes, only the command's name.

    Return "?" if there is no such process, or if its command line can't be read.
    """
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "?"
    if os.path.basename(words[0]).startswith("python") and len(words) > 2:  # noqa: PTH119 - it may be no path
        words = words[2 if words[1] == "-m" else 1 :]
    name = os.path.basename(words[0])  # noqa: PTH119
    if name in ("moetier", "moetier.tools.main"):
        return plain(" ".join(["moetier", *words[1:2]]))
    return plain(" ".join([name, *words[1:]]).strip()) or "?"


def prefetches(host: Tier) -> Text:
    """Return a bar and the counts of the outcomes of prefetches."""
    outcomes = (
        ("useful", host.useful, GREEN),
        ("late", host.late, BLUE),
        ("wasted", host.wasted, RED),
        ("cancelled", host.cancelled, "#8a8f98"),
    )
    total = sum(count for _, count, _ in outcomes)
    text = _bar([(count / total, colour) for _, count, colour in outcomes] if total else [], width=40)
    text.append("\n")
    for name, count, colour in outcomes:
        text.append("■ ", colour).append(f"{name} ", "dim").append(f"{count:,}  ")
    text.append(f"\n{host.prefetched:,} read, {host.dropped:,} dropped, saved up to {host.saved_seconds:.1f} s", "dim")
    if host.warmed:
        text.append(f"\n{host.warmed:,} preloaded, {host.recalled:,} of them used", "dim")
    return text


def _bar(parts: Iterable[tuple[float, str]], width: int = BAR) -> Text:
    """Return a bar of ``width`` characters. ``parts`` are (share, colour); a share above 0 has one or more of them."""
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
