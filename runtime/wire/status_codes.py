"""Errors on the wire: a table of this project's errors and gRPC's status codes, and the conversion both ways.

A call that fails carries the message ``Error`` in its trailing metadata, beside the code. If gRPC itself or a proxy
ended the call, there is no ``Error``, and the code and its details have to say what happened.
"""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from moetier.proto.expert_store_pb2 import Error
from moetier.tiers import errors
from moetier.tiers.errors import DaemonError, MoetierError, ProtocolError, RefusedError, UnavailableError

from .channel import speaks_tls
from .control import error_from

METADATA = "moetier-error-bin"
_MAX_LINE = 1_000  # bytes: all metadata together may take 8 KiB

Code = grpc.StatusCode

# an error has the code of the most derived of its classes that is listed
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

# the error for a code that comes without an Error; codes that are not listed give DaemonError
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


def code_of(error: BaseException) -> grpc.StatusCode:
    """Return the status code of an error."""
    return next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), Code.INTERNAL)


def message_of(error: BaseException) -> Error:
    """Return the message that carries an error.

    An error that is no MoetierError is a bug in the daemon; of this only the class is told.
    """
    if not isinstance(error, MoetierError):
        error = DaemonError(f"The daemon failed ({type(error).__name__}).", "See the daemon's log, and report it.")
    return Error(kind=type(error).__name__, cause=_cut(error.cause), fix=_cut(error.fix))


def error_from_message(message: Error, code: grpc.StatusCode = Code.INTERNAL) -> MoetierError:
    """Return the error that a message carries. If this version does not know its name, ``code`` gives the class."""
    value = {"kind": message.kind, "cause": message.cause, "fix": message.fix}
    return error_from(value, ERRORS.get(code, DaemonError))


def _cut(line: str) -> str:
    return line.encode("utf-8", "replace")[:_MAX_LINE].decode("utf-8", "ignore")


def abort(context: grpc.ServicerContext, error: BaseException) -> NoReturn:
    """End a call with an error, by raising gRPC's exception for that."""
    message = message_of(error)
    context.set_trailing_metadata(((METADATA, message.SerializeToString()),))
    context.abort(code_of(error), message.cause)
    raise AssertionError  # abort has raised


def error_of(error: grpc.RpcError | ValueError, target: str = "") -> MoetierError:
    """Return the error that a failed call stands for. ``target`` is the daemon's HOST:PORT over TCP, else "".

    gRPC raises ValueError for a call on a channel that was closed.
    """
    if isinstance(error, ValueError):
        return UnavailableError("The connection to the daemon was closed.", "Connect again.")
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
    kind = ERRORS.get(code, DaemonError)
    return kind(f"The daemon did not answer as asked: {details} ({code.name}).", _FIXES.get(kind, "See its log."))


def _transport_error(code: grpc.StatusCode, details: str, target: str) -> MoetierError | None:
    """Return the error that a failure of gRPC's own names in its details; None if they name none that is known."""
    said = details.lower()
    if code is Code.RESOURCE_EXHAUSTED and _TOO_LARGE in said:
        return ProtocolError(f"A message is too large: {details}", "Use moetier in one version.")
    if code is not Code.UNAVAILABLE:
        return None
    if _PLAIN in said:
        return RefusedError(
            "The daemon does not speak TLS, and this client speaks nothing else.",
            "Give `credentials.insecure` if that daemon has no TLS.",
        )
    if any(sign in said for sign in _NO_TRUST):
        return RefusedError(
            f"The daemon and this client do not trust each other: {details}",
            "Give the authority that signed its certificate (`credentials.ca`), and the host's name as it is in there.",
        )
    if target and all(sign in said for sign in _CUT_OFF) and speaks_tls(target, _HANDSHAKE):
        return RefusedError(
            "The daemon wants TLS, and a certificate of the client's if it was started with --tls-client-ca.",
            "Give its authority (`credentials.ca`), and not `credentials.insecure`; with `credentials.cert` and "
            "`credentials.key`, if it wants them.",
        )
    return None


_TOO_LARGE = "larger than max"  # of a message; without these words the code means that the daemon takes no more calls
# the last one is from older versions of gRPC: "Peer name localhost is not in peer certificate"
_NO_TRUST = ("handshake failed", "certificate_verify_failed", "hostname verification", "not in peer certificate")
_PLAIN = "wrong_version_number"  # the peer answered a TLS handshake without TLS
_CUT_OFF = ("failed to connect", "socket closed")  # both together: the connection broke while it was being made
_HANDSHAKE = 2.0  # seconds
_FIXES: dict[type[MoetierError], str] = {
    errors.UnavailableError: "See whether it runs (moetier ps); over TCP also whether it wants TLS "
    "(`credentials.ca`, `credentials.cert`), or none (`credentials.insecure`).",
    errors.RefusedError: "Give its token and certificate.",
    errors.ProtocolError: "Use moetier in one version.",
    errors.UnknownModelError: "See what it serves (moetier ps).",
}
