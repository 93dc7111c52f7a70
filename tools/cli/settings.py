"""Settings: values of options from the environment and from a TOML file.

An option's value comes from the first of these that has one: the command line, the environment, the file, the
option's default. In the environment and in the file, a setting for one command overrides a setting for all commands.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moetier.runtime.config import CACHE, TIER_OPTIONS
from moetier.runtime.libraries.lean import LEAN
from moetier.tiers.addresses import HTTP_AUTHORIZATION
from moetier.tiers.errors import ConfigError, MoetierError

from .failure import DEBUG
from .parser import NUMBERS, settable

PREFIX = "MOETIER_"
GENERAL = "general"  # the section for all commands
REFERENCE = "generate"  # the command whose options the keys of GENERAL are
# keys of GENERAL; they also apply to options of other commands that have the same name, type and choices
GENERAL_KEYS = [
    name.replace("_", "-") for name in (*(name for name, option in TIER_OPTIONS.items() if option.is_setting), *CACHE)
]
CONFIG, LOG = "MOETIER_CONFIG", "MOETIER_LOG"
API_KEY_VARIABLE = "MOETIER_API_KEY"  # it may hold the only key of a server; clients of it take the key from there
# of moetier, and no settings
OWN = (API_KEY_VARIABLE, CONFIG, DEBUG, HTTP_AUTHORIZATION, LEAN, LOG)
# variables that are not settings: OWN, those of the tests, and those that Kubernetes sets for a service called moetier
OTHERS = re.compile(
    rf"{'|'.join(OWN)}|{PREFIX}((TEST|SOAK)_.*|SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_.*)?)",
)
CLOSE = 0.85  # least similarity (difflib, 0 to 1) of a suggested variable; high, because all begin with PREFIX
SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True, slots=True)
class Setting:
    """Value of one option of a command, and its origin."""

    key: str
    value: object
    source: str  # "default", "file" or "environment"
    where: str = ""  # such as "MOETIER_RAM" or "/path/config.toml, [generate] ram"; "" for a default
    fault: ConfigError | None = None  # why ``value`` is invalid, if it is; ``value`` is then as it was written

    @property
    def is_default(self) -> bool:
        """Whether neither the file nor the environment sets the value."""
        return self.source == "default"


class Settings:
    """Settings from the file and the environment for the options of ``commands``, a dictionary from name to parser.

    ``faults`` is a list of mistakes. Construction adds unknown sections and keys; ``of`` adds invalid values.
    """

    def __init__(
        self, commands: Mapping[str, argparse.ArgumentParser], environment: Mapping[str, str] = os.environ
    ) -> None:
        """Read the file. Raises ConfigError if it can't be read, or is not TOML."""
        self.file = config_file(environment)
        self.faults: list[ConfigError] = []
        own = {name: settable(command) for name, command in commands.items()}
        self._options = {GENERAL: {key: own[REFERENCE][key] for key in GENERAL_KEYS}} | own
        self._variables = {name: text for name, text in environment.items() if name.startswith(PREFIX) and text}
        self._sections: dict[str, Mapping[str, Any]] = {}
        for section, keys in _read_file(self.file, must_be=bool(environment.get(CONFIG))).items():
            if isinstance(keys, dict):
                self._sections[section] = keys
            self._check_section(section, keys)

    @property
    def sections(self) -> dict[str, list[str]]:
        """Dictionary from section to the keys that it may have, GENERAL first. Sections without keys are left out."""
        return {section: list(options) for section, options in self._options.items() if options}

    @property
    def unknown_variables(self) -> list[str]:
        """A warning for each environment variable that begins with PREFIX but is not known.

        These variables are not in ``faults``, because a container image or a service manager may have set them.
        """
        variables = [*(variable(section, key) for section, keys in self.sections.items() for key in keys), *OWN]
        said = []
        for name in self._variables:
            if name not in variables and not OTHERS.fullmatch(name):
                # settings of one command: MOETIER_GENERATE_SEED for MOETIER_SEED
                own = [candidate for candidate in variables if candidate.endswith(name.removeprefix(PREFIX))]
                near = own or difflib.get_close_matches(name, variables, n=1, cutoff=CLOSE)
                meant = f" Did you mean {' or '.join(near)}?" if near else ""
                said.append(f"{name} in the environment is not a setting of moetier, and is ignored.{meant}")
        return said

    def of(self, section: str) -> list[Setting]:
        """Return the settings of all options of ``section``, a command or GENERAL, in the order of the options."""
        general = self._options[GENERAL]
        return [
            self._setting(
                key,
                action,
                [section, GENERAL]
                if key in general and (general[key].type, general[key].choices) == (action.type, action.choices)
                else [section],
            )
            for key, action in self._options[section].items()
        ]

    def check(self) -> None:
        """Raise the first of ``faults``, if there is any."""
        if self.faults:
            raise self.faults[0]

    def _setting(self, key: str, action: argparse.Action, sections: list[str]) -> Setting:
        """Return the setting of an option from the first of ``sections`` that has it, or the option's default."""
        for section in sections:
            if text := self._variables.get(name := variable(section, key)):
                return self._typed(action, Setting(key, text, "environment", name), Path())
        for section in sections:
            if key in self._sections.get(section, {}):
                written = Setting(key, self._sections[section][key], "file", f"{self.file}, [{section}] {key}")
                return self._typed(action, written, self.file.parent)
        return Setting(key, action.default, "default")

    def _typed(self, action: argparse.Action, written: Setting, base: Path) -> Setting:
        """Return ``written`` with its value in the option's type, or with a fault if the value is invalid.

        A relative path is taken from the folder ``base``.
        """
        try:
            return replace(written, value=_value(action, written, base))
        except ConfigError as fault:
            self._add_fault(fault.cause, fault.fix)
            return replace(written, fault=fault)

    def _add_fault(self, cause: str, fix: str) -> None:
        if all((cause, fix) != (fault.cause, fault.fix) for fault in self.faults):
            self.faults.append(ConfigError(cause, fix))

    def _check_section(self, section: str, keys: object) -> None:
        sections = self.sections
        if not isinstance(keys, dict):
            places = _homes(section, sections) or [f"[{_nearest(section, sections)}]"]
            self._add_fault(
                f"{self.file}: {section} stands outside of a section.", f"Put it below {' or '.join(places)}."
            )
        elif section not in self._options:
            nearest = _nearest(section, sections)
            self._add_fault(
                f"{self.file}: there is no section [{section}].", f"The most similar section is [{nearest}]."
            )
        elif keys and section not in sections:
            self._add_fault(f"{self.file}: moetier {section} has no settings.", f"Remove the section [{section}].")
        else:
            for key in keys:
                if key not in self._options[section]:
                    homes = " or ".join(_homes(key, sections))
                    fix = (
                        f"Put it below {homes}."
                        if homes
                        else f"The most similar key is {_nearest(key, sections[section])}."
                    )
                    self._add_fault(f"{self.file}: [{section}] has no key {key!r}.", fix)


def is_anything_set() -> bool:
    """Return whether there is a settings file, or a variable that may be meant as a setting."""
    named = any(name.startswith(PREFIX) and (name == CONFIG or not OTHERS.fullmatch(name)) for name in os.environ)
    return named or os.path.lexists(config_file())


def config_file(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the path of the settings file, which need not exist: $MOETIER_CONFIG, or else the default path.

    The default is moetier/config.toml in $XDG_CONFIG_HOME or, if that is not an absolute path, in ~/.config (XDG Base
    Directory Specification 0.8).
    """
    if named := environment.get(CONFIG):
        return Path(os.path.expanduser(named))  # noqa: PTH111 - Path raises if there is no home folder
    base = environment.get("XDG_CONFIG_HOME", "")
    home = Path(os.path.expanduser("~/.config"))  # noqa: PTH111
    return (Path(base) if Path(base).is_absolute() else home) / "moetier" / "config.toml"


def variable(section: str, key: str) -> str:
    """Return the environment variable for a key: ("generate", "look-ahead") -> "MOETIER_GENERATE_LOOK_AHEAD".

    Variables for keys of GENERAL do not name the section.
    """
    return PREFIX + "_".join([key] if section == GENERAL else [section, key]).replace("-", "_").upper()


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return a copy of ``environment`` without settings: a command that runs in it reads only its command line."""
    kept = {name: text for name, text in environment.items() if not name.startswith(PREFIX) or OTHERS.fullmatch(name)}
    return kept | {CONFIG: os.devnull}


def mentioned(settings: Iterable[Setting], error: MoetierError) -> str:
    """Return a sentence that says where each setting named in ``error`` is set, or "" if ``error`` names none."""
    text = f"{error.cause} {error.fix}"
    mentioned_keys = []
    for setting in settings:
        # numbers, such as 4, may occur in any error
        words = [setting.key]
        if isinstance(setting.value, str) and not setting.value.lstrip("-").replace(".", "", 1).isdigit():
            words.append(setting.value)
        if any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) for word in words):
            mentioned_keys.append(f"{setting.key} is set by {setting.where}")
    return f" ({'; '.join(mentioned_keys)}.)" if mentioned_keys else ""


def _read_file(path: Path, *, must_be: bool) -> dict[str, Any]:
    """Return the content of the settings file. Raises ConfigError if it can't be read, or is not TOML.

    If the file is missing, return {} unless ``must_be`` is True.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        if not must_be:
            return {}
        raise ConfigError(f"{path}, which {CONFIG} names, is missing.", f"Create it, or unset {CONFIG}.") from error
    except OSError as error:
        if not must_be and not os.access(path.parent, os.X_OK):  # the folder is another user's, or is missing
            return {}
        raise ConfigError(
            f"{path} can't be read: {error.strerror}.", f"Make it readable, or name another file in {CONFIG}."
        ) from error
    import tomllib

    try:
        return tomllib.loads(content.decode())
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}.", "Correct the file, or remove it.") from error


def _value(action: argparse.Action, written: Setting, base: Path) -> object:
    """Return the value that the option would have if ``written`` were on a command line. Raises ConfigError."""
    raw, convert = written.value, action.type or str
    try:
        if isinstance(action, argparse.BooleanOptionalAction):
            return raw if isinstance(raw, bool) else SWITCH[str(raw).lower()]
        parts = raw if isinstance(raw, list) else [raw]
        if not all(isinstance(part, str | int | float) and not isinstance(part, bool) for part in parts):
            raise ValueError
        text = ",".join(map(str, parts))
        value = base / Path(text).expanduser() if convert is Path else convert(text)  # type: ignore[operator]  # a callable
        if action.choices is not None and value not in action.choices:
            raise ValueError
        return value
    except MoetierError as error:
        raise ConfigError(f"{written.where}: {error.cause}", error.fix) from error
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{written.where}: {error}.", _advice(action, written.key)) from error
    except (LookupError, ValueError, TypeError) as error:
        shown = str(raw).lower() if isinstance(raw, bool) else repr(raw)
        raise ConfigError(f"{written.where} is {shown}, which is invalid.", _advice(action, written.key)) from error


def _advice(action: argparse.Action, key: str) -> str:
    if isinstance(action, argparse.BooleanOptionalAction):
        return f"Set {key} to true or false."
    if action.choices is not None:
        return f"Set {key} to one of {', '.join(map(str, action.choices))}."
    if (value_type := getattr(action.type, "value_type", action.type)) in NUMBERS:
        return f"Set {key} to {NUMBERS[value_type]}."
    return f"Set {key} to a value that {max(action.option_strings, key=len)} accepts."


def _homes(key: str, sections: Mapping[str, list[str]]) -> list[str]:
    """Return the sections that may have ``key``, such as "[generate]"; only "[general]" if GENERAL may have it."""
    if key in sections[GENERAL]:
        return [f"[{GENERAL}]"]
    return [f"[{section}]" for section, keys in sections.items() if key in keys]


def _nearest(word: str, names: Iterable[str]) -> str:
    return difflib.get_close_matches(word, list(names), n=1, cutoff=0)[0]
