"""Schemas of others: most can be compiled, the others are refused at once, and answers are valid by them."""

from __future__ import annotations

import json
import time
from collections import Counter
from decimal import Decimal, InvalidOperation, localcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance", reason='pip install ".[serve]"')
pytest.importorskip("jsonschema", reason="pip install jsonschema")
pytest.importorskip("check_jsonschema", reason="pip install check-jsonschema")
pytest.importorskip("hypothesis_jsonschema", reason="pip install hypothesis-jsonschema")

import jsonschema
import schemas
from agent_model import write_model

import moetier
from moetier.runtime.engine.engine import Engine
from moetier.runtime.engine.grammar import CompiledGrammar, Grammar, GrammarCompiler, GrammarError
from moetier.runtime.engine.sequence import Finish, Request

MAX_TOKENS = 512
TOGETHER = 16  # answers at a time
CLOSING = {"}": 9.0, "]": 9.0, '"': 5.0}  # added to the scores of tokens that begin so: the answers must end
GOES_ON = -9.0  # added to those that are blank


def compiled(compiler: GrammarCompiler, all_: list[Any]) -> list[tuple[Any, CompiledGrammar]]:
    """Those of the schemas that can be compiled. The others are refused within a tenth of a second."""
    found, reasons, slowest = list[tuple[Any, CompiledGrammar]](), Counter[str](), 0.0
    for schema in all_:
        began = time.process_time()
        try:
            found.append((schema, compiler.compile(Grammar.json_schema(schema))))
        except GrammarError as error:
            slowest = max(slowest, time.process_time() - began)
            reasons[error.cause[:90]] += 1
    assert slowest < 0.1
    print(f"{len(found)} of {len(all_)} schemas can be compiled; the others:", *reasons.most_common(20), sep="\n  ")
    return found


@pytest.fixture(scope="module")
def directory(tinymix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights, and so with random tokens."""
    return write_model(tmp_path_factory.mktemp("schemas") / "model", tinymix)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_answers_are_valid_by_schemas_of_others(directory: Path) -> None:
    model, tokenizer = moetier.load(directory, ram="100%", sequences=TOGETHER)
    with model.tiers:
        check_answers(model, tokenizer)


def check_answers(model: Any, tokenizer: Any) -> None:
    all_ = [*schemas.shipped(), *schemas.of_models(200), *schemas.generated(800)]
    assert len(all_) >= 1000
    pairs = compiled(GrammarCompiler(tokenizer), all_)
    assert len(pairs) >= 0.88 * len(all_)
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    biases = {token: CLOSING.get(text[:1], GOES_ON if text.isspace() else 0.0) for token, text in enumerate(texts)}
    decoding = {
        "do_sample": True,
        "temperature": 1.0,
        "logit_bias": {key: value for key, value in biases.items() if value},
    }
    ids = tuple(tokenizer("Chi era don Abbondio?")["input_ids"])
    ended, invalid = 0, list[str]()
    with Engine.of(model, max_sequences=TOGETHER) as engine:
        streams = [
            (schema, grammar, engine.stream(Request(ids, MAX_TOKENS, decoding, seed=number, grammar=grammar)))
            for number, (schema, grammar) in enumerate(pairs)
        ]
        for schema, grammar, stream in streams:
            tokens = [*stream]
            if stream.sequence.finish is Finish.LENGTH:  # it is the beginning of a valid answer
                matcher = grammar.matcher()
                for token in tokens:
                    matcher.consume(token)
                continue
            ended += 1
            text = tokenizer.decode(tokens[:-1])
            if why := fault(schema, text):
                invalid.append(f"{json.dumps(schema)[:300]}: {text[:200]!r}: {why}")
    print(f"{ended} of {len(pairs)} answers have ended; {len(invalid)} are not valid:", *invalid, sep="\n  ")
    assert ended >= 600
    assert len(invalid) <= 0.005 * ended


def exact(number: str) -> Decimal | float:
    """Return a number as it is written: a large float is another number. One that is far too large is infinite."""
    try:
        return Decimal(number)
    except InvalidOperation:
        return float(number)


def fault(schema: Any, text: str) -> str | None:
    """Why a text is not valid by a schema."""
    try:
        value = json.loads(text, parse_float=exact)
    except ValueError as error:
        return str(error)
    schema = json.loads(json.dumps(schema), parse_float=exact)
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)(schema)
    with localcontext(prec=MAX_TOKENS * 30):
        return next((error.message[:200] for error in validator.iter_errors(value)), None)
