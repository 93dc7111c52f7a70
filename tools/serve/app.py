"""transformers' server of one model, behind the gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import CBWorkerDeadError

from moetier.runtime.daemon.metrics import registry_of
from moetier.runtime.generation.conversation import PLAIN_STOP, PLAIN_TEMPLATE
from moetier.runtime.generation.decoding import ONE_SEQUENCE

from .bounds import Bounds
from .handlers import ChatHandler, OneManager, OneModel, TextHandler
from .middleware import METRICS, MODELS, App, Gate
from .params import FAILED
from .serve_metrics import ServeCollector, exposition
from .serve_refusal import Refusal, refusal_response, unknown_model

JSON_HEADER = "-H 'Content-Type: application/json'"


def application(name: str, model: Any, tokenizer: Any, manager: Any, key: str | None, most: int) -> App:
    """Of a model whose answers come from ``manager``; ``key`` is as in Gate, ``most`` as in Bounds."""
    model.generation_config.update(**ONE_SEQUENCE)
    models, state = OneModel(name, model, tokenizer), OneManager(manager)
    chat = ChatHandler(models, state)
    if not tokenizer.chat_template:
        begins = "{{ bos_token }}" if tokenizer("")["input_ids"] == [tokenizer.bos_token_id] else ""
        tokenizer.chat_template = begins + PLAIN_TEMPLATE
        chat.end_of_turn = PLAIN_STOP
    tokenizer.apply_chat_template = _refusing(tokenizer.apply_chat_template)
    others: Any = None  # handlers of routes that the gate does not let through
    app: FastAPI = build_server(
        model_manager=models,
        chat_handler=chat,
        completion_handler=TextHandler(models, state),
        response_handler=others,
        transcription_handler=others,
        systemone_handler=others,
        generation_state=state,
    )
    _answer_errors(app)

    @app.get(MODELS + "/{model:path}")
    def retrieve(model: str) -> JSONResponse:
        if model != name:
            raise unknown_model(model, name)
        return JSONResponse(models.card())

    tiers = model.tiers
    registry = registry_of(ServeCollector(tiers.manifest.model, tiers.stats, manager.tally))

    @app.get(METRICS)
    def metrics(request: Request) -> Response:  # in a thread: it waits for locks
        content, content_type = exposition(registry, request.headers.get("accept", ""))
        return Response(content, media_type=content_type)

    return Gate(Bounds(app, most), key, manager.over)


def _refusing(apply: Callable[..., Any]) -> Callable[..., Any]:
    """A template raises whatever comes to its mind where messages, tools or what is meant for it do not suit it."""

    def applied(*args: Any, **kwargs: Any) -> Any:
        try:
            return apply(*args, **kwargs)
        except Exception as error:
            message = f"The model's chat template refuses these messages: {str(error).partition(chr(10))[0]}"
            raise Refusal(400, message, param="messages") from None

    return applied


def _answer_errors(app: FastAPI) -> None:
    """As OpenAI's API does."""

    @app.exception_handler(StarletteHTTPException)
    def http(_: Request, error: HTTPException) -> JSONResponse:
        return refusal_response(error)

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type", "")
        said = "The body is not a JSON object."
        if kind.partition(";")[0].strip().lower() != "application/json":
            said = f"The Content-Type is {kind or 'missing'}, not application/json: with curl, give {JSON_HEADER}."
        return refusal_response(Refusal(400, said))

    @app.exception_handler(RecursionError)
    def deep(_: Request, error: RecursionError) -> JSONResponse:
        return refusal_response(Refusal(400, "The body is nested too deeply."))

    @app.exception_handler(Exception)
    def fault(_: Request, error: Exception) -> JSONResponse:  # it is raised again, and the gate logs it
        return refusal_response(Refusal(500, "The request failed; the server's log says why."))

    @app.exception_handler(CBWorkerDeadError)
    def dead(_: Request, error: CBWorkerDeadError) -> JSONResponse:
        return refusal_response(Refusal(503, FAILED))
