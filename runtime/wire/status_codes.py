"""Errors on the wire: conversion between this project's errors and gRPC's status codes.

A call that fails carries the message ``Error`` in its trailing metadata, in addition to the status code. If gRPC itself
or a proxy ended the call, there is no ``Error``, and only the code and its details say what happened.
"""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from moetier.proto.expert_store_pb2 import Error
from moetier.tiers import errors
from moetier.tiers.errors import SAME_VERSION, DaemonError, MoetierError, ProtocolError, RefusedError, UnavailableError

from .channel import speaks_tls
from .control import error_from

METADATA = "moetier-error-bin"
_MAX_LINE = 1_000  # bytes of a cause or a fix, as all metadata of a call may take 8 KiB

Code = grpc.StatusCode

# an error has the code of its own class or, if that is not listed, of the nearest base class that is
CODES: dict[type[MoetierError], grpc.StatusCode] = {
    errors.ChecksumError: Code.DATA_LOSS,
    errors.MissingExpertError: Code.NOT_FOUND,
    errors.UnknownModelError: Code.NOT_FOUND,
    errors.StoreFormatError: Code.FAILED_PRECONDITION,
    errors.IncompleteStoreError: Code.FAILED_PRECONDITION,
    errors.ArenaError: Code.FAILED_PRECONDITION,
    errors.StoreError: Code.INTERNAL,
    errors.ExhaustedError: Code.RESOURCE_EXHAUSTED,
    errors.BudgetError: Code.RESOURCE_EXHAUSTED,
    errors.UnavailableError: Code.UNAVAILABLE,
    errors.ClosedError: Code.UNAVAILABLE,
    errors.RefusedError: Code.UNAUTHENTICATED,
    errors.ProtocolError: Code.INVALID_ARGUMENT,
    errors.ConfigError: Code.INVALID_ARGUMENT,
    errors.AlreadyRunningError: Code.ALREADY_EXISTS,
    errors.MoetierError: Code.INTERNAL,
}

# class of the error for a code that comes without the message Error; DaemonError for codes that are not listed
ERRORS: dict[grpc.StatusCode, type[MoetierError]] = {
    Code.DATA_LOSS: errors.ChecksumError,
    Code.NOT_FOUND: errors.UnknownModelError,
    Code.RESOURCE_EXHAUSTED: errors.ExhaustedError,
    Code.UNAVAILABLE: errors.UnavailableError,
    Code.DEADLINE_EXCEEDED: errors.UnavailableError,
    Code.CANCELLED: errors.UnavailableError,
    Code.UNAUTHENTICATED: errors.RefusedError,
    Code.PERMISSION_DENIED: errors.RefusedError,
    Code.INVALID_ARGUMENT: errors.ProtocolError,
    Code.UNIMPLEMENTED: errors.ProtocolError,
    Code.OUT_OF_RANGE: errors.ProtocolError,
    Code.ALREADY_EXISTS: errors.AlreadyRunningError,
}

# what a gRPC call raises; ValueError: on a closed channel; the last two: no descriptor, memory or thread is left
CALL_ERRORS = (grpc.RpcError, ValueError, OSError, RuntimeError)


def code_of(error: BaseException) -> grpc.StatusCode:
    """Return the status code of an error."""
    return next((CODES[base] for base in type(error).__mro__ if base in CODES), Code.INTERNAL)


def message_of(error: BaseException) -> Error:
    """Return the message ``Error`` for an error.

    An error that is not a MoetierError is a bug in the daemon. The message then names only the error's class.
    """
    if not isinstance(error, MoetierError):
        error = DaemonError(
            f"The daemon failed ({type(error).__name__}).", "See the daemon's log, and report this bug."
        )
    return Error(type=type(error).__name__, cause=_cut(error.cause), fix=_cut(error.fix))


def error_from_message(message: Error, code: grpc.StatusCode = Code.INTERNAL) -> MoetierError:
    """Return the error that ``message`` describes. If this version lacks its class, ``code`` decides the class."""
    return error_from({"kind": message.type, "cause": message.cause, "fix": message.fix}, ERRORS.get(code, DaemonError))


def _cut(line: str) -> str:
    return line.encode("utf-8", "replace")[:_MAX_LINE].decode("utf-8", "ignore")


def abort(context: grpc.ServicerContext, error: BaseException) -> NoReturn:
    """End a call with the status code and the message of ``error``. Raises gRPC's own exception."""
    message = message_of(error)
    context.set_trailing_metadata(((METADATA, message.SerializeToString()),))
    context.abort(code_of(error), message.cause)
    raise AssertionError  # abort has raised


def error_of(error: grpc.RpcError | ValueError | OSError | RuntimeError, target: str = "") -> MoetierError:
    """Return this project's error for ``error``, one of CALL_ERRORS, which a gRPC call has raised.

    ``target`` is the daemon's HOST:PORT, or "" for a call over a Unix socket.
    """
    if isinstance(error, ValueError):
        return UnavailableError("The connection to the daemon was closed.", "Connect again.")
    if isinstance(error, OSError | RuntimeError):
        return UnavailableError(
            f"The daemon can't be called: {error}.",
            "Free memory, or raise the limits of open files and threads (ulimit -n, ulimit -u).",
        )
    call: Any = error  # every RpcError that a call raises is a grpc.Call too
    code: grpc.StatusCode = call.code()
    details = " ".join((call.details() or code.name).split())
    for name, value in call.trailing_metadata() or ():
        if name == METADATA and isinstance(value, bytes):
            try:
                return error_from_message(Error.FromString(value), code)
            except DecodeError:
                break
    else:
        if (transport := _transport_error(code, details, target)) is not None:
            return transport
    error_class = ERRORS.get(code, DaemonError)
    return error_class(
        f"The call to the daemon failed: {details} ({code.name}).", _FIXES.get(error_class, "See the daemon's log.")
    )


def _transport_error(code: grpc.StatusCode, details: str, target: str) -> MoetierError | None:
    """Return the error for a failure of the connection that ``details`` describes; None for any other failure."""
    said = details.lower()
    if code is Code.RESOURCE_EXHAUSTED and _TOO_LARGE in said:
        return ProtocolError(f"A message is too large: {details}", SAME_VERSION)
    if code is not Code.UNAVAILABLE:
        return None
    if _PLAIN in said:
        return RefusedError(
            "The daemon does not use TLS, but this client does.", "Give `credentials.insecure` to connect without TLS."
        )
    if any(sign in said for sign in _NO_TRUST):
        return RefusedError(
            f"The daemon and this client do not trust each other: {details}",
            "Give the authority that signed the daemon's certificate (`credentials.ca`), and use a host name from that "
            "certificate in the daemon's address.",
        )
    if target and all(sign in said for sign in _CUT_OFF) and speaks_tls(target, _HANDSHAKE):
        return RefusedError(
            "The daemon requires TLS. If it was started with --tls-client-ca, it also requires a client certificate.",
            "Give the daemon's authority (`credentials.ca`), and leave out `credentials.insecure`. If the daemon "
            "requires a client certificate, give `credentials.cert` and `credentials.key` too.",
        )
    return None


_TOO_LARGE = "larger than max"  # of a message; without these words, the code means that the daemon is full
# the last one is from older versions of gRPC: "Peer name localhost is not in peer certificate"
_NO_TRUST = ("handshake failed", "certificate_verify_failed", "hostname verification", "not in peer certificate")
_PLAIN = "wrong_version_number"  # the peer answered a TLS handshake without TLS
_CUT_OFF = ("failed to connect", "socket closed")  # both together: the connection broke while it was being made
_HANDSHAKE = 2.0  # seconds
_FIXES: dict[type[MoetierError], str] = {
    errors.UnavailableError: "Check that the daemon runs (moetier ps). Over TCP, check also whether it requires TLS "
    "(`credentials.ca`, `credentials.cert`) or does not use it (`credentials.insecure`).",
    errors.RefusedError: "Give the daemon's token (`credentials.token_file`) and, if the daemon requires one, a client "
    "certificate (`credentials.cert`).",
    errors.ProtocolError: SAME_VERSION,
    errors.UnknownModelError: "See which models the daemon serves (moetier ps).",
}
