"""gRPC channels to a daemon: over its Unix socket, or over TCP with TLS and a token.

Reading of tokens, certificates and keys, which clients and daemons share.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import ssl
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc

from moetier.tiers.errors import ConfigError, UnavailableError

from .address import SOCKET, Address, Credentials, check_folder

_log = logging.getLogger(__name__)

SERVICE = "moetier.v1.ExpertStore"

OPTIONS: tuple[tuple[str, int], ...] = (
    # notice a peer that vanished or hangs, on an idle connection too
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # also for gRPC's pings that measure bandwidth: only one ping is sent at a time
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),  # least timeout of an attempt to connect: the network may be slow
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_http_proxy", 0),  # never send a daemon's bytes through a proxy
    ("grpc.enable_retries", 0),  # the callers of this project repeat calls themselves
    ("grpc.use_local_subchannel_pool", 1),  # one connection for each channel
    ("grpc.max_receive_message_length", 4 << 20),
)


def open_channel(address: Address, credentials: Credentials, *, bearer: str | None = None) -> grpc.Channel:
    """Return a channel to a daemon, which connects when it is first used.

    Every call on it carries ``bearer`` or, over TCP, the token in the credentials' file.

    Raises ConfigError for credentials that can't be used, RefusedError for a folder that is not safe, and
    UnavailableError for a folder that is missing.
    """
    # A forked child does not use its parent's channels. gRPC's own fork handlers would only print warnings.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # read when the first channel is made
    if address.folder is not None:
        try:
            check_folder(address.folder)
        except FileNotFoundError:
            raise UnavailableError(
                f"No daemon runs in {address.folder}.", "Start one: moetier daemon DIR; or name another."
            ) from None
        # the target is a URI: quote characters that have a meaning there
        target = "unix:" + quote(str(address.folder / SOCKET))
        channel = grpc.insecure_channel(target, options=OPTIONS)
    else:
        if bearer is None and credentials.token_file is not None:
            bearer = read_token(credentials.token_file)
        target = f"dns:///{address.target}"  # with its scheme: a host's name might be taken for one
        if credentials.insecure:
            if given := [name for name in ("ca", "cert", "key") if getattr(credentials, name) is not None]:
                raise ConfigError(
                    f"`credentials.insecure` turns TLS off, and `credentials.{given[0]}` is for TLS.",
                    "Give one or the other.",
                )
            channel = grpc.insecure_channel(target, options=OPTIONS)
        else:
            channel = grpc.secure_channel(target, _tls(credentials), options=OPTIONS)
    return channel if bearer is None else grpc.intercept_channel(channel, _Bearer(bearer))


def speaks_tls(target: str, patience: float) -> bool:
    """Return whether HOST:PORT answers a TLS handshake within ``patience`` seconds. The certificate is not checked."""
    host, _, port = target.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), patience) as end:
        context.wrap_socket(end).close()
        return True
    return False


def read_token(path: Path, what: str = "token") -> str:
    """Read a secret from a file that holds it as one line, and warn if every user can read the file.

    ``what`` names the secret in errors. Raises ConfigError if the file can't be read or does not hold one line of
    printable ASCII.
    """
    text = _read(path, f"{what}'s file")
    _warn_if_world_readable(path, what)
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
    """Read a file of certificates in PEM form. Raises ConfigError, which calls the file ``what``.

    The certificates are checked to be well-formed here, because gRPC would fail without naming the file.
    """
    pem = _read(path, what)
    try:
        # by path: the file may also hold text in any encoding
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as error:
        raise ConfigError(f"The {what} {path} holds no certificates in PEM form ({error}).", "Name another.") from None
    return pem


def read_identity(cert: Path, key: Path) -> tuple[bytes, bytes]:
    """Read a certificate chain and its private key, and check that they belong together. Raises ConfigError."""
    pems = _read(cert, "certificate"), _read(key, "key")
    try:
        # empty password: without one, OpenSSL would ask on the terminal for that of an encrypted key
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert, key, password="")
    except (ssl.SSLError, ValueError, OSError) as error:
        raise ConfigError(
            f"{cert} and {key} are not a certificate and its private key, in PEM form and not encrypted ({error}).",
            "Name another pair.",
        ) from None
    return pems


def _tls(credentials: Credentials) -> grpc.ChannelCredentials:
    if (credentials.cert is None) != (credentials.key is None):
        raise ConfigError("A client certificate needs its key, and a key its certificate.", "Give both.")
    key, cert = None, None
    if credentials.cert is not None and credentials.key is not None:
        cert, key = read_identity(credentials.cert, credentials.key)
    # the system's roots by default: SSL_CERT_FILE, or OpenSSL's; gRPC's own if there are none
    ca = credentials.ca or ssl.get_default_verify_paths().cafile
    roots = read_pem(Path(ca), "CA" if credentials.ca else "system's CA") if ca else None
    return grpc.ssl_channel_credentials(root_certificates=roots, private_key=key, certificate_chain=cert)


@functools.cache  # warns once for each file, which a client reads for each connection
def _warn_if_world_readable(path: Path, what: str) -> None:
    if path.stat().st_mode & stat.S_IROTH:
        _log.warning("Every user can read the %s in %s: chmod 600 %s", what, path, path)


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"The {what} {path} can't be read: {error.strerror}.", "Name another file.") from None


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Add a bearer token to every call. (gRPC's own call credentials refuse a channel without TLS.)"""

    def __init__(self, token: str) -> None:
        self._entry = ("authorization", f"Bearer {token}")

    def _intercept(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        # gRPC's details are a named tuple
        return continuation(details._replace(metadata=[*(details.metadata or ()), self._entry]), request)

    intercept_unary_unary = intercept_unary_stream = intercept_stream_stream = _intercept  # type: ignore[assignment]
