"""The ASGI application of one model: its routes, and the responses for errors, in the form of each API."""

from __future__ import annotations

import time
from collections.abc import Iterator
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
from .keys import Keys, RateLimits
from .metrics import ServeCollector
from .middleware import HEALTH, AccessControl, App, RequestLimits, most_bytes
from .openapi import description_of
from .page import page_routes
from .prompts import Prompts
from .protocols.body import UnknownFields, unknown_model
from .protocols.chat import Chat
from .protocols.completions import Completions
from .protocols.messages import CountBody, Messages
from .protocols.refusal import MESSAGES, Refusal
from .protocols.responses import Responses
from .protocols.tokens import DetokenizeBody, TokenizeBody

PROTOCOLS = (Chat(), Completions(), Responses(), Messages())
COUNT, TOKENIZE, DETOKENIZE = f"{MESSAGES}/count_tokens", "/tokenize", "/detokenize"
BODIES = {
    **{protocol.path: protocol.body for protocol in PROTOCOLS},
    COUNT: CountBody,
    TOKENIZE: TokenizeBody,
    DETOKENIZE: DetokenizeBody,
}
METRICS, MODELS, OPENAPI = "/metrics", "/v1/models", "/openapi.json"


def application(
    name: str,
    service: AnswerService,
    keys: Keys | None,
    most: int,
    *,
    leave_out: str | None = None,
    alive_seconds: float = ALIVE_SECONDS,
) -> App:
    """Return an ASGI application that serves the service's model under ``name``.

    ``keys`` are the API keys, of which requests must send one; None: they need no key. ``most`` is the maximum number
    of POST requests at a time. ``leave_out`` is a regular expression of what is left out of system prompts. In
    ``alive_seconds`` a stream sends at least a comment.
    """
    prompts = Prompts(
        service.model,
        service.tokenizer,
        context=service.context,
        most_scored=service.most_scored,
        leave_out=leave_out,
    )
    unknown = UnknownFields()
    app = Starlette(
        routes=[*_plain_routes(name, service), *_post_routes(name, service, prompts, unknown, alive_seconds)],
        exception_handlers={HTTPException: _refused, Exception: _refused},
    )
    app.router.redirect_slashes = False
    limited = RequestLimits(app, most, most_bytes(service.context))
    return AccessControl(limited, keys, RateLimits(service.tally.used_tokens))


def _post_routes(
    name: str, service: AnswerService, prompts: Prompts, unknown: UnknownFields, alive_seconds: float
) -> Iterator[Route]:
    """Yield the routes of requests with a body."""
    for protocol in PROTOCOLS:
        endpoint = Endpoint(protocol, name, service, prompts, unknown, alive_seconds)
        yield Route(protocol.path, endpoint, methods=["POST"])

    def count(body: CountBody, user: str) -> dict[str, Any]:
        (prompt,) = body.query().prompts
        return {"input_tokens": len(prompts.tokens(prompt, user))}

    def tokenize(body: TokenizeBody, user: str) -> dict[str, Any]:
        tokens = prompts.tokens(body.text, user, add_special_tokens=body.add_special_tokens is not False)
        return {"count": len(tokens), "max_model_len": service.context, "tokens": tokens}

    def detokenize(body: DetokenizeBody, _: str) -> dict[str, Any]:
        return {"prompt": service.tokenizer.decode(body.tokens)}

    yield Route(COUNT, BodyEndpoint(name, CountBody, count, unknown), methods=["POST"])
    yield Route(TOKENIZE, BodyEndpoint(name, TokenizeBody, tokenize, unknown), methods=["POST"])
    yield Route(DETOKENIZE, BodyEndpoint(name, DetokenizeBody, detokenize, unknown), methods=["POST"])


def _plain_routes(name: str, service: AnswerService) -> Iterator[Route]:
    """Yield the routes of requests without a body."""
    disk = None if service.disk is None else service.disk.traffic
    registry = registry_of(
        ServeCollector(name, service.model.tiers.stats, service.tally, service.prompt_tokens_left, disk)
    )
    card = card_of(name, int(time.time()))

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

    def openapi(_: Request) -> Response:
        return JSONResponse(description_of(BODIES, [HEALTH, METRICS, MODELS, OPENAPI]))

    yield from page_routes()  # with HEAD, too: clients ask "/" whether there is a server
    yield Route(HEALTH, health)
    yield Route(METRICS, metrics)
    yield Route(OPENAPI, openapi)
    yield Route(MODELS, models)
    yield Route(MODELS + "/{model:path}", model)


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
