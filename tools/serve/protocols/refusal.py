"""Errors of requests in the forms of the APIs, and the log lines of failures."""

from __future__ import annotations

import logging
import os
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from moetier.tiers.errors import MoetierError
from moetier.tools.cli.failure import DEBUG

HEADER_BYTES = 16 << 10  # maximum size of a request's headers with its first line
FAILED = "The answer failed; the server's log says why."
ENDING = "The server is shutting down."
TOO_LONG = "context_length_exceeded"  # code of the error of a prompt for which the context has no room

MESSAGES = "/v1/messages"  # routes that begin so are those of Anthropic's API
ANTHROPIC_TYPES = {  # types of errors by status; 400 and 500 are for all others below and above 500
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}

_log = logging.getLogger(__name__)


class Refusal(HTTPException):
    """Error that a client gets in place of its answer, or in the middle of a stream.

    ``param`` is the name of the field that is wrong, and ``code`` is OpenAI's code for the error. Both may be None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status_code=status, detail=message, headers=headers)
        self.param, self.code = param, code

    def body(self, path: str = "") -> dict[str, Any]:
        """Return the error as the JSON object of the API to which the route ``path`` belongs: by default OpenAI's."""
        is_clients = self.status_code < 500
        if path.startswith(MESSAGES):
            kind = ANTHROPIC_TYPES.get(self.status_code, "invalid_request_error" if is_clients else "api_error")
            # clients look for these words, and then shorten the conversation
            too_long = "prompt is too long: " if self.code == TOO_LONG else ""
            return {"type": "error", "error": {"type": kind, "message": too_long + self.detail}}
        kind = "invalid_request_error" if is_clients else "server_error"
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self, path: str = "") -> JSONResponse:
        """Return the error as an HTTP response for the route ``path``."""
        return JSONResponse(self.body(path), status_code=self.status_code, headers=self.headers)


def headers_too_long() -> Refusal:
    """Return the refusal of a request whose headers have more than HEADER_BYTES."""
    return Refusal(431, f"The headers have more than {HEADER_BYTES:,} bytes.", headers={"Connection": "close"})


def unknown_model(asked: str) -> Refusal:
    """Return the refusal of a request for the model ``asked``, which the server does not have."""
    return Refusal(
        404,
        f"This server has no model {asked!r}. GET /v1/models lists those that it has.",
        param="model",
        code="model_not_found",
    )


def log_failure(what: str, error: BaseException) -> None:
    """Log that ``what`` failed with ``error``.

    The message of the error is logged only if it is moetier's own: a library's may quote a prompt. If DEBUG is 1, the
    traceback is logged, too.
    """
    said = f": {error.cause}" if isinstance(error, MoetierError) else ""
    debug = error if os.environ.get(DEBUG) == "1" else None
    _log.error("%s failed with %s%s", what, type(error).__name__, said, exc_info=debug)
