"""Help of the command line: short usage, commands in groups, and lines that are not too long."""

from __future__ import annotations

import argparse
import shutil
from typing import Any

WIDTH = 100  # maximum number of columns of a help text


class HelpFormatter(argparse.HelpFormatter):
    """Format help in lines of at most WIDTH; the usage names only positional and required arguments."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=min(shutil.get_terminal_size().columns - 2, WIDTH))

    def add_usage(self, usage, actions, groups, prefix=None):  # type: ignore[no-untyped-def]  # as argparse declares it
        """Add the usage line, in which "[options]" stands for all options that are not required."""
        words = ["%(prog)s", "[options]"]
        for action in actions:
            if not action.option_strings:
                words.append(self._format_args(action, action.metavar or action.dest))
            elif action.required:
                words += [action.option_strings[0], self._format_args(action, action.metavar)]
        super().add_usage(usage or " ".join(words), actions, groups, prefix)

    def add_argument(self, action: argparse.Action) -> None:
        """Add an argument, and make the first column wide enough for commands."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):  # argparse does not count the indentation of commands
            self._action_max_length += self._indent_increment

    def _format_action(self, action: argparse.Action) -> str:
        """Format an argument. Commands are listed in their groups, below the titles of these."""
        groups = getattr(action, "groups", {})
        if not groups:
            return super()._format_action(action)
        subparsers: Any = action
        lines = {
            command.dest: super(HelpFormatter, self)._format_action(command) for command in subparsers._choices_actions
        }
        return "\n".join(
            (title and f"{title}:\n") + "".join(lines[name] for name in commands) for title, commands in groups.items()
        )

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Keep the line breaks of a text that has several lines, such as the examples; wrap any other text."""
        return text if "\n" in text else super()._fill_text(text, width, indent)
