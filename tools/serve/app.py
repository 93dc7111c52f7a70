"""The ASGI application of a server: its routes, and the responses for errors, in the form of each API."""

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
from moetier.runtime.model.context import longest_context

from .endpoint import ALIVE_SECONDS, BodyEndpoint, Endpoint
from .keys import Keys, RateLimits
from .metrics import ServeCollector
from .middleware import HEALTH, MAX_BYTES, AccessControl, App, RequestLimits, most_bytes
from .models import Models
from .openapi import description_of
from .page import page_routes
from .protocols.body import UnknownFields
from .protocols.chat import ChatProtocol
from .protocols.completions import CompletionsProtocol
from .protocols.messages import CountBody, MessagesProtocol
from .protocols.refusal import MESSAGES, Refusal, unknown_model
from .protocols.responses import ResponsesProtocol
from .protocols.tokens import DetokenizeBody, TokenizeBody
from .serving import Served

PROTOCOLS = (ChatProtocol(), CompletionsProtocol(), ResponsesProtocol(), MessagesProtocol())
COUNT, TOKENIZE, DETOKENIZE = f"{MESSAGES}/count_tokens", "/tokenize", "/detokenize"
BODIES = {
    **{protocol.path: protocol.body for protocol in PROTOCOLS},
    COUNT: CountBody,
    TOKENIZE: TokenizeBody,
    DETOKENIZE: DetokenizeBody,
}
METRICS, MODELS, OPENAPI = "/metrics", "/v1/models", "/openapi.json"


def application(models: Models, keys: Keys | None, most: int, *, alive_seconds: float = ALIVE_SECONDS) -> App:
    """Return an ASGI application that serves ``models``.

    ``keys`` are the API keys, of which requests must send one; None: they need no key. ``most`` is the maximum number
    of POST requests at a time. In ``alive_seconds`` a stream sends at least a comment.
    """
    app = Starlette(
        routes=[*_plain_routes(models), *_post_routes(models, UnknownFields(), alive_seconds)],
        exception_handlers={HTTPException: _refused, Exception: _refused},
    )
    app.router.redirect_slashes = False
    return AccessControl(RequestLimits(app, most, _most_bytes(models)), keys, RateLimits(models.used_tokens))


def _most_bytes(models: Models) -> int:
    """Return the maximum size of a body: what the context of a single model has room for."""
    if models.catalogue.has_one:
        with models.seen() as ((_, _, served),):
            if served is not None:
                return most_bytes(served.service.context)
    return MAX_BYTES


def _post_routes(models: Models, unknown: UnknownFields, alive_seconds: float) -> Iterator[Route]:
    """Yield the routes of requests with a body."""
    for protocol in PROTOCOLS:
        yield Route(protocol.path, Endpoint(protocol, models, unknown, alive_seconds), methods=["POST"])

    def count(served: Served, body: CountBody, user: str) -> dict[str, Any]:
        return {"input_tokens": len(served.prompts.tokens(body.chat, user))}

    def tokenize(served: Served, body: TokenizeBody, user: str) -> dict[str, Any]:
        tokens = served.prompts.tokens(body.text, user, add_special_tokens=body.add_special_tokens is not False)
        return {"count": len(tokens), "max_model_len": served.service.context, "tokens": tokens}

    def detokenize(served: Served, body: DetokenizeBody, _: str) -> dict[str, Any]:
        return {"prompt": served.service.tokenizer.decode(body.tokens)}

    yield Route(COUNT, BodyEndpoint(models, CountBody, count, unknown), methods=["POST"])
    yield Route(TOKENIZE, BodyEndpoint(models, TokenizeBody, tokenize, unknown), methods=["POST"])
    yield Route(DETOKENIZE, BodyEndpoint(models, DetokenizeBody, detokenize, unknown), methods=["POST"])


def _plain_routes(models: Models) -> Iterator[Route]:
    """Yield the routes of requests without a body."""
    registry, created = registry_of(ServeCollector(models.seen)), int(time.time())

    def cards() -> dict[str, dict[str, Any]]:
        with models.seen() as seen:
            contexts = {
                name: None if served is None else (served.service.context, longest_context(served.service.model.config))
                for name, _, served in seen
            }
        return {
            name: card_of(name, created)
            | {
                "aliases": models.catalogue.aliases_of(name),
                "loaded": lengths is not None,
                "max_model_len": None if lengths is None else lengths[0],
                "trained_context": None if lengths is None else lengths[1],
            }
            for name, lengths in contexts.items()
        }

    def list_models(_: Request) -> Response:  # no coroutine, so Starlette runs it on a thread: it reads folders
        listed = cards()
        names = [*listed, None]
        of_anthropic = {"has_more": False, "first_id": names[0], "last_id": names[-2] if listed else None}
        return JSONResponse({"object": "list", "data": [*listed.values()], **of_anthropic})

    def model(request: Request) -> Response:
        name = models.find(asked := request.path_params["model"])
        if (card := cards().get(name)) is None:
            raise unknown_model(asked)
        return JSONResponse(card)

    def health(_: Request) -> Response:  # the reason of `transformers serve`, whose clients know it
        if models.is_alive:
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
    yield Route(MODELS, list_models)
    yield Route(MODELS + "/{model:path}", model)


def card_of(name: str, created: int) -> dict[str, Any]:
    """Return what lists of models say of a model, in OpenAI's form and in Anthropic's."""
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
