"""What a client is told in place of an answer, as OpenAI's API says it."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse


class Refusal(HTTPException):
    """Raised where a request is looked at; transformers' server and ours answer with it."""

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


def refusal_body(error: HTTPException) -> dict[str, Any]:
    """Of any exception that FastAPI answers with."""
    said = {
        "message": str(error.detail),
        "type": "invalid_request_error" if error.status_code < 500 else "server_error",
        "param": getattr(error, "param", None),
        "code": getattr(error, "code", None),
    }
    return {"error": said}


def refusal_response(error: HTTPException) -> JSONResponse:
    """Return the HTTP response of an exception, in the form of OpenAI's API."""
    status = 400 if error.status_code == 422 else error.status_code  # FastAPI's own for what is malformed
    return JSONResponse(refusal_body(error), status_code=status, headers=error.headers)


def unknown_model(asked: str, served: str) -> Refusal:
    """Return the refusal of a model's name that is not served."""
    return Refusal(404, f"There is no model {asked!r} here, but {served!r}.", param="model", code="model_not_found")
