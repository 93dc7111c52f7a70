"""DaemonConfig: what a person asks of a daemon."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from moetier.runtime.config import OPTIONS, Size
from moetier.runtime.wire.address import Address
from moetier.tiers.cache.orders import DEFAULT_ORDER
from moetier.tiers.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """What a person asks for; ``of`` checks it."""

    directories: tuple[Path, ...]
    folder: Path
    ram: Size | None = None
    policy: str = DEFAULT_ORDER  # of ORDERS
    learn: bool = False
    listen: str = ""  # HOST:PORT; port 0: any
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    token_file: Path | None = None
    insecure: bool = False
    wait: float = 10.0  # seconds for a slot
    leases: int = 8  # of one client
    max_clients: int = 64
    drain: float = 10.0  # seconds
    reflection: bool = False
    metrics: str = ""  # [HOST:]PORT for Prometheus; on 127.0.0.1 unless it says where; port 0: any
    ready_fd: int | None = None

    @property
    def unprotected(self) -> list[str]:
        """What its TCP address lacks by --insecure."""
        lacks = (("a token", self.token_file), ("TLS", self.tls_cert))
        return [what for what, given in lacks if given is None] if self.insecure else []

    @property
    def metrics_address(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self.metrics}" if self.metrics.isdecimal() else self.metrics

    def check(self) -> None:
        """Raises ConfigError for what contradicts itself, and for a TCP address that is not protected."""
        OPTIONS["policy"].read("policy", self.policy)
        if self.metrics:
            _tcp(self.metrics_address, self.metrics)
        tls = self.tls_cert is not None
        if tls != (self.tls_key is not None):
            raise ConfigError("TLS needs a certificate and its key.", "Give both --tls-cert and --tls-key.")
        if self.tls_client_ca is not None and not tls:
            raise ConfigError("--tls-client-ca is without TLS.", "Give --tls-cert and --tls-key too.")
        if not self.listen:
            if tls or self.token_file is not None or self.insecure:
                raise ConfigError("Certificates, tokens and --insecure are for TCP.", "Give --listen HOST:PORT too.")
            return
        host, _, port = self.listen.rpartition(":")
        if not host and port.isdecimal():
            raise ConfigError(
                f"{self.listen!r} is a port alone.", f"Say on which address too: 127.0.0.1:{port}, or 0.0.0.0:{port}."
            )
        address = _tcp(self.listen, self.listen)
        if self.insecure:
            return
        if self.token_file is None:
            raise ConfigError(
                f"{self.listen} is without a token: everybody who reaches it would be served.",
                "Give --token-file (make a token: openssl rand -hex 32), or --insecure.",
            )
        if not tls and not address.is_loopback:
            raise ConfigError(
                f"{self.listen} is without TLS, and other hosts can reach it.",
                "Give --tls-cert and --tls-key, or --insecure.",
            )


def _tcp(address: str, said: str) -> Address:
    """HOST:PORT, whose port may be 0. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(ConfigError):
        parsed = Address.parse(f"{host}:{'1' if port == '0' else port}")
        if parsed.target:
            return parsed
    raise ConfigError(f"{said!r} is not HOST:PORT.", "Give one, such as 127.0.0.1:7070.")
