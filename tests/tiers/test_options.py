"""Declared options, as Python code and the command line give them."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from moetier.runtime import config
from moetier.runtime.daemon import daemon_config as daemon
from moetier.runtime.generation.decoding import DECODING
from moetier.runtime.wire.address import CREDENTIALS
from moetier.tiers.errors import ConfigError
from moetier.tiers.options import COUNT, Number, Option, command_words, named, read_all
from moetier.tools.cli.arguments import add_options
from moetier.tools.cli.parser import CommandParser
from moetier.tools.convert import options as convert

OPTIONS = {
    **{f"TierConfig.{name}": option for name, option in config.TIER_OPTIONS.items() if name != "credentials"},
    **{f"Credentials.{name}": option for name, option in CREDENTIALS.items()},
    **{f"DaemonConfig.{name}": option for name, option in daemon.DAEMON_OPTIONS.items()},
    **{f"convert.{name}": option for name, option in convert.CONVERT_OPTIONS.items()},
    **{f"decoding.{name}": option for name, option in DECODING.items()},
}


def parsed(option: Option, *words: str) -> Any:
    parser = CommandParser(prog="moetier try")
    add_options(parser, [option])
    return getattr(parser.parse_args(words), option.name)


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_the_command_line_has_the_default_and_the_range(option: Option, capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed(option) == option.default
    if option.default is not None:
        option.read(parsed(option))
    flag = command_words([(option.name, True)])[0]
    if option.value_type is bool:
        assert parsed(option, flag) is True
    for choice in option.choices:
        assert parsed(option, flag, str(choice)) == choice
    if option.numbers is not None:
        assert parsed(option, f"{flag}={option.numbers.least}") == option.numbers.least
        with pytest.raises(SystemExit):
            parsed(option, f"{flag}={option.numbers.least - 1}")
        assert option.numbers.fix in capsys.readouterr().err
        with pytest.raises(ConfigError) as caught:
            option.read(option.numbers.least - 1)
        assert caught.value.fix == option.numbers.fix


@pytest.mark.parametrize(
    ("option", "value", "cause", "fix"),
    [
        (Option(1, "", numbers=COUNT), "1", "`it` is '1'.", "Give a whole number."),
        (Option(1, "", numbers=COUNT), True, "`it` is True.", "Give a whole number."),
        (Option(1, "", numbers=COUNT), None, "`it` is None.", "Give a whole number."),
        (Option(None, "", numbers=COUNT), 0, "`it` is 0.", COUNT.fix),
        (Option(0.5, "", numbers=Number(float, 0, 1)), 2, "`it` is 2.", "Give 0 to 1."),
        (Option(False, ""), 1, "`it` is 1.", "Give True or False."),
        (Option(None, "", types=int | str | None, choices=(4, "native")), 5, "`it` is 5.", "Give one of 4, native."),
    ],
)
def test_a_value_that_is_not_allowed(option: Option, value: Any, cause: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        named(it=option)["it"].read(value)
    assert (caught.value.cause, caught.value.fix) == (cause, fix)


def test_values_are_converted_and_unknown_names_refused() -> None:
    options = named(
        size=Option(None, "", types=str | None, parse=lambda text: text and text.upper()), count=Option(1, "")
    )
    assert read_all(options, {"size": "1g", "count": 2}) == {"size": "1G", "count": 2}
    with pytest.raises(TypeError, match="unexpected keyword argument 'sizes'"):
        read_all(options, {"sizes": "1g"})


def test_words_of_a_command_line_give_the_values_again() -> None:
    values = {"max_new_tokens": 3, "temperature": 0.5, "top_k": None, "fast": True, "learn": False}
    words = command_words(values.items())
    assert words == ["--max-new-tokens", "3", "--temperature", "0.5", "--fast"]
    parser = argparse.ArgumentParser()
    add_options(parser, [DECODING["max_new_tokens"], DECODING["temperature"], *named(fast=Option(False, "")).values()])
    assert vars(parser.parse_args(words)) == {"max_new_tokens": 3, "temperature": 0.5, "fast": True}
