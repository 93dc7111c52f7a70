from __future__ import annotations

import inspect
from fractions import Fraction
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

import moetier
from moetier.runtime.config import (
    CACHE,
    OF_HOST_TIER,
    TIER_OPTIONS,
    DaemonChoice,
    LoadOptions,
    Size,
    TierConfig,
)
from moetier.runtime.daemon import daemon_config as daemon
from moetier.tiers.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6GiB", 6 << 30),
        ("6 gib", 6 << 30),
        ("6G", 6 << 30),
        ("6GB", 6_000_000_000),
        ("1.5MiB", 3 << 19),
        ("3520KiB", 3520 << 10),
        ("4096", 4096),
        ("4096B", 4096),
        (4096, 4096),
    ],
)
def test_sizes(text: str | int, expected: int) -> None:
    assert Size.parse(text).of(0) == expected


def test_shares() -> None:
    assert Size.parse("50%") == Size(share=Fraction(1, 2))
    assert Size.parse("12.5%").of(1 << 20) == 1 << 17


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "0%", "101%", "6XB", "6 GiB more", "1e9", "nan", "½"])
def test_malformed_sizes_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Size.parse(text)
    assert repr(text) in caught.value.cause
    assert "6GiB" in caught.value.fix


def test_a_share_of_more_than_all_is_reported() -> None:
    with pytest.raises(ConfigError, match="'150%' is more than 100%") as caught:
        Size.parse("150%")
    assert "at most 100%" in caught.value.fix


def test_none_is_no_daemon_s_name() -> None:
    assert TierConfig.of(daemon="none") == TierConfig.of(daemon=None) == TierConfig(daemon=DaemonChoice())
    assert TierConfig.of() == TierConfig(daemon=DaemonChoice(find=True))


@given(st.integers(1, 1 << 50))
def test_bytes_survive(count: int) -> None:
    assert Size.parse(str(count)).of(0) == count


def test_devices_are_checked() -> None:
    assert TierConfig.of(ram="1GiB", device="cuda:1") == TierConfig(ram=Size(bytes=1 << 30), device="cuda:1")
    with pytest.raises(ConfigError, match="'gpu' is not a device"):
        TierConfig.of(device="gpu")


def test_policies_are_checked() -> None:
    assert TierConfig.of(policy="lru").policy == "lru"
    with pytest.raises(ConfigError, match="`policy` is 'fifo'"):
        TierConfig.of(policy="fifo")
    assert TierConfig.of(policy="lrfu", daemon="night").mapped is not None
    with pytest.raises(ConfigError, match="holds the experts in its own memory") as caught:
        TierConfig.of(policy="lru", daemon="night")
    assert "`policy`" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ram", [True, 6.5, b"6GiB", ["6GiB"]]),
        ("device_memory", [False, 1e9]),
        ("device", [None, 0]),
        ("daemon", [True, ["a", "b"]]),
        ("credentials", ["token", {"token_file": "token"}]),
        ("policy", [None, 1]),
        ("speculate", [True, None]),
        ("look_ahead", ["1", 1.0, True]),
        ("prefetch", ["1", True]),
        ("learn", ["yes", 1, None]),
        ("context", ["4096", 4096.0, True]),
        ("exact", ["yes", "false", 0, 1, None]),
        ("threads", ["2", 2.0, True]),
    ],
)
def test_values_of_another_type_are_refused(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError) as caught:
            TierConfig.of(**{name: value})
        assert repr(value) in caught.value.cause
        assert name in caught.value.cause
        assert caught.value.fix


def test_an_unknown_option_is_refused_as_python_does() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'rma'"):
        TierConfig.of(rma="1GiB")  # type: ignore[call-arg]


def test_options_are_declared_once() -> None:
    """The types for type checkers, the signature of ``load`` and its documentation name the same options."""
    assert get_type_hints(LoadOptions) == {name: option.python_type for name, option in TIER_OPTIONS.items()}
    assert daemon.DAEMON_OPTIONS.keys() >= set(OF_HOST_TIER)
    parameters = inspect.signature(moetier.load).parameters
    declared = TIER_OPTIONS | CACHE
    assert {name: parameters[name].default for name in declared} == {name: declared[name].default for name in declared}
    assert list(parameters)[-4:] == ["dtype", "attn_implementation", *CACHE]
    assert all(f"\n    {name}: " in (moetier.load.__doc__ or "") for name in parameters)


def test_a_daemon_learns_by_itself() -> None:
    assert TierConfig.of(learn=True, daemon="auto").learn
    with pytest.raises(ConfigError, match="holds the experts in its own memory") as caught:
        TierConfig.of(learn=True, ram="1GiB", daemon="night")
    assert caught.value.fix == "Give `ram` and `learn` to the daemon, not here."
