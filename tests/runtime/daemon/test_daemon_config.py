"""Options of a daemon: those that contradict each other, and TCP addresses that are not protected, are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moetier.runtime.daemon.daemon_config import DaemonConfig
from moetier.tiers.errors import ConfigError

FILE = Path("file")  # is not opened
TLS = {"tls_cert": FILE, "tls_key": FILE}


def config_of(**options: Any) -> DaemonConfig:
    return DaemonConfig.of((Path("model"),), **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"listen": "nonsense"}, "is not HOST:PORT"),
        ({"listen": "7171"}, "'7171' is only a port"),
        ({"listen": "127.0.0.1:99999"}, "is not HOST:PORT"),
        ({"listen": "dns:///localhost:7070"}, "is not HOST:PORT"),
        ({"metrics": "/folder"}, "'/folder' is not HOST:PORT"),
        ({"metrics": ":9400"}, "':9400' is not HOST:PORT"),
        ({"metrics": "99999"}, "'99999' is not HOST:PORT"),
        ({"listen": "127.0.0.1:0"}, "There is no token for"),
        ({"listen": "127.0.0.1:0", **TLS}, "There is no token for"),
        ({"listen": "0.0.0.0:0", "token_file": FILE}, "There is no TLS for"),
        ({"listen": "127.0.0.1:0", "token_file": FILE, "tls_cert": FILE}, "certificate and its key"),
        ({"listen": "127.0.0.1:0", "token_file": FILE, "tls_key": FILE}, "certificate and its key"),
        ({"listen": "127.0.0.1:0", "token_file": FILE, "tls_client_ca": FILE}, "needs TLS"),
        ({"token_file": FILE}, "are for TCP"),
        (TLS, "are for TCP"),
        ({"insecure": True}, "are for TCP"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(**options)
    assert says in caught.value.cause


@pytest.mark.parametrize(
    ("options", "lacks"),
    [
        ({}, []),
        ({"listen": "127.0.0.1:0", "token_file": FILE}, []),
        ({"listen": "[::1]:7070", "token_file": FILE}, []),
        ({"listen": "0.0.0.0:0", "token_file": FILE, **TLS, "tls_client_ca": FILE}, []),
        ({"listen": "0.0.0.0:0", "insecure": True}, ["a token", "TLS"]),
        ({"listen": "0.0.0.0:0", "insecure": True, "token_file": FILE}, ["TLS"]),
        ({"listen": "0.0.0.0:0", "insecure": True, **TLS}, ["a token"]),
    ],
)
def test_a_config_knows_what_its_address_lacks(options: dict[str, Any], lacks: list[str]) -> None:
    assert config_of(**options).unprotected == lacks


@pytest.mark.parametrize(
    ("metrics", "address"), [("", ""), ("9400", "127.0.0.1:9400"), ("0", "127.0.0.1:0"), ("[::1]:94", "[::1]:94")]
)
def test_metrics_are_served_on_this_host_by_default(metrics: str, address: str) -> None:
    assert config_of(metrics=metrics).metrics_address == address
