"""JSON schemas: those that check-jsonschema ships, of pydantic models, and what hypothesis-jsonschema makes."""

from __future__ import annotations

import datetime
import enum
import importlib.resources
import json
import random
import uuid
import warnings
from typing import Any, Literal, Optional, Union

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, create_model

NAMES = ["a", "b", "name", "size", "tags", 'é "x"']


def shipped() -> list[Any]:
    """The schemas of programs' settings in the package check-jsonschema."""
    folder = importlib.resources.files("check_jsonschema") / "builtin_schemas"
    files = [file for part in ("custom", "vendor") for file in (folder / part).iterdir() if file.name.endswith(".json")]
    return [json.loads(file.read_text("utf-8")) for file in sorted(files, key=lambda file: file.name)]


# -- pydantic ----------------------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    """Something to choose from."""

    RED = "red"
    BLUE = "blue"


LEAVES: list[Any] = [
    *(str, int, float, bool, None, Colour, datetime.date, datetime.datetime, datetime.time, uuid.UUID),
    *(Literal["x", "y"], Literal[1, 2], dict[str, int], list[str], tuple[int, str], Any),
]


def of_models(count: int) -> list[Any]:
    """Schemas of ``count`` models with random fields."""
    return [_model(random.Random(number), 2, f"Model{number}").model_json_schema() for number in range(count)]


def _model(random_: random.Random, depth: int, name: str) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for at in range(random_.randrange(1, 5)):
        kind, limits = _kind(random_, depth, f"{name}_{at}")
        fields[f"field_{at}"] = (kind, Field(**limits) if random_.random() < 0.7 else Field(default=None, **limits))
    return create_model(name, **fields)


def _kind(random_: random.Random, depth: int, name: str) -> tuple[Any, dict[str, Any]]:
    match random_.randrange(8):
        case 0 if depth:
            return _model(random_, depth - 1, name), {}
        case 1 if depth:
            return list[_model(random_, depth - 1, name)], {"max_length": random_.randrange(1, 4)}  # type: ignore[misc]
        case 2 if depth:
            models = tuple(_model(random_, depth - 1, f"{name}{part}") for part in "xy")
            return Union[models], {}  # noqa: UP007
        case 3 if random_.random() < 0.1:
            return set[int], {}
        case 3:
            return Optional[random_.choice(LEAVES)], {}  # noqa: UP045
        case 4:
            return str, {"min_length": random_.randrange(3), "max_length": random_.randrange(3, 30)}
        case 5:
            return int, {"ge": random_.randrange(-100, 5), "lt": random_.randrange(10, 1000)}
        case 6:
            return str, {"pattern": random_.choice(["^[a-z]+$", r"^\d{3}-\d{2}$", "x", "^(a|b)*c"])}
    return random_.choice(LEAVES), {"description": "What it is."}


# -- hypothesis-jsonschema ---------------------------------------------------------------------------------------------


def generated(count: int) -> list[Any]:
    """``count`` different schemas, always the same, whose parts are valid by schemas of schemas."""
    from hypothesis.internal.conjecture.utils import many

    if not hasattr(many, "more"):  # hypothesis-jsonschema is older than hypothesis's present loop of elements
        many.more = _more  # type: ignore[attr-defined]
    found: dict[str, Any] = {}

    @seed(33)
    @settings(
        max_examples=2 * count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],
    )  # fmt: skip
    @given(_schemas(2))
    def note(schema: Any) -> None:
        found.setdefault(json.dumps(schema, sort_keys=True), schema)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        note()
    return [*found.values()][:count]


def _more(elements: Any) -> bool:
    """Whether there is another element."""
    if not hasattr(elements, "rest"):
        elements.rest = iter(elements.__enter__())
    return next(elements.rest, elements) is None


def _keywords(*needed: str, **keywords: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Schemas with keywords that are valid by the given schemas; the needed ones, and any of the others."""
    from hypothesis_jsonschema import from_schema

    schema = {"type": "object", "properties": keywords, "required": [*needed], "additionalProperties": False}
    found: st.SearchStrategy[dict[str, Any]] = from_schema(schema)
    return found


def _numbers(least: int, most: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": least, "maximum": most}


def _schemas(depth: int) -> st.SearchStrategy[dict[str, Any]]:
    """Schemas in which up to ``depth`` are inside each other."""
    string, integer, number, array = ({"const": name} for name in ("string", "integer", "number", "array"))
    leaves = [
        _keywords("type", type=string, minLength=_numbers(0, 4), maxLength=_numbers(4, 30)),
        _keywords("type", "pattern", type=string, pattern={"enum": ["^a+$", "[0-9]{2}", "^(x|yy)*$"]}),
        _keywords("type", "format", type=string, format={"enum": ["date", "date-time", "uuid", "email", "ipv4"]}),
        _keywords("type", type=integer, minimum=_numbers(-50, 0), maximum=_numbers(1, 1000)),
        _keywords("type", type=integer, exclusiveMinimum=_numbers(0, 9), multipleOf=_numbers(1, 9)),
        _keywords("type", type=number, minimum=_numbers(-9, 0), exclusiveMaximum=_numbers(1, 99)),
        _keywords("type", type={"enum": ["boolean", "null", ["string", "null"], ["integer", "boolean"]]}),
        _keywords("enum", enum={"type": "array", "minItems": 1, "maxItems": 4, "items": {"type": "string"}}),
        _keywords("const", const={"type": ["string", "boolean", "null", "number"]}),
    ]
    if not depth:
        return st.one_of(leaves)
    inner = _schemas(depth - 1)
    some = st.lists(inner, min_size=1, max_size=3)
    objects = st.builds(
        lambda properties, needed, more: {
            "type": "object",
            "properties": properties,
            "required": [name for name in properties if name in needed],
            "additionalProperties": more,
        },
        st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
        st.sets(st.sampled_from(NAMES)),
        st.booleans(),
    )
    limits = _keywords(minItems=_numbers(0, 2), maxItems=_numbers(2, 4))
    lists = st.builds(lambda items, limits: {"type": "array", "items": items, **limits}, inner, limits)
    others = [
        st.builds(lambda items: {"type": "array", "prefixItems": items, "items": False}, some),
        st.builds(lambda items: {"type": "object", "additionalProperties": items}, inner),
        st.builds(lambda choices: {"anyOf": choices}, some),
        st.builds(lambda part, more: {"allOf": [part, more]}, inner, st.sampled_from([{}, {"title": "x"}])),
    ]
    rare = [
        st.builds(lambda choices: {"oneOf": choices}, some),
        st.builds(lambda not_: {"not": not_}, inner),
        _keywords("type", "uniqueItems", type=array, uniqueItems={"type": "boolean"}, maxItems=_numbers(0, 3)),
    ]
    variants = [*leaves, *rare, *[objects] * 8, *[lists] * 8, *others * 3]
    return st.integers(0, len(variants) - 1).flatmap(variants.__getitem__)  # one_of would choose each as often
