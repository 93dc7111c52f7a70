"""A gRPC channel to the daemon of an address: over its Unix socket, or over TCP with TLS and a token."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import ssl
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import grpc

from moetier.tiers.errors import ConfigError, UnavailableError

from .address import SOCKET, Address, Credentials, check_folder

_log = logging.getLogger(__name__)

SERVICE = "moetier.v1.ExpertStore"

OPTIONS: tuple[tuple[str, int], ...] = (
    # a peer that is gone or stands still without a word is noticed, by an idle client too
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # of the pings that measure, too: there is one at a time
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),  # what an attempt may take at least: the network may be slow
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_http_proxy", 0),  # bytes of a daemon pass nobody else
    ("grpc.enable_retries", 0),  # who calls knows best what is repeated, and where
    ("grpc.use_local_subchannel_pool", 1),  # a channel is a connection of its own
    ("grpc.max_receive_message_length", 4 << 20),
)


def open_channel(address: Address, credentials: Credentials, *, bearer: str | None = None) -> grpc.Channel:
    """Connects when it is first used. Every call shows ``bearer``, or over TCP the token of the credentials' file.

    Raises ConfigError for files that can't be used and for what contradicts itself; of a Unix folder RefusedError where
    others could have their hands in it, UnavailableError where it is not there.
    """
    # A forked child does not use its parent's channels. gRPC's handlers of forks would do nothing, and say so.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # gRPC reads it when its first channel is made
    if address.folder is not None:
        try:
            check_folder(address.folder)
        except FileNotFoundError:
            raise UnavailableError(
                f"No daemon runs in {address.folder}.", "Start one: moetier daemon DIR; or name another."
            ) from None
        # the target is a URI, and a path may hold what means something there
        target = "unix:" + quote(str(address.folder / SOCKET))
        channel = grpc.insecure_channel(target, options=OPTIONS)
    else:
        if bearer is None and credentials.token_file is not None:
            bearer = read_token(credentials.token_file)
        target = f"dns:///{address.target}"  # the scheme said: a host may have the name of one
        if credentials.insecure:
            if given := [name for name in ("ca", "cert", "key") if getattr(credentials, name) is not None]:
                raise ConfigError(
                    f"`credentials.insecure` is without TLS: `credentials.{given[0]}` has no use.",
                    "Give one or the other.",
                )
            channel = grpc.insecure_channel(target, options=OPTIONS)
        else:
            channel = grpc.secure_channel(target, _tls(credentials), options=OPTIONS)
    return channel if bearer is None else grpc.intercept_channel(channel, _Bearer(bearer))


def speaks_tls(target: str, patience: float) -> bool:
    """Whether somebody at HOST:PORT answers a TLS handshake within ``patience`` seconds, whoever it is."""
    host, _, port = target.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), patience) as end:
        context.wrap_socket(end).close()
        return True
    return False


def read_token(path: Path, what: str = "token") -> str:
    """The one line of the file of a token, or of what else is as secret; warns where every user can read it. Raises
    ConfigError for what can't be one."""
    text = _read(path, f"{what}'s file")
    _warn_of_readers(path, what)
    try:
        token = text.decode("ascii").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        token = ""
    if not token or not token.isprintable() or " " in token:
        raise ConfigError(
            f"The {what}'s file {path} does not hold one line of printable ASCII characters.",
            f"Make a {what.split()[-1]}: openssl rand -hex 32",
        )
    return token


def read_pem(path: Path, what: str) -> bytes:
    """Certificates, vetted: gRPC itself would say nothing, and connect to nobody. Raises ConfigError."""
    pem = _read(path, what)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)  # text between them may be in any language
    except OSError as error:
        raise ConfigError(f"The {what} {path} holds no certificates in PEM form ({error}).", "Name another.") from None
    return pem


def read_identity(cert: Path, key: Path) -> tuple[bytes, bytes]:
    """A certificate (with what leads to its authority) and its private key, vetted. Raises ConfigError."""
    pems = _read(cert, "certificate"), _read(key, "key")
    try:
        # the password of an encrypted key: none, rather than a question to the terminal
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert, key, password="")
    except (ssl.SSLError, ValueError, OSError) as error:
        raise ConfigError(
            f"{cert} and {key} are no certificate and private key of each other, in PEM form and not encrypted "
            f"({error}).",
            "Name another pair.",
        ) from None
    return pems


def _tls(credentials: Credentials) -> grpc.ChannelCredentials:
    if (credentials.cert is None) != (credentials.key is None):
        raise ConfigError("A certificate of the client's needs its key, and a key its certificate.", "Give both.")
    key, cert = None, None
    if credentials.cert is not None and credentials.key is not None:
        cert, key = read_identity(credentials.cert, credentials.key)
    return grpc.ssl_channel_credentials(
        root_certificates=read_pem(credentials.ca, "CA") if credentials.ca is not None else _system_roots(),
        private_key=key,
        certificate_chain=cert,
    )


def _system_roots() -> bytes | None:
    """What this system trusts (SSL_CERT_FILE, else OpenSSL's place); None: the roots that gRPC brings."""
    place = ssl.get_default_verify_paths().cafile
    return read_pem(Path(place), "system's CA") if place else None


@functools.cache  # a client reads it for each connection
def _warn_of_readers(path: Path, what: str) -> None:
    if path.stat().st_mode & stat.S_IROTH:
        _log.warning("Every user can read the %s in %s: chmod 600 %s", what, path, path)


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"The {what} {path} can't be read: {error.strerror}.", "Name another file.") from None


class _Details(NamedTuple):
    """A call's details, with more metadata."""

    method: str
    timeout: float | None
    metadata: list[tuple[str, str | bytes]]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Shows a token with every call. (Call credentials of gRPC's own would refuse a channel without TLS.)"""

    def __init__(self, token: str) -> None:
        self._entry = ("authorization", f"Bearer {token}")

    def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return continuation(self._with_token(details), request)

    def intercept_unary_stream(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return continuation(self._with_token(details), request)

    def intercept_stream_unary(self, continuation: Callable[..., Any], details: Any, requests: Iterator[Any]) -> Any:
        return continuation(self._with_token(details), requests)

    def intercept_stream_stream(self, continuation: Callable[..., Any], details: Any, requests: Iterator[Any]) -> Any:
        return continuation(self._with_token(details), requests)

    def _with_token(self, details: Any) -> Any:
        return _Details(
            details.method,
            details.timeout,
            [*(details.metadata or ()), self._entry],
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )
