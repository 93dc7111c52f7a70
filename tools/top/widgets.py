"""What the screens of ``moetier top`` are made of: a part with a border, the help, the choice among daemons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.console import RenderableType
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.message import Message
from textual.screen import ModalScreen, Screen
from textual.widgets import Footer, OptionList, Static
from textual.widgets.option_list import Option

from moetier.runtime.wire.address import Address
from moetier.runtime.wire.probe import RunningDaemon
from moetier.tools.cli.failure import plain

HELP = """\
q        end
p        pause, and go on
+  -      look less often, more often
tab  ->  the next part, shift+tab  <- the one before
up down  scroll what does not fit
u        uses of experts: since the daemon was started, or lately
         (a use counts half after 30 seconds)
m        the next model, where the daemon has several
?        this

A second's rates are those between the last two looks. Waits are of
those who ask the daemon and hold nothing to compute with meanwhile.
Hits of a client are what it found by itself in the daemon's memory,
misses what it asked for."""


class Part(VerticalScroll, can_focus=True):
    """One thing, with a border and a title."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("right", "app.focus_next", show=False),
        Binding("left", "app.focus_previous", show=False),
    ]

    def __init__(self, name: str) -> None:
        super().__init__(id=name)
        self.border_title = name
        self._body = Static()

    class Sized(Message):
        """What is drawn to its size is to be drawn anew."""

    def on_resize(self) -> None:
        """Ask for the part to be drawn anew."""
        self.post_message(self.Sized())

    def compose(self) -> ComposeResult:
        """Yield the part's body."""
        yield self._body

    def show(self, content: RenderableType, title: str = "") -> None:
        """Replace the content and, unless it is empty, the title."""
        self._body.update(content)
        if title:
            self.border_title = Text(title)  # what is no str is no markup


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


class Choice(Screen[None]):
    """Which of several daemons."""

    class Made(Message):
        """Message with the address of the chosen daemon."""

        def __init__(self, address: Address) -> None:
            super().__init__()
            self.address = address

    def __init__(self, found: Sequence[RunningDaemon]) -> None:
        super().__init__()
        self._found = found

    def compose(self) -> ComposeResult:
        """Yield the question, the list of daemons and the footer."""
        yield Static("Which daemon?", id="head")
        yield OptionList(*(Option(_line(daemon)) for daemon in self._found))
        yield Footer()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Post the address of the selected daemon to the application."""
        self.app.post_message(self.Made(Address.of(self._found[event.option_index].folder)))


def _line(daemon: RunningDaemon) -> Text:
    names = ", ".join(plain(model.name) for model in daemon.card.models)
    answers = "" if daemon.stats is not None else ", does not answer"
    return Text.assemble(
        (plain(daemon.folder.name), "bold"),
        f"  {names}",
        (f"  process {daemon.card.pid}{answers}", "dim"),
        f"\n{plain(str(daemon.folder))}",
    )
