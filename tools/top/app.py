"""Application of ``moetier top``. Only this module and ``widgets`` import Textual."""

from __future__ import annotations

import asyncio
import pwd
import signal
from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.widgets import Footer, Static

from moetier.runtime.wire.address import Address, runtime_folder
from moetier.runtime.wire.probe import RunningDaemon
from moetier.tiers.errors import MoetierError
from moetier.tools.cli.failure import plain
from moetier.tools.cli.report import format_seconds

from . import widgets
from .heat import heatmap
from .history import History, ModelHistory
from .watch import DaemonReading, Watch
from .widgets import DaemonPicker, Help, Panel

INTERVALS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  # seconds
TERMINATED = 128 + signal.SIGTERM
NARROW_HEAT = 20  # lines of the map of experts on a narrow screen, on which the parts are below each other


class DaemonUpdate(Message):
    """Message with a daemon's new state, or with the error of a query."""

    def __init__(self, seen: DaemonReading | MoetierError) -> None:
        super().__init__()
        self.seen = seen


class Top(App[None]):
    """Application that shows the daemon at ``address``; if that is None, first a list of ``daemons``.

    It starts and ends ``watch``, which queries the daemon.
    """

    TITLE = "moetier top"
    ENABLE_COMMAND_PALETTE = False
    HORIZONTAL_BREAKPOINTS = [  # noqa: RUF012 - as App declares it
        (0, "-narrow"),
        (120, "-wide"),
    ]
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "end"),
        Binding("ctrl+c", "quit", show=False, priority=True),
        Binding("p", "pause", "pause"),
        Binding("plus,equals_sign", "interval(1)", "less often", key_display="+"),
        Binding("minus", "interval(-1)", "more often", key_display="-"),
        Binding("u", "uses", "uses"),
        Binding("m", "model", "model"),
        Binding("question_mark", "help", "help", key_display="?"),
    ]
    CSS = """
    #head { height: 1; padding: 0 1; background: $panel; }
    #away { height: auto; padding: 0 1; background: $error-darken-2; color: $text; display: none; }
    #away.shown { display: block; }
    #columns { height: 1fr; }
    Panel { border: round $surface-lighten-2; border-title-color: $text-muted; padding: 0 1; height: auto; }
    Panel:focus { border: round $accent; border-title-color: $accent; background-tint: $foreground 0%; }
    .-narrow #columns { layout: vertical; overflow-y: auto; }
    .-narrow #left, .-narrow #experts { height: auto; width: 100%; }
    .-wide #left { width: 50%; min-width: 72; max-width: 88; overflow-y: auto; }
    .-wide #experts { width: 1fr; height: 1fr; }
    .-wide #clients { min-height: 5; }
    Help { align: center middle; }
    Help VerticalScroll { width: 76; max-width: 100%; height: auto; max-height: 100%; }
    Help VerticalScroll { padding: 1 2; border: round $accent; background: $panel; }
    """

    def __init__(self, daemons: Sequence[RunningDaemon], address: Address | None, watch: Watch) -> None:
        super().__init__()
        self._daemons = daemons
        self._address = address
        self._watch = watch
        self._seen: DaemonReading | None = None
        self._error: MoetierError | None = None
        self.history = History()
        self._model = 0
        self._is_lately = False
        # kept in attributes: a message may come while the screen is being removed, when queries no longer find widgets
        self._heading = Static(id="head")
        self._away = Static(id="away")
        self._parts = {name: Panel(name) for name in ("tiers", "history", "prefetches", "clients", "experts")}

    def compose(self) -> ComposeResult:
        """Yield the heading, the parts in columns and the footer."""
        yield self._heading
        yield self._away
        with Horizontal(id="columns"):
            with Vertical(id="left"):
                yield from (part for name, part in self._parts.items() if name != "experts")
            yield self._parts["experts"]
        yield Footer()

    def on_mount(self) -> None:
        """Handle SIGTERM, and start to watch the daemon, or let the user choose one."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._terminate)
        if self._address is None:
            self.push_screen(DaemonPicker(self._daemons))
        else:
            self._begin(self._address)

    def on_unmount(self) -> None:
        """End the watch."""
        self._watch.end()

    def on_daemon_picker_made(self, made: DaemonPicker.Made) -> None:
        """Start to watch the chosen daemon."""
        self.pop_screen()
        self._begin(made.address)

    def on_daemon_update(self, told: DaemonUpdate) -> None:
        """Show the daemon's new state, or the error of the query."""
        if isinstance(told.seen, MoetierError):
            self._error = told.seen
        else:
            self._seen, self._error = told.seen, None
            self.history.add(told.seen.described, told.seen.stats)
        self._show()

    def on_part_sized(self) -> None:
        """Redraw all parts, for their new sizes."""
        self._show()

    def action_pause(self) -> None:
        """Pause the watch, or continue it."""
        self._watch.change(paused=not self._watch.is_paused)
        self._show()

    def action_interval(self, step: int) -> None:
        """Change the interval to the next longer one (``step`` 1) or the next shorter one (-1) in INTERVALS."""
        now = self._watch.interval
        if others := [value for value in INTERVALS if (value - now) * step > 0]:
            self._watch.change(interval=min(others, key=lambda value: abs(value - now)))
        self._show()

    def action_uses(self) -> None:
        """Switch between the uses of experts since the daemon's start and recent uses."""
        self._is_lately = not self._is_lately
        self._show()

    def action_model(self) -> None:
        """Show the daemon's next model."""
        self._model += 1
        self._show()

    def action_help(self) -> None:
        """Show the help, unless it is shown already."""
        if not isinstance(self.screen, Help):
            self.push_screen(Help())

    async def action_quit(self) -> None:
        """Exit the application."""
        self.exit()

    def _begin(self, address: Address) -> None:
        self._address = address
        self._parts["tiers"].focus()
        self._watch.begin(address, lambda seen: self.post_message(DaemonUpdate(seen)))
        self._show()

    def _terminate(self) -> None:
        self.exit(return_code=TERMINATED)

    # -- what is shown -------------------------------------------------------------------------------------------------

    def _show(self) -> None:
        self._away.set_class(self._error is not None, "shown")
        if self._error is not None:
            self._away.update(Text(f"{plain(self._error.cause)} Trying again.", overflow="fold"))
        self._heading.update(self._head())
        if models := list(self.history.models.values()):
            self._show_model(models[self._model % len(models)], len(models))

    @property
    def _is_wide(self) -> bool:
        return bool(self.screen_stack) and self.screen_stack[0].has_class("-wide")

    def _head(self) -> Text:
        state = "paused" if self._watch.is_paused else f"every {self._watch.interval:g} s"
        address = "" if self._address is None else plain(_name(self._address))
        parts = ("moetier top  ", "bold"), address, (f"  {state}", "bold")
        text = Text.assemble(*parts, no_wrap=True, overflow="ellipsis")
        if self._seen is not None:
            described, stats = self._seen.described, self._seen.stats
            up = format_seconds(stats.uptime_s)
            text.append(f"  process {described.pid}, moetier {plain(described.version)}, up {up}", "dim")
        return text

    def _show_model(self, model: ModelHistory, of: int) -> None:
        assert self._address is not None
        parts = self._parts
        number = f" ({self._model % of + 1} of {of})" if of > 1 else ""
        parts["tiers"].show(widgets.tiers(model), f"{plain(model.stats.name)}{number}")
        parts["history"].show(widgets.history(model, _width(parts["history"])))
        parts["prefetches"].show(widgets.prefetches(model.stats.host))
        folder = self._address.folder
        parts["clients"].show(
            widgets.clients(model, local=folder is not None),
            f"clients of {_user(folder.stat().st_uid)}" if folder is not None and folder.exists() else "clients",
        )
        experts = parts["experts"]
        blocks = model.details.blocks
        uses = model.lately if self._is_lately and model.lately else [list(block.uses) for block in blocks]
        height = experts.scrollable_content_region.height if self._is_wide else NARROW_HEAT
        experts.show(
            heatmap(blocks, uses, _width(experts), height),
            f"experts by block, uses {'lately' if self._is_lately else 'since the start'}",
        )


def _width(part: Panel) -> int:
    return part.scrollable_content_region.width


def _name(address: Address) -> str:
    """Return the shortest text that names the address on a command line."""
    folder = address.folder
    return folder.name if folder is not None and folder.parent == runtime_folder() else str(address)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
