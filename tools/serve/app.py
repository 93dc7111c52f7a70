"""The ASGI application of one model: its routes, and the responses for errors, in OpenAI's form."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from moetier.runtime.daemon.metrics import registry_of

from .answers import AnswerService
from .endpoint import ALIVE_SECONDS, BodyEndpoint, Endpoint
from .metrics import ServeCollector
from .middleware import HEALTH, AccessControl, App, RequestLimits, most_bytes
from .prompts import Prompts
from .protocols.body import UnknownFields, unknown_model
from .protocols.chat import Chat
from .protocols.completions import Completions
from .protocols.messages import CountBody, Messages
from .protocols.refusal import MESSAGES, Refusal
from .protocols.responses import Responses

PROTOCOLS = (Chat(), Completions(), Responses(), Messages())


def application(
    name: str, service: AnswerService, key: str | None, most: int, *, alive_seconds: float = ALIVE_SECONDS
) -> App:
    """Return an ASGI application that serves the service's model under ``name``.

    ``key`` is the API key that requests must send; None: they need no key. ``most`` is the maximum number of POST
    requests at a time. In ``alive_seconds`` a stream sends at least a comment.
    """
    tiers = service.model.tiers
    registry = registry_of(ServeCollector(name, tiers.stats, service.tally, service.prompt_tokens_left))
    card = card_of(name, int(time.time()))

    unknown = UnknownFields()
    prompts = Prompts(service.model, service.tokenizer, context=service.context, most_scored=service.most_scored)

    def models(_: Request) -> Response:
        of_anthropic = {"has_more": False, "first_id": name, "last_id": name}
        return JSONResponse({"object": "list", "data": [card], **of_anthropic})

    def model(request: Request) -> Response:
        if (asked := request.path_params["model"]) != name:
            raise unknown_model(asked, name)
        return JSONResponse(card)

    def health(_: Request) -> Response:
        if service.is_alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "unhealthy", "reason": "cb_worker_dead"}, status_code=503)

    def metrics(request: Request) -> Response:  # no coroutine, so Starlette runs it on a thread: it waits for locks
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), media_type=content_type)

    app = Starlette(
        routes=[
            Route(HEALTH, health),
            Route("/", lambda _: Response(), methods=["HEAD"]),  # clients ask whether there is a server
            Route("/metrics", metrics),
            Route("/v1/models", models),
            Route("/v1/models/{model:path}", model),
            *(
                Route(
                    protocol.path, Endpoint(protocol, name, service, prompts, unknown, alive_seconds), methods=["POST"]
                )
                for protocol in PROTOCOLS
            ),
            Route(
                f"{MESSAGES}/count_tokens",
                BodyEndpoint(name, CountBody, lambda body: {"input_tokens": sum(prompts.count(body.query()))}, unknown),
                methods=["POST"],
            ),
        ],
        exception_handlers={HTTPException: _refused, Exception: _refused},
    )
    app.router.redirect_slashes = False
    return AccessControl(RequestLimits(app, most, most_bytes(service.context)), key)


def card_of(name: str, created: int) -> dict[str, Any]:
    """Return what lists of models say of the served one, in OpenAI's form and in Anthropic's."""
    of_openai = {"id": name, "object": "model", "created": created, "owned_by": "moetier"}
    since = datetime.fromtimestamp(created, UTC).isoformat().replace("+00:00", "Z")
    return of_openai | {"type": "model", "display_name": name, "created_at": since}


async def _refused(request: Request, error: Exception) -> Response:
    path = request.scope["path"]
    match error:
        case Refusal():
            return error.response(path)
        case HTTPException():  # 404 or 405
            message = f"This server does not answer {request.method} {path}."
            return Refusal(404, message, code="unknown_url").response(path)
        case _:  # Starlette raises the error again, and AccessControl logs it
            return Refusal(500, "The request failed; the server's log says why.").response(path)
