"""Answers are what their grammars say, in any company and at any temperature."""

from __future__ import annotations

import json
import math
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ForwardRef, Literal

import pytest
import torch

pytest.importorskip("llguidance", reason='pip install ".[serve]"')

from pydantic import BaseModel, Field, TypeAdapter
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

import moetier
from moetier.runtime.engine import constraint
from moetier.runtime.engine import grammar as grammars
from moetier.runtime.engine.constraint import GrammarProcessor
from moetier.runtime.engine.engine import Engine
from moetier.runtime.engine.grammar import CompiledGrammar, Grammar, GrammarCompiler, GrammarError, Matcher
from moetier.runtime.engine.sampling import NoTokenError, Sampler
from moetier.runtime.engine.sequence import Finish, Request
from moetier.runtime.generation.conversation import PLAIN_TEMPLATE
from moetier.tiers.errors import ConfigError

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CODE = r"(ja|nein/no)[0-9]{2,4}"
NESTED = 'start: "(" (start ",")? /[a-z]{1,5}/ ")"'
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 20, "top_p": 0.9}


@pytest.fixture(scope="module")
def loaded(tinymix_4bit: Path) -> Iterator[tuple[Any, Any]]:
    model, tokenizer = moetier.load(tinymix_4bit, ram="100%")
    yield model, tokenizer
    model.tiers.close()


@pytest.fixture(scope="module")
def compiler(loaded: tuple[Any, Any]) -> GrammarCompiler:
    return GrammarCompiler(loaded[1])


def is_person(text: str) -> bool:
    value = json.loads(text)
    return (
        [*value] == ["name", "age", "tags"]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 20
        and value["age"] in range(151)
        and {*value["tags"]} <= {"a", "b"}
        and len(value["tags"]) <= 3
    )


def test_answers_are_as_their_grammars_say_and_company_changes_none(
    loaded: tuple[Any, Any], compiler: GrammarCompiler
) -> None:
    model, tokenizer = loaded
    ids = tuple(tokenizer("Chi era don Abbondio?")["input_ids"])
    kinds = {
        "schema": compiler.compile(Grammar.json_schema(PERSON)),
        "regex": compiler.compile(Grammar.regex(CODE)),
        "lark": compiler.compile(Grammar.lark(NESTED)),
        "none": None,
    }
    asked = [
        (kind, Request(ids, 200 if grammar else 20, SAMPLED, seed=0, grammar=grammar))
        for kind, grammar in kinds.items()
    ]
    with Engine.of(model, max_sequences=3) as engine:
        streams = [engine.stream(request) for _, request in asked]
        answers = [[*stream] for stream in streams]
        alone = [[*engine.stream(request)] for _, request in asked]
    assert answers == alone
    for (kind, request), stream, answer in zip(asked, streams, answers, strict=True):
        if request.grammar is None:
            continue
        assert (stream.sequence.finish, answer[-1]) == (Finish.END, tokenizer.eos_token_id)
        text = tokenizer.decode(answer[:-1])
        match kind:
            case "schema":
                assert is_person(text)
            case "regex":
                assert re.fullmatch(CODE, text)
            case _:
                assert re.fullmatch(r"(\()+[a-z]{1,5}\)(,[a-z]{1,5}\))*", text)


def test_answers_are_the_same_on_whichever_thread_masks_are_made(
    loaded: tuple[Any, Any], compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    grammar, answers = compiler.compile(Grammar.json_schema(PERSON)), list[list[int]]()
    for most in (0.0, 60.0):
        monkeypatch.setattr(constraint, "QUICK_SECONDS", most)
        with Engine.of(model) as engine:
            answers.append([*engine.stream(Request((5, 6), 200, SAMPLED, seed=4, grammar=grammar))])
    assert answers[0] == answers[1]
    assert is_person(tokenizer.decode(answers[0][:-1]))


def test_generate_has_the_same_answer(loaded: tuple[Any, Any], compiler: GrammarCompiler) -> None:
    model, tokenizer = loaded
    grammar = compiler.compile(Grammar.json_schema(PERSON))
    inputs = tokenizer("Chi era don Abbondio?", return_tensors="pt")
    prompt = inputs["input_ids"][0].tolist()
    with Engine.of(model) as engine:
        answer = [*engine.stream(Request(tuple(prompt), 30, {"do_sample": False}, grammar=grammar))]
    generated = model.generate(
        **inputs, max_new_tokens=30, do_sample=False, logits_processor=[GrammarProcessor(grammar)]
    )
    assert generated[0].tolist() == [*prompt, *answer]


def test_rows_and_beams_of_generate(loaded: tuple[Any, Any], compiler: GrammarCompiler) -> None:
    model, tokenizer = loaded
    grammar = compiler.compile(Grammar.regex(CODE))
    tokenizer.padding_side = "left"
    inputs = tokenizer(["Chi era don Abbondio?", "Lucia"], return_tensors="pt", padding=True)
    for options in {"num_beams": 3}, {"do_sample": True}:
        torch.manual_seed(0)
        rows = model.generate(**inputs, max_new_tokens=20, logits_processor=[GrammarProcessor(grammar)], **options)
        for row in rows[:, inputs["input_ids"].shape[1] :]:
            assert re.fullmatch(CODE, tokenizer.decode(row, skip_special_tokens=True))


class Child(BaseModel):
    name: str = Field(max_length=8)
    kind: Literal["monk", "priest"]


@dataclass
class Parent:
    children: Annotated[list[Child], Field(min_length=1, max_length=2)]
    city: Literal["Lecco"] | None = None


@pytest.mark.parametrize(
    "prompt",
    ["Chi era?", pytest.param([{"role": "user", "content": "Chi era?"}], marks=pytest.mark.slow)],
    ids=["text", "messages"],
)
def test_a_type_is_a_schema(loaded: tuple[Any, Any], prompt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer has no other properties than the fields."""
    model, tokenizer = loaded
    monkeypatch.setattr(tokenizer, "chat_template", PLAIN_TEMPLATE)
    with Engine.of(model) as engine:
        request = moetier.Request.of(tokenizer, prompt, 900, schema=Parent, decoding=SAMPLED, seed=0)
        answer = json.loads(tokenizer.decode([*engine.stream(request)], skip_special_tokens=True))
        assert {*answer} <= {"children", "city"}
        assert all([*child] == ["name", "kind"] for child in answer["children"])
        TypeAdapter(Parent).validate_python(answer)


def test_generate_takes_a_schema(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    inputs = tokenizer("Chi era?", return_tensors="pt")
    processor = GrammarProcessor.of(tokenizer, {"enum": [[1, 2]]})
    ids = model.generate(**inputs, max_new_tokens=20, logits_processor=[processor])[0]
    answer = tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert json.loads(answer) == [1, 2]


@pytest.mark.parametrize("schema", [5, [1, 2], object(), Callable[[], None], "int", b"int", ForwardRef("int")])
def test_what_is_no_schema_is_refused(loaded: tuple[Any, Any], schema: Any) -> None:
    with pytest.raises(ConfigError, match="can't be a schema: "):
        moetier.Request.of(loaded[1], "?", 5, schema=schema)


def test_a_text_is_not_run_as_a_schema(tmp_path: Path) -> None:
    text = f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch() or int"
    for schema in (text, text.encode(), ForwardRef(text)):
        with pytest.raises(ConfigError, match="can't be a schema: "):
            Grammar.json_schema(schema)
    assert not [*tmp_path.iterdir()]


def allowed_by(matcher: Matcher, ends: frozenset[int]) -> list[int]:
    """Return the tokens that may come next."""
    tokens: list[int] = (matcher.bounds(ends) > 0).nonzero().flatten().tolist()
    return tokens


def walk(grammar: CompiledGrammar, seed: int, most: int, ends: frozenset[int]) -> list[int]:
    """Return random tokens that a grammar allows."""
    random_, matcher, tokens = random.Random(seed), grammar.matcher(), list[int]()
    while len(tokens) < most:
        allowed = allowed_by(matcher, ends)
        tokens.append(random_.choice(allowed))
        if tokens[-1] in ends:
            break
        matcher.consume(tokens[-1])
    return tokens


def test_an_answer_that_is_cut_can_be_continued(loaded: tuple[Any, Any], compiler: GrammarCompiler) -> None:
    _, tokenizer = loaded
    grammar, ends = compiler.compile(Grammar.json_schema(PERSON)), frozenset({1})
    special = {*tokenizer.all_special_ids}
    for seed in range(20):
        tokens = walk(grammar, seed, 300, ends)
        assert tokens[-1] == 1
        assert not special & {*tokens[:-1]}
        assert is_person(tokenizer.decode(tokens[:-1]))
        matcher = grammar.matcher()
        for token in tokens[: len(tokens) // 2]:
            matcher.consume(token)
        assert allowed_by(matcher, ends)


def test_a_complete_answer_ends_with_any_token_of_the_end(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(Grammar.regex("a"))
    for ends in frozenset({1}), frozenset({1, 77}):
        matcher = grammar.matcher()
        assert not {*ends} & {*allowed_by(matcher, ends)}
        matcher.consume(walk(grammar, 0, 1, ends)[0])
        assert {*allowed_by(matcher, ends)} == ends
        assert matcher.is_complete


def test_an_answer_without_a_token_of_the_end_ends(loaded: tuple[Any, Any], compiler: GrammarCompiler) -> None:
    model, tokenizer = loaded
    decoding = {"do_sample": False, "eos_token_id": None}
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        with Engine.of(model) as engine:
            stream = engine.stream(Request((5, 6), 50, decoding, grammar=compiler.compile(Grammar.regex("[a-c]{7}"))))
            text = tokenizer.decode([*stream])
    finally:
        model.generation_config.eos_token_id = before
    assert re.fullmatch("[a-c]{7}", text)
    assert stream.sequence.finish is Finish.END


def test_a_grammar_that_fails_ends_only_its_own_sequence(loaded: tuple[Any, Any], compiler: GrammarCompiler) -> None:
    """The options of one request never allow the only token that its grammar does."""
    model, _ = loaded
    grammar = compiler.compile(Grammar.regex("a"))
    letter = walk(grammar, 0, 1, frozenset())[0]
    with Engine.of(model, max_sequences=3) as engine:
        other = engine.stream(Request((5, 6), 40, {"do_sample": False}))
        bad = [
            engine.stream(Request((5, 6), 40, {"suppress_tokens": [letter], **options}, seed=1, grammar=grammar))
            for options in ({"do_sample": False}, {"do_sample": True})
        ]
        for stream in bad:
            with pytest.raises(NoTokenError):
                tuple(stream)
            assert stream.sequence.finish is Finish.FAILED
        assert len([*other]) > 0
        assert other.sequence.finish in (Finish.END, Finish.LENGTH)
        assert engine.is_alive


@pytest.mark.parametrize("samples", [False, True])
def test_scores_that_are_no_numbers_choose_nothing(samples: bool) -> None:
    """Not even a token that is allowed: the weights of the model are wrong, or its numbers overflow."""
    sampler = Sampler([5], lambda _, scores: scores, samples=samples)
    assert sampler(torch.tensor([0.0, 1000.0])).token == 1
    for scores in [0.0, math.nan], [-math.inf, -math.inf]:
        with pytest.raises(NoTokenError):
            sampler(torch.tensor(scores))


def test_answers_that_are_cancelled_leave_the_others(loaded: tuple[Any, Any], compiler: GrammarCompiler) -> None:
    model, tokenizer = loaded
    grammar = compiler.compile(Grammar.json_schema(PERSON))
    with Engine.of(model, max_sequences=4) as engine:
        wanted = [*engine.stream(Request((5, 6), 200, SAMPLED, seed=3, grammar=grammar))]
        kept = engine.stream(Request((5, 6), 200, SAMPLED, seed=3, grammar=grammar))
        for seed in range(3):
            stream = engine.stream(Request((5, 6, seed), 200, SAMPLED, seed=seed, grammar=grammar))
            for count, _ in enumerate(stream):
                if count == seed:
                    break
        assert [*kept] == wanted
        assert is_person(tokenizer.decode(wanted[:-1]))


def combinations(branches: int, parts: int) -> dict[str, Any]:
    """A schema whose parts may be combined in ``branches`` to the power of ``parts`` ways."""
    return {
        "allOf": [
            {
                "anyOf": [
                    {"type": "object", "properties": {f"{a}.{b}": {}}, "required": [f"{a}.{b}"]}
                    for b in range(branches)
                ]
            }
            for a in range(parts)
        ]
    }


def chain(links: int, **more: Any) -> dict[str, Any]:
    """A schema of references that lead to each other."""
    defs: dict[str, Any] = {f"d{at}": {"$ref": f"#/$defs/d{at + 1}"} | more for at in range(links)}
    return {"$defs": defs | {f"d{links}": {"type": "null"}}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (Grammar.json_schema({"type": "strin"}), "Invalid type"),
        (Grammar.json_schema({"not": {"type": "string"}}), 'Unimplemented keys: \\["not"\\]'),
        (Grammar.json_schema(False), "not"),
        (Grammar.json_schema({"$ref": "#/no"}), "does not exist"),
        (Grammar.json_schema({"$ref": "https://example.com/schema"}), "not present"),
        (Grammar.json_schema({"$ref": "#"}), "."),
        (Grammar.json_schema({"type": "string", "pattern": "(?=a)b"}), "look-around|regex"),
        (Grammar.json_schema({"allOf": [{"type": "string"}, {"type": "null"}]}), "Unsatisfiable"),
        (Grammar.json_schema(combinations(10, 8)), "large"),
        (Grammar.json_schema(combinations(5, 5)), "too big"),
        (Grammar.json_schema(chain(6000)), "more than 5,000 JSON objects"),
        (Grammar.json_schema({"type": "integer", "multipleOf": 999_983}), "remainders"),
        (Grammar.json_schema({"multipleOf": 0.000030517578125}), "remainders"),
        (Grammar.json_schema({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}), "remainders"),
        (Grammar.json_schema({"multipleOf": 997, "anyOf": [{"multipleOf": 991}]}), "remainders"),
        (Grammar.json_schema({"multipleOf": float("inf")}), "."),
        (Grammar.json_schema({"enum": ["x" * grammars.MAX_LETTERS]}), "letters"),
        (Grammar.regex("(" * 5000 + ")" * 5000), "."),
        (Grammar.regex("(a"), "regex"),
        (Grammar.lark("start: " + "(" * 400 + '"a"' + ")" * 400), "nested"),
        (Grammar.lark("".join(f"r{at}: r{at + 1}\n" for at in range(20_000))), "rules"),
        (
            Grammar.lark('start: %regex {"substring_chars": "' + "x" * grammars.MAX_REGEX_LETTERS + '"}'),
            "beside %regex",
        ),
        (Grammar.lark("start: a"), "."),
        (Grammar.lark("\0"), "."),
        (Grammar.lark("start: @missing"), "missing"),
    ],
)
def test_what_cannot_be_compiled_is_refused_at_once(compiler: GrammarCompiler, grammar: Grammar, said: str) -> None:
    taken = []
    for _ in range(3):
        began = time.process_time()  # the machine may have other work
        with pytest.raises(GrammarError, match=said) as raised:
            compiler.compile(grammar)
        taken.append(time.process_time() - began)
    assert len(str(raised.value)) < 500
    assert min(taken) < 0.1


@pytest.mark.parametrize("make", [Grammar.regex, Grammar.lark])
def test_a_text_that_is_far_too_long_is_not_even_read(make: Any) -> None:
    """llguidance would read it for minutes."""
    with pytest.raises(GrammarError, match="letters"):
        make("\\" * (16 << 20))


@pytest.mark.parametrize(
    "schema",
    [
        chain(4000),
        chain(2000, type=["object", "array", "null"]),
        {"properties": {str(at): {"type": "string"} for at in range(1000)}, "type": "object"},
        {"enum": [f"value {at}" for at in range(5000)]},
        {"type": "integer", "multipleOf": 9973},
        {"properties": {"a": {"multipleOf": 0.01}, "b": {"multipleOf": 1009}, "c": {"multipleOf": 1013}}},
        {"type": "string", "pattern": "^(a|b)*a(a|b){300}$"},
        {"type": "string", "maxLength": 10**9},
        True,
    ],
)
def test_large_schemas_can_be_used(compiler: GrammarCompiler, schema: Any) -> None:
    """A chain of references needs more stack than a thread usually has."""
    walk(compiler.compile(Grammar.json_schema(schema)), 0, 20, frozenset({1}))


def test_a_lenient_schema_ignores_what_is_not_known(compiler: GrammarCompiler) -> None:
    schema = {"type": "array", "items": {"enum": [5]}, "uniqueItems": True, "minItems": 2, "maxItems": 2}
    with pytest.raises(GrammarError, match="uniqueItems"):
        compiler.compile(Grammar.json_schema(schema))
    compiler.compile(Grammar.json_schema(schema, lenient=True))


def test_a_lark_grammar_may_have_parts(loaded: tuple[Any, Any], compiler: GrammarCompiler) -> None:
    parts = {"answer": Grammar.json_schema({"const": 5}), "code": Grammar.regex("[ab]")}
    grammar = compiler.compile(Grammar.lark('start: "x" @answer @code', parts))
    assert loaded[1].decode(walk(grammar, 0, 9, frozenset({1}))[:-1]) in ("x5a", "x5b")


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (Grammar.lark('start: "%json" /%json/ // %json\n'), "%json%json"),
        (Grammar.lark(r'start: "\\" "\"%json" # "%json'), '\\"%json'),
        (Grammar.regex(r"\%json{2}\\[%]json"), r"%jsonn\%json"),
    ],
)
def test_the_name_of_a_directive_may_be_text(
    loaded: tuple[Any, Any], compiler: GrammarCompiler, grammar: Grammar, text: str
) -> None:
    assert loaded[1].decode(walk(compiler.compile(grammar), 0, 20, frozenset({1}))[:-1]) == text


def test_the_name_of_a_directive_may_be_in_another(loaded: tuple[Any, Any], compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(Grammar.lark('start: "x" %regex {"substring_chunks": ["%json"]} "y"'))
    answers = {loaded[1].decode(walk(grammar, seed, 20, frozenset({1}))[:-1]) for seed in range(20)}
    assert answers == {"xy", "x%jsony"}


@pytest.mark.parametrize("before", [r'"\\"', '/"/', '"a"i', "/\\//", '"//"', '/[^"]/', '"" #"\n|'])
def test_a_directive_behind_text_is_refused(compiler: GrammarCompiler, before: str) -> None:
    with pytest.raises(GrammarError):
        compiler.compile(Grammar.lark(f'start: {before} %json {{"multipleOf": 999983}}'))


def test_a_tokenizer_must_be_a_fast_one() -> None:
    with pytest.raises(ConfigError, match="no fast tokenizer"):
        GrammarCompiler(object())


def test_messages_are_asked_by_the_chat_template(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = loaded[1]
    monkeypatch.setattr(tokenizer, "chat_template", PLAIN_TEMPLATE)
    messages = [{"role": "user", "content": "Chi era?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    request = moetier.Request.of(tokenizer, messages, 5)
    assert [*request.ids] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "Chi era?" in tokenizer.decode(request.ids)


class City(TypedDict):
    name: str


def test_a_dictionary_with_fields_is_a_schema_without_others() -> None:
    schema = json.loads(Grammar.json_schema(City).definition)["json_schema"]
    assert schema["additionalProperties"] is False
    assert {*schema["properties"]} == {"name"}


def test_what_is_not_installed_is_named(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llguidance", "pydantic"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="need llguidance, which is not installed") as caught:
        GrammarCompiler(loaded[1])
    assert '".[serve]"' in caught.value.fix
    with pytest.raises(ConfigError, match="needs pydantic, which is not installed") as caught:
        Grammar.json_schema(City)
    assert "give a JSON schema" in caught.value.fix
