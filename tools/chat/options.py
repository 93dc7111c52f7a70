"""Options of the answers in a chat, which may change between two answers."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from typing import Any

from moetier.runtime.generation.decoding import DECODING, SAMPLING
from moetier.tiers.errors import ConfigError
from moetier.tools.cli.arguments import decoding_of

DEFAULTS = {"temperature": 1.0, "top_k": 50}  # transformers' own, if neither the user nor the model says otherwise


class AnswerOptions:
    """Values of the options in DECODING, by name. None leaves the choice to the model's generation_config.json."""

    def __init__(self, values: Mapping[str, Any], of_model: Any = None) -> None:
        """Begin with the values of the command line, to which ``set`` returns.

        ``of_model``: the model's generation config (transformers), which has the values of options that are not given.
        """
        self._of_model = of_model
        self._first = {name: values.get(name, option.default) for name, option in DECODING.items()}
        self._values = dict(self._first)
        self._seeds = itertools.count(self._values["seed"])

    @classmethod
    def of(cls, arguments: argparse.Namespace, of_model: Any) -> AnswerOptions:
        """Return the options that a command line gives. ``of_model``: as for the class."""
        return cls({name: getattr(arguments, name) for name in DECODING}, of_model)

    @property
    def max_new_tokens(self) -> int:
        """Maximum number of tokens of an answer."""
        return int(self._values["max_new_tokens"])

    def decoding(self) -> dict[str, Any]:
        """Return the keyword arguments of ``decoding_of``, without ``max_new_tokens``."""
        decoding = decoding_of(argparse.Namespace(**self._values))
        del decoding["max_new_tokens"]
        return decoding

    def next_seed(self) -> int:
        """Return the seed of the next answer. Each answer has another one."""
        return next(self._seeds)

    def set(self, name: str, text: str) -> None:
        """Parse ``text`` as the value of the option ``name``. An empty text restores the value of the command line.

        Raises ConfigError if there is no such option, or it can't have this value.
        """
        name = name.lstrip("-").replace("-", "_")
        if name not in DECODING:
            raise ConfigError(f"There is no option {name}.", f"Give one of {', '.join(DECODING)}.")
        numbers = DECODING[name].numbers
        assert numbers is not None
        try:
            self._values[name] = numbers(text) if text else self._first[name]
        except ValueError:
            raise ConfigError(f"{name} is {text!r}, which is not a number.", numbers.fix) from None
        except ConfigError as error:
            raise ConfigError(f"{name}: {error.cause}", error.fix) from None
        if name == "seed":
            self._seeds = itertools.count(self._values["seed"])

    def __str__(self) -> str:
        """The options that have a value; behind them those that the model decides, and at last the defaults."""
        given = [f"{name} {value:g}" for name, value in self._values.items() if value is not None and name != "seed"]
        said = ", ".join([*given, f"seed {self._values['seed']}"])
        of_model, defaults = self._others()
        for source, values in (("from the model's generation_config.json", of_model), ("by default", defaults)):
            if values:
                said += f"; {source}: " + ", ".join(f"{name} {value:g}" for name, value in values.items())
        return said

    def _others(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the values, by name, of options of sampling that are not given and have an effect.

        The first dictionary has those of the model's generation_config.json, the second one the defaults of the others.
        """
        names = [name for name in SAMPLING if self._values[name] is None]
        of_model = {name: value for name in names if (value := getattr(self._of_model, name, None)) is not None}
        if self.decoding().get("do_sample", getattr(self._of_model, "do_sample", False)):
            defaults = DEFAULTS
        else:
            of_model = {name: value for name, value in of_model.items() if name == "repetition_penalty"}
            defaults = {"temperature": 0.0}
        return of_model, {name: defaults[name] for name in names if name in defaults and name not in of_model}
