"""What is set beforehand for the options of commands: in the environment, and in a TOML file.

A flag goes before the environment, that before the file, and the file before a default. In both places what is said for
one command goes before what is said for all.
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

from moetier.runtime.config import OPTIONS
from moetier.tiers.errors import ConfigError, MoetierError

from .parser import settable

PREFIX = "MOETIER_"
GENERAL = "general"  # the section of what is for all commands
REFERENCE = "generate"  # whose options the general ones are: another's of that name with other values is another's
GENERAL_KEYS = (*(name.replace("_", "-") for name in OPTIONS if name != "credentials"), "prefill-chunk")
CONFIG = "MOETIER_CONFIG"
OWN = ("MOETIER_API_KEY", CONFIG, "MOETIER_DEBUG", "MOETIER_LOG")  # that are no options
# nor are these: its tests', and those that Kubernetes sets for a service of this name
OTHERS = re.compile(
    rf"{'|'.join(OWN)}|{PREFIX}((TEST|SOAK)_.*|SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_.*)?)",
)
CLOSE = 0.85  # how alike a name has to be to be suggested: from 0 to 1, as difflib has it; all begin alike
SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
NUMBERS = {int: "a whole number", float: "a number"}


@dataclass(frozen=True, slots=True)
class Setting:
    """The value of one option of a command, and where it is from. ``section``: GENERAL, or the command."""

    key: str
    section: str
    value: object
    source: str  # "default", "file" or "environment"
    where: str = ""  # "MOETIER_RAM", "/path/config.toml, [generate] ram"; "" for a default
    fault: ConfigError | None = None  # why its value, as it is written, can't be

    @property
    def is_default(self) -> bool:
        """Whether neither the file nor the environment sets the value."""
        return self.source == "default"


class Settings:
    """What a file and the environment say, every key of it known; values are looked at when a command asks.

    With ``faults``, a list, what is wrong in them is put there in place of being raised, and the rest is as it is."""

    @classmethod
    def read(
        cls,
        commands: Mapping[str, argparse.ArgumentParser],
        environment: Mapping[str, str] = os.environ,
        faults: list[ConfigError] | None = None,
    ) -> Settings:
        """Raises ConfigError for a file that can't be read, and for what no command has."""
        path = config_file(environment)
        return cls(commands, path, _read_file(path, must_be=bool(environment.get(CONFIG))), environment, faults)

    def __init__(
        self,
        commands: Mapping[str, argparse.ArgumentParser],
        file: Path,
        sections: Mapping[str, Any],
        environment: Mapping[str, str],
        faults: list[ConfigError] | None = None,
    ) -> None:
        self.file = file
        self._faults = faults
        self._options = {name: settable(command) for name, command in commands.items()}
        reference = self._options[REFERENCE]
        self._general = {key: reference[key] for key in GENERAL_KEYS}
        self._sections = sections
        self._variables = {name: text for name, text in environment.items() if name.startswith(PREFIX) and text}
        self._check_sections()
        self.unknown_variables = self._unknown_variables()

    def _found(self, fault: ConfigError) -> None:
        if self._faults is None:
            raise fault
        if (fault.cause, fault.fix) not in [(each.cause, each.fix) for each in self._faults]:
            self._faults.append(fault)

    @property
    def sections(self) -> dict[str, list[str]]:
        """The keys of each section."""
        return {GENERAL: list(self._general)} | {name: list(own) for name, own in self._options.items() if own}

    def general(self) -> list[Setting]:
        """Of all commands. Raises ConfigError for a value that can't be."""
        return [self._setting(GENERAL, key, action, GENERAL) for key, action in self._general.items()]

    def of(self, command: str) -> list[Setting]:
        """Of all its options, in their order. Raises ConfigError for a value that can't be."""
        return [
            self._setting(command, key, action, *([GENERAL] if self._is_general(key, action) else []))
            for key, action in self._options[command].items()
        ]

    def _is_general(self, key: str, action: argparse.Action) -> bool:
        general = self._general.get(key)
        return general is not None and (general.type, general.choices) == (action.type, action.choices)

    def _setting(self, command: str, key: str, action: argparse.Action, *wider: str) -> Setting:
        places = dict.fromkeys((command, *wider))
        for section in places:
            if text := self._variables.get(name := variable(section, key)):
                return self._of(action, text, Path(), Setting(key, section, text, "environment", name))
        for section in places:
            if key in self._sections.get(section, {}):
                raw, where = self._sections[section][key], f"{self.file}, [{section}] {key}"
                return self._of(action, raw, self.file.parent, Setting(key, section, raw, "file", where))
        return Setting(key, command, action.default, "default")

    def _of(self, action: argparse.Action, raw: object, base: Path, written: Setting) -> Setting:
        """With the value that the option makes of it; as it is written, where it makes none."""
        try:
            return replace(written, value=_typed(action, raw, written.key, written.where, base))
        except ConfigError as fault:
            self._found(fault)
            return replace(written, fault=fault)

    def _check_sections(self) -> None:
        known = self.sections
        for section, keys in self._sections.items():
            if not isinstance(keys, dict):
                homes = _homes(section, known) or [_nearest(section, known)]
                self._found(
                    ConfigError(
                        f"{self.file}: {section} stands outside of a section.", f"Put it beneath {' or '.join(homes)}."
                    )
                )
            elif section in self._options and section not in known and keys:
                self._found(
                    ConfigError(
                        f"{self.file}: moetier {section} has nothing to set.", f"Leave out the section [{section}]."
                    )
                )
            elif section not in known and section not in self._options:
                self._found(
                    ConfigError(
                        f"{self.file}: there is no section [{section}].", f"The nearest is {_nearest(section, known)}."
                    )
                )
            else:
                for key in keys:
                    if key not in known[section]:
                        self._found(self._no_key(section, key))
        self._sections = {section: keys for section, keys in self._sections.items() if isinstance(keys, dict)}

    def _no_key(self, section: str, key: str) -> ConfigError:
        homes, near = _homes(key, self.sections), _near(key, self.sections[section])
        fix = f"Put it beneath {' or '.join(homes)}." if homes else f"The nearest is {near}."
        return ConfigError(f"{self.file}: [{section}] has no key {key!r}.", fix)

    def _unknown_variables(self) -> list[str]:
        """A sentence on each variable that looks like a setting and is none. Others may set such variables (an image's
        build, a service manager), so they end no command."""
        known = [*(variable(section, key) for section, keys in self.sections.items() for key in keys), *OWN]
        said = []
        for name in self._variables:
            if name not in known and not OTHERS.fullmatch(name):
                own = [each for each in known if each.endswith(name.removeprefix(PREFIX))]  # of single commands
                near = own or difflib.get_close_matches(name, known, n=1, cutoff=CLOSE)
                meant = f" Did you mean {' or '.join(near)}?" if near else ""
                said.append(f"{name} in the environment is not a setting of moetier, and is ignored.{meant}")
        return said


def is_anything_set(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether there is a file, or any variable that may be meant for a setting."""
    named = any(name.startswith(PREFIX) and (name == CONFIG or not OTHERS.fullmatch(name)) for name in environment)
    return named or os.path.lexists(config_file(environment))


def config_file(environment: Mapping[str, str] = os.environ) -> Path:
    """$MOETIER_CONFIG, or moetier/config.toml beneath $XDG_CONFIG_HOME (XDG Base Directory Specification 0.8)."""
    if named := environment.get(CONFIG):
        return Path(os.path.expanduser(named))  # noqa: PTH111 - Path raises where there is no home
    base = environment.get("XDG_CONFIG_HOME", "")
    home = Path(os.path.expanduser("~/.config"))  # noqa: PTH111
    return (Path(base) if Path(base).is_absolute() else home) / "moetier" / "config.toml"


def variable(section: str, key: str) -> str:
    """("generate", "look-ahead") -> "MOETIER_GENERATE_LOOK_AHEAD"; of GENERAL without the section."""
    words = [key] if section == GENERAL else [section, key]
    return PREFIX + "_".join(words).replace("-", "_").upper()


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a command that is to run as its command line says, and as nobody has set it."""
    kept = {name: text for name, text in environment.items() if not name.startswith(PREFIX) or OTHERS.fullmatch(name)}
    return kept | {CONFIG: os.devnull}


def mentioned(settings: Iterable[Setting], error: MoetierError) -> str:
    """Where that is from which an error speaks of, as a sentence; "" for what a command line says."""
    text = f"{error.cause} {error.fix}"
    found = [
        f"{each.key} is set by {each.where}"
        for each in settings
        if any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) for word in _words(each))
    ]
    return f" ({'; '.join(found)}.)" if found else ""


def _words(setting: Setting) -> tuple[str, ...]:
    """By which an error may speak of it; a number may be anybody's."""
    return (setting.key, setting.value) if isinstance(setting.value, str) else (setting.key,)


def _read_file(path: Path, *, must_be: bool) -> dict[str, Any]:
    """{} where there is none. Raises ConfigError."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        if not must_be:
            return {}
        raise ConfigError(f"{path} is missing, which {CONFIG} names.", f"Make it, or unset {CONFIG}.") from error
    except OSError as error:
        if not must_be and _is_elsewhere(path):
            return {}
        raise ConfigError(
            f"{path} can't be read: {error.strerror}.", f"Mend that, or name another file: {CONFIG}."
        ) from error
    import tomllib

    try:
        return tomllib.loads(content.decode())
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}.", "Mend that place, or remove the file.") from error


def _is_elsewhere(path: Path) -> bool:
    """Whether the folder of a file can't even be looked into: the home is somebody else's, or none."""
    return not os.access(path.parent, os.X_OK)


def _typed(action: argparse.Action, raw: object, key: str, where: str, base: Path) -> object:
    """As the option itself takes it from a command line; ``base`` is where relative paths begin."""
    if isinstance(action, argparse.BooleanOptionalAction):
        switch = raw if isinstance(raw, bool) else SWITCH.get(str(raw).lower())
        if switch is None:
            raise ConfigError(f"{where} is {raw!r}, which is neither true nor false.", f"Set {key} to true or false.")
        return switch
    parts = raw if isinstance(raw, list) else [raw]
    if not all(isinstance(part, str | int | float) and not isinstance(part, bool) for part in parts):
        raise ConfigError(f"{where} is {_shown(raw)}, which is no text or number.", f"Set {key} {_wanted(action)}.")
    text = ",".join(map(str, parts))
    kind: Any = action.type or str
    try:
        value = base / Path(text).expanduser() if kind is Path else kind(text)
    except MoetierError as error:
        raise ConfigError(f"{where}: {error.cause}", error.fix) from error
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{where}: {error}.", f"Set {key} {_wanted(action)}.") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where} is {text!r}, which can't be.", f"Set {key} {_wanted(action)}.") from error
    if action.choices is not None and value not in action.choices:
        raise ConfigError(f"{where} is {text!r}, which can't be.", f"Set {key} {_wanted(action)}.")
    return value


def _shown(raw: object) -> str:
    return {True: "true", False: "false"}[raw] if isinstance(raw, bool) else repr(raw)


def _wanted(action: argparse.Action) -> str:
    if action.choices is not None:
        return f"to one of {', '.join(map(str, action.choices))}"
    if (kind := getattr(action.type, "kind", action.type)) in NUMBERS:
        return f"to {NUMBERS[kind]}"
    return f"as {max(action.option_strings, key=len)} takes it"


def _homes(key: str, known: Mapping[str, list[str]]) -> list[str]:
    """The sections that have a key."""
    if GENERAL in known and key in known[GENERAL]:
        return [f"[{GENERAL}]"]
    return [f"[{section}]" for section, keys in known.items() if key in keys]


def _near(word: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0)[0]


def _nearest(section: str, known: Iterable[str]) -> str:
    return f"[{_near(section, known)}]"
