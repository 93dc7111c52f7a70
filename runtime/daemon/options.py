"""DaemonConfig: the options of a daemon."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from moetier.runtime.config import OPTIONS, Size
from moetier.runtime.wire.address import Address
from moetier.tiers.cache.policies import DEFAULT_POLICY
from moetier.tiers.errors import ConfigError
from moetier.tiers.source import LOADERS


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """Options of ``moetier daemon``; ``check`` validates them."""

    directories: tuple[Path, ...]
    folder: Path
    ram: Size | None = None
    policy: str = DEFAULT_POLICY  # a key of POLICIES
    learn: bool = False
    loaders: int = LOADERS
    listen: str = ""  # HOST:PORT; port 0 for any free port
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    token_file: Path | None = None
    insecure: bool = False
    wait: float = 10.0  # seconds that a request waits for a slot
    leases: int = 8  # slots that one client may hold at a time
    max_clients: int = 64
    drain: float = 10.0  # seconds that requests under way may take when the daemon ends
    reflection: bool = False
    metrics: str = ""  # [HOST:]PORT for Prometheus; 127.0.0.1 by default; port 0 for any free port
    ready_fd: int | None = None  # descriptor to which the daemon writes a line when it is ready

    @property
    def unprotected(self) -> list[str]:
        """Protections that the TCP address lacks because of --insecure."""
        lacks = (("a token", self.token_file), ("TLS", self.tls_cert))
        return [what for what, given in lacks if given is None] if self.insecure else []

    @property
    def metrics_address(self) -> str:
        """HOST:PORT on which metrics are served; "" if they are not served."""
        return f"127.0.0.1:{self.metrics}" if self.metrics.isdecimal() else self.metrics

    def check(self) -> None:
        """Raise ConfigError for options that contradict each other, and for a TCP address that is not protected."""
        OPTIONS["policy"].read("policy", self.policy)
        OPTIONS["loaders"].read("loaders", self.loaders)
        if self.metrics:
            _tcp(self.metrics_address, self.metrics)
        tls = self.tls_cert is not None
        if tls != (self.tls_key is not None):
            raise ConfigError("TLS needs a certificate and its key.", "Give both --tls-cert and --tls-key.")
        if self.tls_client_ca is not None and not tls:
            raise ConfigError("--tls-client-ca needs TLS.", "Give --tls-cert and --tls-key too.")
        if not self.listen:
            if tls or self.token_file is not None or self.insecure:
                raise ConfigError("Certificates, tokens and --insecure are for TCP.", "Give --listen HOST:PORT too.")
            return
        host, _, port = self.listen.rpartition(":")
        if not host and port.isdecimal():
            raise ConfigError(
                f"{self.listen!r} is only a port.", f"Give the address too: 127.0.0.1:{port}, or 0.0.0.0:{port}."
            )
        address = _tcp(self.listen, self.listen)
        if self.insecure:
            return
        if self.token_file is None:
            raise ConfigError(
                f"There is no token for {self.listen}: the daemon would serve everybody who can reach it.",
                "Give --token-file (make a token: openssl rand -hex 32), or --insecure.",
            )
        if not tls and not address.is_loopback:
            raise ConfigError(
                f"There is no TLS for {self.listen}, which other hosts can reach.",
                "Give --tls-cert and --tls-key, or --insecure.",
            )


def _tcp(address: str, said: str) -> Address:
    """Parse HOST:PORT, where PORT may be 0. Raises ConfigError, which quotes the option's value ``said``."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(ConfigError):
        parsed = Address.parse(f"{host}:{'1' if port == '0' else port}")
        if parsed.target and not parsed.is_group:
            return parsed
    raise ConfigError(f"{said!r} is not HOST:PORT.", "Give a host and a port, such as 127.0.0.1:7070.")
