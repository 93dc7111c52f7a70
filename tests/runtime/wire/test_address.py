"""Addresses of daemons as users write them, and names that stand for several."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from moetier.runtime.wire.address import Address
from moetier.tiers.errors import ConfigError, UnavailableError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a/folder", Address(folder=Path("/a/folder"))),
        ("host:7070", Address(target="host:7070")),
        ("[::1]:7070", Address(target="[::1]:7070")),
        ("dns:///host:7070", Address(target="host:7070", is_dns_name=True)),
        ("dns:///moetier-daemon.space.svc.cluster.local.:7070",
         Address(target="moetier-daemon.space.svc.cluster.local.:7070", is_dns_name=True)),
    ],
)  # fmt: skip
def test_they_are_what_is_written(text: str, expected: Address) -> None:
    assert Address.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize("text", ["dns:///host", "dns:///", "dns:///host:0", "dns://10.0.0.10/host:7070", "dns:host:1"])
def test_what_is_no_name_of_several(text: str) -> None:
    with pytest.raises(ConfigError, match="is not the address of a daemon") as caught:
        Address.parse(text)
    assert "dns:///HOST:PORT" in caught.value.fix


def test_each_address_of_a_name_is_a_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, in the same order for everybody, with the name that certificates have."""
    found = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fd00::2", 7070, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.9", 7070)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.10", 7070)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.9", 7070)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, type: found)
    daemons = Address.parse("dns:///daemons.test.:7070").resolve()
    assert list(map(str, daemons)) == ["10.0.0.10:7070", "10.0.0.9:7070", "[fd00::2]:7070"]
    assert {daemon.tls_name for daemon in daemons} == {"daemons.test"}


def test_the_system_s_own_resolver() -> None:
    assert "127.0.0.1:7070" in map(str, Address.parse("dns:///localhost:7070").resolve())
    assert Address.parse("dns:///127.0.0.1:7070").resolve() == [Address(target="127.0.0.1:7070", tls_name="127.0.0.1")]
    with pytest.raises(UnavailableError, match=r"The name aaa.* can't be resolved"):
        Address.parse(f"dns:///{'a' * 64}:7070").resolve()
