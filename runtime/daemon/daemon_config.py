"""DaemonConfig: the options of a daemon."""

# ruff: noqa: RUF009 - each call of these functions returns a new field

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetier.runtime.config import DEFAULT_SHARE, TIER_OPTIONS, HostTierConfig, Size
from moetier.runtime.wire.address import CREDENTIALS, DEFAULT_NAME, Address
from moetier.tiers.errors import ConfigError
from moetier.tiers.options import Number, file_option, option, option_like, options_of, read_all
from moetier.tiers.source import LEASES, SLOT_TIMEOUT

SEVERAL = Number(int, 1, 10_000)
DRAIN = 10.0  # seconds
WAIT = Number(float, 0, 86_400, "Give 0 to 86,400 seconds.")
REMOTE = "other hosts"  # title of a group of options


def _folder(text: str) -> Path:
    if (folder := Address.parse(text).folder) is None:
        raise ConfigError(f"{text!r} is not a folder.", "Give a name or a path. To serve on TCP, use --listen.")
    return folder


@dataclass(frozen=True, slots=True)
class DaemonConfig(HostTierConfig):
    """Options of ``moetier daemon``. They are declared here, and in HostTierConfig, only.

    ``of`` makes a checked DaemonConfig.
    """

    ram: Size | None = option_like(
        TIER_OPTIONS["ram"],
        help=f'host memory for all experts: "8GiB", or "50%" of what is free (default: {DEFAULT_SHARE:.0%})',
    )
    directories: tuple[Path, ...] = ()
    names: tuple[str, ...] = ()  # of the models, by directory; "": that of its source
    folder: Path = option(
        DEFAULT_NAME,
        "folder for the daemon's sockets: a path, or a name in $XDG_RUNTIME_DIR/moetier (/tmp/moetier-UID without that "
        "variable), where clients find the daemon by themselves",
        metavar="NAME|PATH",
        parse=_folder,
    )
    max_leases: int = option(
        LEASES, "maximum number of slots that a client may hold at once", name="leases", metavar="N", numbers=SEVERAL
    )
    max_clients: int = option(64, "maximum number of clients at once", metavar="N", numbers=SEVERAL)
    slot_timeout: float = option(
        SLOT_TIMEOUT,
        f"longest time that a request waits for a free slot before it fails (default: {SLOT_TIMEOUT:g})",
        name="wait",
        metavar="SECONDS",
        numbers=WAIT,
    )
    drain: float = option(
        DRAIN,
        f"time for running requests to finish at shutdown (default: {DRAIN:g})",
        metavar="SECONDS",
        numbers=WAIT,
    )
    metrics: str = option(
        "",
        "answer Prometheus (/metrics) and health probes (/healthz) on this port, without TLS or a token; the default "
        "HOST is 127.0.0.1, and port 0 means any free port",
        metavar="[HOST:]PORT",
    )
    reflection: bool = option(False, "answer gRPC server reflection", is_setting=False)
    ready_fd: int | None = option(
        None,
        'file descriptor to which the daemon writes "ready" when it begins to serve, and which it then closes',
        types=int | None,
        metavar="N",
    )
    listen: str = option("", "serve on TCP, too (port 0: any free port)", group=REMOTE, metavar="HOST:PORT")
    tls_cert: Path | None = file_option("PEM file of the daemon's certificate and its chain", REMOTE)
    tls_key: Path | None = option_like(CREDENTIALS["key"], group=REMOTE)
    tls_client_ca: Path | None = file_option(
        "PEM file of the CA that must have signed the certificates of clients", REMOTE
    )
    token_file: Path | None = file_option("file that holds, in one line, the token that clients must send", REMOTE)
    insecure: bool = option(
        False,
        "permit serving on TCP without a token, without TLS, or without both",
        group=REMOTE,
        is_setting=False,
    )

    @classmethod
    def of(cls, directories: tuple[Path, ...], **options: Any) -> DaemonConfig:
        """Check and convert options as a user writes them.

        Raises ConfigError for a value that is not allowed, for options that contradict each other, and for a TCP
        address that is not protected.
        """
        config = cls(directories=directories, **read_all(DAEMON_OPTIONS, options))
        config._check()
        return config

    @property
    def unprotected(self) -> list[str]:
        """Protections that the TCP address lacks because of --insecure."""
        lacks = (("a token", self.token_file), ("TLS", self.tls_cert))
        return [what for what, given in lacks if given is None] if self.insecure else []

    @property
    def metrics_address(self) -> str:
        """HOST:PORT on which metrics are served; "" if they are not served."""
        return f"127.0.0.1:{self.metrics}" if self.metrics.isdecimal() else self.metrics

    def _check(self) -> None:
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
                f"There is no token for {self.listen}: any process that reaches it could use the daemon.",
                "Give --token-file (make a token: openssl rand -hex 32), or --insecure.",
            )
        if not tls and not address.is_loopback:
            raise ConfigError(
                f"There is no TLS for {self.listen}, which other hosts can reach.",
                "Give --tls-cert and --tls-key, or --insecure.",
            )


DAEMON_OPTIONS = options_of(DaemonConfig)


def _tcp(address: str, said: str) -> Address:
    """Parse HOST:PORT, where PORT may be 0. Raises ConfigError, which quotes the option's value ``said``."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(ConfigError):
        parsed = Address.parse(f"{host}:{'1' if port == '0' else port}")
        if parsed.target and not parsed.is_dns_name:
            return parsed
    raise ConfigError(f"{said!r} is not HOST:PORT.", "Give a host and a port, such as 127.0.0.1:7070.")
