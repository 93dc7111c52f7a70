"""gRPC channels to a daemon: over its Unix socket, or over TCP with TLS and a token.

The module also has the limits of messages, and reads tokens, certificates and keys from files, for clients and
for daemons.
"""

from __future__ import annotations

import contextlib
import functools
import logging
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

MESSAGE_BYTES = 1 << 20  # largest message that a daemon takes
# limits of a call of Compute: number and bytes of outputs, and bytes of hidden states, which fit one message
MAX_OUTPUTS, OUTPUT_BYTES, INPUT_BYTES = 1024, 4 << 20, MESSAGE_BYTES - (16 << 10)

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # so that a peer that has vanished or hangs is noticed, even on an idle connection
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # the same timeout for gRPC's pings that measure bandwidth, as only one ping is sent at a time
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),  # shortest timeout of an attempt to connect, as the network may be slow
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_http_proxy", 0),  # never reach a daemon through a proxy
    ("grpc.enable_retries", 0),  # moetier repeats calls itself
    ("grpc.use_local_subchannel_pool", 1),  # one connection for each channel
    ("grpc.max_receive_message_length", 4 << 20),
)


def open_channel(address: Address, credentials: Credentials, *, bearer: str | None = None) -> grpc.Channel:
    """Return a channel to the daemon at ``address``. The channel connects when it is first used.

    Every call on the channel carries the bearer token ``bearer``. If that is None, a call over TCP carries the token in
    ``credentials.token_file``, if there is one.

    Raises ConfigError if the credentials can't be used, RefusedError if ``check_folder`` refuses the daemon's folder,
    and UnavailableError if that folder does not exist.
    """
    if address.folder is not None:
        try:
            check_folder(address.folder)
        except FileNotFoundError:
            raise UnavailableError(
                f"No daemon runs in {address.folder}.",
                "Start one: moetier daemon DIR; or name another (moetier ps lists them).",
            ) from None
        # the target is a URI: quote characters that have a meaning there
        target = "unix:" + quote(str(address.folder / SOCKET))
        channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
    else:
        if bearer is None and credentials.token_file is not None:
            bearer = read_token(credentials.token_file)
        target = f"dns:///{address.target}"  # with a scheme, as gRPC might take the host's name for one
        if credentials.insecure:
            if files := [name for name in ("ca", "cert", "key") if getattr(credentials, name) is not None]:
                raise ConfigError(
                    f"`credentials.insecure` turns TLS off, but `credentials.{files[0]}` is for TLS.",
                    "Give only one of the two.",
                )
            channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        else:
            name = (("grpc.ssl_target_name_override", address.tls_name),) if address.tls_name else ()
            channel = grpc.secure_channel(target, _tls(credentials), options=(*CHANNEL_OPTIONS, *name))
    return channel if bearer is None else grpc.intercept_channel(channel, _Bearer(bearer))


def speaks_tls(target: str, timeout: float) -> bool:
    """Return whether ``target``, a HOST:PORT, answers a TLS handshake within ``timeout`` seconds.

    The certificate is not checked.
    """
    host, _, port = target.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout) as end:
        context.wrap_socket(end).close()
        return True
    return False


def read_token(path: Path, what: str = "token") -> str:
    """Return the secret that a file holds as its only line. Log a warning if every user can read the file.

    ``what`` names the secret in errors. Raises ConfigError if the file can't be read, or does not hold one line of
    printable ASCII characters without spaces.
    """
    text = read_secret(path, what)
    try:
        token = text.decode("ascii").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        token = ""
    if not token or not token.isprintable() or " " in token:
        raise ConfigError(
            f"The {what}'s file {path} does not hold one line of printable ASCII characters without spaces.",
            f"Make a {what.split()[-1]}: openssl rand -hex 32",
        )
    return token


def read_secret(path: Path, what: str) -> bytes:
    """Return the content of a file with secrets. Log a warning if every user can read the file.

    ``what`` names the secret in errors. Raises ConfigError if the file can't be read.
    """
    content = _read(path, f"{what}'s file")
    _warn_if_world_readable(path, what)
    return content


def read_pem(path: Path, what: str) -> bytes:
    """Return the content of a file of certificates in PEM form.

    Raises ConfigError, which calls the file ``what``, if the file can't be read or holds no certificates. The
    certificates are checked here because gRPC's own error would not name the file.
    """
    pem = _read(path, what)
    try:
        # loaded by path, because the file may also hold text in any encoding
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as error:
        raise ConfigError(
            f"The {what} {path} holds no certificates in PEM form ({error}).", "Name another file."
        ) from None
    return pem


def read_identity(cert: Path, key: Path) -> tuple[bytes, bytes]:
    """Return the contents of a certificate chain's file and of its private key's file, both in PEM form.

    Raises ConfigError if a file can't be read, if the key is encrypted, or if key and certificate don't match.
    """
    pems = read_pem(cert, "certificate"), _read(key, "key")
    try:
        # without a password, OpenSSL would ask for one on the terminal if the key is encrypted
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert, key, password="")
    except (ssl.SSLError, ValueError, OSError) as error:
        if getattr(error, "reason", None) in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            raise ConfigError(f"The key {key} is not that of the certificate {cert}.", "Name its own key.") from None
        raise ConfigError(
            f"{key} holds no private key in PEM form that is not encrypted ({error}).", "Name another file."
        ) from None
    return pems


def _tls(credentials: Credentials) -> grpc.ChannelCredentials:
    if (credentials.cert is None) != (credentials.key is None):
        raise ConfigError(
            "A client certificate needs its key, and a key its certificate.",
            "Give both `credentials.cert` and `credentials.key`.",
        )
    key, cert = None, None
    if credentials.cert is not None and credentials.key is not None:
        cert, key = read_identity(credentials.cert, credentials.key)
    # by default the system's roots: SSL_CERT_FILE, or OpenSSL's; without these, gRPC's own
    ca = credentials.ca or ssl.get_default_verify_paths().cafile
    roots = read_pem(Path(ca), "CA" if credentials.ca else "system's CA") if ca else None
    return grpc.ssl_channel_credentials(root_certificates=roots, private_key=key, certificate_chain=cert)


@functools.cache  # cached to warn only once for each file, as a client reads the file for each connection
def _warn_if_world_readable(path: Path, what: str) -> None:
    if path.stat().st_mode & stat.S_IROTH:
        _log.warning("Every user can read the %s in %s. Close the file: chmod 600 %s", what, path, path)


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
