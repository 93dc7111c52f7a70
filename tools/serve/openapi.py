"""Description of the server's routes in the form of OpenAPI, made from the models of bodies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from pydantic.json_schema import models_json_schema

from .protocols.body import Body

REF = "#/components/schemas/{model}"
STATUSES = {
    "400": "The request is not valid, or not supported.",
    "401": "The API key is missing or wrong.",
    "404": "The server has no such model.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "429": "Too many requests wait, or the API key has used up what it may.",
    "500": "The answer failed.",
    "503": "The server is shutting down, or can't load the model, or can't compute any more.",
    "507": "The model does not fit into memory.",
}


def description_of(bodies: Mapping[str, type[Body]], others: Iterable[str]) -> dict[str, Any]:
    """Return the description of a server.

    Args:
        bodies: the bodies of POST requests, by their routes.
        others: routes of GET requests.
    """
    references, schemas = models_json_schema(
        [(body, "validation") for body in dict.fromkeys(bodies.values())], ref_template=REF
    )
    refused = {status: {"description": meaning} for status, meaning in STATUSES.items()}
    paths = {
        route: {
            "post": {
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": references[body, "validation"]}},
                },
                "responses": {"200": {"description": "The answer."}, **refused},
            }
        }
        for route, body in bodies.items()
    }
    seen = {"get": {"responses": {"200": {"description": "The answer."}, **refused}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "moetier", "version": version("moetier")},
        "paths": {**paths, **dict.fromkeys(others, seen)},
        "components": {
            "schemas": schemas.get("$defs", {}),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"bearer": []}, {"key": []}],
    }
