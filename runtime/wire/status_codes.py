"""Errors on the wire: the one table between this project's tree and gRPC's status codes, and both ways across it.

An error travels whole, beside the code, as an ``Error`` in the trailing metadata. Where there is none (gRPC itself has
answered, or something between) the code alone says which error it is.
"""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from moetier.proto.expert_store_pb2 import Error
from moetier.tiers import errors
from moetier.tiers.errors import DaemonError, MoetierError

from .side_packets import error_from

METADATA = "moetier-error-bin"
_LONGEST = 1_000  # bytes of a line: all metadata together may take 8 KiB

Code = grpc.StatusCode

# the most special class decides; of what is not named, its base
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

# what a code means that comes without an Error; of what is not named, DaemonError
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
    return next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), Code.INTERNAL)


def message_of(error: BaseException) -> Error:
    """What travels. Of what is no MoetierError, and so a fault of ours, only its kind is told."""
    if not isinstance(error, MoetierError):
        error = DaemonError(f"The daemon failed ({type(error).__name__}).", "See the daemon's log, and report it.")
    return Error(kind=type(error).__name__, cause=_cut(error.cause), fix=_cut(error.fix))


def error_from_message(message: Error, code: grpc.StatusCode = Code.INTERNAL) -> MoetierError:
    """The error that travelled; ``code`` says what one is that this version has no name for."""
    value = {"kind": message.kind, "cause": message.cause, "fix": message.fix}
    return error_from(value, ERRORS.get(code, DaemonError))


def _cut(line: str) -> str:
    return line.encode("utf-8", "replace")[:_LONGEST].decode("utf-8", "ignore")


def abort(context: grpc.ServicerContext, error: BaseException) -> NoReturn:
    """Ends a call with an error."""
    message = message_of(error)
    context.set_trailing_metadata(((METADATA, message.SerializeToString()),))
    context.abort(code_of(error), message.cause)
    raise AssertionError  # abort has raised


def error_of(error: grpc.RpcError) -> MoetierError:
    """What a failed call tells."""
    call: Any = error  # every RpcError that a call raises is a grpc.Call too
    code: grpc.StatusCode = call.code()
    for name, value in call.trailing_metadata() or ():
        if name == METADATA and isinstance(value, bytes):
            try:
                return error_from_message(Error.FromString(value), code)
            except DecodeError:  # the code has to do
                break
    details = " ".join((call.details() or code.name).split())
    kind = ERRORS.get(code, DaemonError)
    return kind(f"The daemon did not answer as asked: {details} ({code.name}).", _FIXES.get(kind, "See its log."))


_FIXES: dict[type[MoetierError], str] = {
    errors.UnavailableError: "See whether it runs (moetier ps); over TCP also whether it wants TLS "
    "(`credentials.ca`, `credentials.cert`), or none (`credentials.insecure`).",
    errors.RefusedError: "Give its token and certificate.",
    errors.ProtocolError: "Use moetier in one version.",
    errors.UnknownModelError: "See what it serves (moetier ps).",
}
