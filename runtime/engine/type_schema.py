"""JSON schemas of Python types."""

from __future__ import annotations

import re
from typing import Any, ForwardRef

from moetier.tiers.errors import ConfigError


def schema_of(type_: Any) -> dict[str, Any]:
    """Return the JSON schema of a type that pydantic knows. Objects have no other properties than its fields.

    Raises ConfigError if pydantic is not installed, or can't make a schema of the type.
    """
    if isinstance(type_, str | bytes | ForwardRef):  # pydantic runs them as Python, and they may come from anywhere
        raise ConfigError(
            f"A {type(type_).__name__} can't be a schema: it is only the text of one.",
            "Give a JSON schema as a dictionary (json.loads), or a type that pydantic knows.",
        )
    try:
        from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter
        from pydantic.json_schema import GenerateJsonSchema
    except ImportError:
        raise ConfigError(
            "The schema of a type needs pydantic, which is not installed.",
            'In the repository of moetier, run: pip install ".[serve]"; or give a JSON schema, a dictionary.',
        ) from None

    class Closed(GenerateJsonSchema):
        def model_schema(self, schema: Any) -> dict[str, Any]:
            return {"additionalProperties": False} | super().model_schema(schema)

        def dataclass_schema(self, schema: Any) -> dict[str, Any]:
            return {"additionalProperties": False} | super().dataclass_schema(schema)

        def typed_dict_schema(self, schema: Any) -> dict[str, Any]:
            return {"additionalProperties": False} | super().typed_dict_schema(schema)

    try:
        return TypeAdapter(type_).json_schema(schema_generator=Closed)
    except (PydanticUserError, PydanticSchemaGenerationError) as error:
        said = re.split(r"\.\s|\n", str(error))[0].rstrip(".")
        raise ConfigError(
            f"{type_!r} can't be a schema: {said}.",
            "Give a JSON schema, a model of pydantic, or another type that pydantic knows.",
        ) from None
