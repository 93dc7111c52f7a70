"""How a command line is read, and what is said of one that is wrong: two lines, as of every error."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import NoReturn

from moetier.tiers.errors import ConfigError, MoetierError

from .options import commands_of

EXIT_USAGE = 2  # as argparse has it


class UsageError(ConfigError):
    """Options, each of which argparse has taken by itself, that can't be for any model."""


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Around what looks at options alone: a ConfigError of it is one of the command line."""
    try:
        yield
    except ConfigError as error:
        raise UsageError(error.cause, error.fix) from error


class CommandParser(argparse.ArgumentParser):
    """Takes positional arguments on both sides of options: ``generate DIR --ram 6GiB PROMPT``. An option that it does
    not have is named alone, before all else that may be wrong: what follows it may be its value, or not."""

    _inside = False

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]  # as argparse declares it
        if self._inside:  # argparse's own passes
            return super().parse_known_args(args, namespace)
        if commands := commands_of(self):
            words = sys.argv[1:] if args is None else list(args)
            own = list(takewhile(lambda word: word.startswith("-"), words))
            self._check_options(own)
            if (rest := words[len(own) :]) and rest[0] not in commands:
                self._refuse(f"there is no {self._name('command')} {rest[0]!r}.", _nearest(rest[0], commands))
            return super().parse_known_args(args, namespace)
        self._check_options(args or ())
        self._inside = True
        try:
            found, more = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False
        if more:
            self._refuse(f"{self._name()} has no place for {more[0]!r}.", "Quote a text of several words; ")
        return found, more

    def _get_value(self, action, arg_string):  # type: ignore[no-untyped-def]  # as argparse declares it
        """An error of moetier's own says more than argparse would of it."""
        try:
            return super()._get_value(action, arg_string)
        except MoetierError as error:
            name = "/".join(action.option_strings) or action.metavar
            self.exit(EXIT_USAGE, f"moetier: {name}: {error.cause}\n  {error.fix}\n")

    def error(self, message: str) -> NoReturn:
        """For what argparse itself finds. The usage, which may be twenty lines, is in --help."""
        self._refuse(f"{name}: {message}." if (name := self._name()) else f"{message}.")

    def _name(self, of_none: str = "") -> str:
        """ "bench decode"; ``of_none`` for the whole."""
        return self.prog.partition(" ")[2] or of_none

    def _check_options(self, words: Iterable[str]) -> None:
        known = [name for name in self._option_string_actions if name.startswith("--")]
        for word in takewhile("--".__ne__, words):
            name = word.partition("=")[0]
            # argparse takes a word with a space in it for no option, and a beginning that is clear for the whole
            if name.startswith("--") and " " not in word and not any(each.startswith(name) for each in known):
                self._refuse(f"{self._name('moetier')} has no option {name}.", _nearest(name, known))

    def _refuse(self, cause: str, advice: str = "") -> NoReturn:
        self.exit(EXIT_USAGE, f"moetier: {cause}\n  {advice}{self.prog} --help says what there is.\n")


def _nearest(word: str, known: Iterable[str]) -> str:
    return f"The nearest is {difflib.get_close_matches(word, list(known), n=1, cutoff=0)[0]}; "
