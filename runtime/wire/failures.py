"""Why a call to a daemon on another host failed, where gRPC itself may have been the one to end it."""

from __future__ import annotations

from typing import Any

import grpc

from moetier.tiers.errors import MoetierError, ProtocolError, RefusedError, UnavailableError

from .address import Address
from .channel import speaks_tls
from .status_codes import METADATA, error_of

_TOO_LARGE = "larger than max"  # a message; otherwise the daemon takes no more calls
# the last one is older gRPC's: "Peer name localhost is not in peer certificate"
_NO_TRUST = ("handshake failed", "certificate_verify_failed", "hostname verification", "not in peer certificate")
_PLAIN = "wrong_version_number"  # the answer to TLS of who speaks none
_CUT_OFF = ("failed to connect", "socket closed")  # both: before it was a connection
_HANDSHAKE = 2.0  # seconds


def failure_of(error: grpc.RpcError, address: Address) -> MoetierError:
    """What a failed call tells."""
    call: Any = error
    code, details = call.code(), " ".join((call.details() or "").split())
    if not any(name == METADATA for name, _ in call.trailing_metadata() or ()):
        said = details.lower()
        if code is grpc.StatusCode.UNAVAILABLE and _PLAIN in said:
            return RefusedError(
                "The daemon does not speak TLS, and this client would speak nothing else.",
                "Give `credentials.insecure` if that daemon has no TLS.",
            )
        if code is grpc.StatusCode.UNAVAILABLE and any(sign in said for sign in _NO_TRUST):
            return RefusedError(
                f"The daemon and this client do not trust each other: {details}",
                "Give the authority that signed its certificate (`credentials.ca`), and the host's name as it is in "
                "there.",
            )
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in said:
            return ProtocolError(
                f"A daemon sent what is no piece of a record: {details}", "Use moetier in one version."
            )
        if (
            code is grpc.StatusCode.UNAVAILABLE
            and all(sign in said for sign in _CUT_OFF)
            and address.target
            and speaks_tls(address.target, _HANDSHAKE)
        ):
            return RefusedError(
                "The daemon wants TLS, and a certificate of the client's if it was started with --tls-client-ca.",
                "Give its authority (`credentials.ca`), and not `credentials.insecure`; with `credentials.cert` and "
                "`credentials.key`, if it wants them.",
            )
    return error_of(error)


def closed_channel() -> UnavailableError:
    """For the ValueError that gRPC raises when the channel was closed."""
    return UnavailableError("The connection to the daemon was closed.", "Connect again.")
