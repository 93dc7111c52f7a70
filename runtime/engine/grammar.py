"""Grammars of answers: compiled by llguidance, and matched token by token."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, TypeGuard

from moetier.tiers.errors import ConfigError, MoetierError
from moetier.tiers.threads import start_thread

from .type_schema import schema_of

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from torch import Tensor

# Limits of grammars, which may come from clients. What they allow is compiled or refused in about a tenth of a second.
MAX_PATTERN_LETTERS = 1 << 16  # of a regular expression
MAX_REGEX_LETTERS = 10_000  # of a Lark grammar with %regex, of which each letter may be many states
MAX_LETTERS = 1 << 20  # of a grammar with its parts
MAX_OBJECTS = 5_000  # of a schema
MAX_RULES = 5_000  # of a Lark grammar, counted as colons and opening brackets
MAX_SYMBOLS = 10_000  # of a compiled grammar: the slowest mask takes about 10 ms
MAX_REMAINDERS = 10_000  # llguidance makes a state for each remainder of a division by `multipleOf`
MAX_ITEMS = 5_000  # of the parser at a place: a schema with 1,000 optional properties has 4,000
STACK_BYTES = 256 << 20  # llguidance compiles chains of references recursively, in about 8 KiB each

# white space between two tokens of JSON: models may otherwise write it without an end
BLANKS = r"\x20|\r?\n[\x20\t]{0,40}"
END = "<|moetier: the answer may end here|>"  # a token for llguidance only
_LITERALS = re.compile(r'"(?:\\.?|[^"\\])*+(?:"|\Z)|//[^\n]*|/(?:\\.?|[^/\\])++(?:/|\Z)|#[^\n]*', re.DOTALL)  # of Lark
SAID_LETTERS = 200  # of an error of llguidance, which may quote all of a grammar

_stack_size = threading.Lock()  # held while new threads get larger stacks


class GrammarError(MoetierError):
    """A grammar can't be compiled, or an answer can't be continued as its grammar says."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """The texts that an answer may be.

    Attributes:
        definition: one grammar in llguidance's JSON.
        parts: names and definitions of further ones; ``@name`` in a Lark grammar stands for a part.
    """

    definition: str
    parts: tuple[tuple[str, str], ...] = ()

    @classmethod
    def json_schema(cls, schema: Any, *, lenient: bool = False) -> Grammar:
        """Return the grammar of JSON that is valid by a schema. Properties come in the schema's order.

        ``schema`` is a JSON schema, or a type that pydantic knows: a model, a dataclass, ``list[int]``. An answer by
        such a type has no other properties than its fields. A ``lenient`` grammar ignores keywords that llguidance does
        not know, and treats ``oneOf`` as ``anyOf``. So it allows answers that are not valid.

        Raises ConfigError if pydantic is not installed, or can't make a schema of the type.
        """
        options = {"whitespace_pattern": BLANKS, "lenient": lenient, "coerce_one_of": lenient}
        if not isinstance(schema, Mapping | bool):
            schema = schema_of(schema)
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        return cls(json.dumps({"json_schema": {**schema, "x-guidance": options}}))

    @classmethod
    def json_object(cls) -> Grammar:
        """Return the grammar of all JSON objects."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Return the grammar of the texts that a regular expression, in the syntax of Rust, matches as a whole.

        Raises ConfigError if llguidance is not installed, and GrammarError if the expression is too long.
        """
        if len(pattern) > MAX_PATTERN_LETTERS:
            raise _too_large(f"a regular expression of more than {MAX_PATTERN_LETTERS:,} letters")
        return cls.lark(f"start: /{_llguidance().regex_to_lark(pattern, '')}/")

    @classmethod
    def lark(cls, text: str, parts: Mapping[str, Grammar] | None = None) -> Grammar:
        """Return a grammar in llguidance's variant of Lark. ``@name`` in it stands for one of ``parts``.

        Raises GrammarError if it is too long.
        """
        if len(text) > MAX_LETTERS:
            raise _too_large(f"more than {MAX_LETTERS:,} letters")
        assert not any(part.parts for part in (parts or {}).values())
        named = tuple((name, part.definition) for name, part in (parts or {}).items())
        return cls(json.dumps({"lark_grammar": _LITERALS.sub(_without_percent, text)}), named)

    @property
    def text(self) -> str:
        """The grammar with its parts, as llguidance takes it."""
        named = (f'{{"name": {json.dumps(name)}, {part[1:]}' for name, part in self.parts)
        return f'{{"grammars": [{", ".join((self.definition, *named))}]}}'


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: Any) -> None:
        """Compile for a fast tokenizer of transformers. For the first grammar, llguidance's own is made from it.

        Raises ConfigError if llguidance is not installed, or the tokenizer is not a fast one.
        """
        _llguidance()
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise ConfigError(
                f"{type(tokenizer).__name__} is no fast tokenizer, which grammars need.",
                "Add a tokenizer.json to the model directory.",
            )
        self._source = tokenizer
        self._making = threading.Lock()  # guards: ``_made``
        self._made: tuple[LLTokenizer, int] | GrammarError | None = None

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Return a compiled grammar.

        Raises GrammarError if it is too large, llguidance can't compile it, or it allows no answer.
        """
        text = grammar.text
        _check_size(grammar)
        tokenizer, end = self._tokenizer()
        limits = _llguidance().LLParserLimits(
            max_grammar_size=MAX_SYMBOLS, max_items_in_row=MAX_ITEMS, verbose_errors=False
        )
        found = _on_large_stack(lambda: _llguidance().LLMatcher(tokenizer, text, log_level=0, limits=limits))
        own_end = self._source.eos_token_id
        compiled = CompiledGrammar(found, end, frozenset() if own_end is None else frozenset([own_end]))
        compiled.matcher().bounds({end})
        return compiled

    def marks(self) -> dict[str, int]:
        """Return the ids of special tokens by their texts. Grammars name them by id, as no text matches them."""
        tokenizer, _ = self._tokenizer()
        added = self._source.added_tokens_decoder
        return {token.content: number for number, token in added.items() if tokenizer.is_special_token(number)}

    def _tokenizer(self) -> tuple[LLTokenizer, int]:
        """Return llguidance's tokenizer, and the id of END. Raises GrammarError if it can't be made."""
        with self._making:
            if self._made is None:
                try:
                    self._made = _tokenizer_of(self._source.backend_tokenizer)
                except ValueError as error:
                    cause = f"llguidance can't use the model's tokenizer: {_line(error)}."
                    self._made = GrammarError(cause, "Ask for answers of any form.")
            if isinstance(self._made, GrammarError):
                raise self._made.fresh()
            return self._made


@lru_cache(4)
def compiler_of(tokenizer: Any) -> GrammarCompiler:
    """Return the compiler of a tokenizer, made at the first call. Raises as ``GrammarCompiler``."""
    return GrammarCompiler(tokenizer)


class CompiledGrammar:
    """A grammar for one tokenizer. Any number of answers may have it at a time."""

    def __init__(self, matcher: LLMatcher, end: int, ends: frozenset[int]) -> None:
        """Keep a matcher as it is before the first token. Raises GrammarError if it has failed.

        Args:
            matcher: llguidance's matcher for the grammar and the tokenizer.
            end: the id of the token END, which llguidance chooses at the end of an answer.
            ends: ids of the tokens that end an answer for the model.
        """
        _check(matcher)
        self.ends = ends
        self._matcher = matcher
        self._end = end

    def matcher(self) -> Matcher:
        """Return a matcher for one answer."""
        return Matcher(self._matcher.deep_copy(), self._end)


class Matcher:
    """Matches one answer with a grammar. For one thread at a time."""

    def __init__(self, matcher: LLMatcher, end: int) -> None:
        """``end`` is the id of END."""
        self._matcher = matcher
        self._end = end
        self._bounds: Any = None  # numpy array, float32 [bytes, 8]

    @property
    def is_complete(self) -> bool:
        """Whether the answer is complete, and no text can follow."""
        return self._matcher.is_stopped()

    def consume(self, token: int) -> None:
        """Match the next token. Raises GrammarError if the grammar does not allow it."""
        self._matcher.consume_token(token)
        _check(self._matcher)

    def bounds(self, ends: Collection[int]) -> Tensor:
        """Return upper bounds of the tokens' scores, float32 [tokens]: inf for those that may come next, or -inf.

        Tokens of ``ends``, which end the answer, may come where the answer may end, and nowhere else. The tensor is
        used again by the next call. Raises GrammarError if no token may come, or llguidance has reached one of its
        limits.
        """
        import numpy as np
        import torch

        mask = bytearray(self._matcher.compute_bitmask())
        _check(self._matcher)
        may_end = mask[self._end // 8] >> self._end % 8 & 1
        for token, is_allowed in (self._end, 0), *((end, may_end) for end in ends):
            mask[token // 8] = mask[token // 8] & ~(1 << token % 8) | is_allowed << token % 8
        bits = np.frombuffer(mask, np.uint8)
        if not bits.any():
            raise GrammarError("The grammar allows none of the model's tokens here.", "Change the grammar.")
        if self._bounds is None:
            self._bounds = np.empty((len(bits), 8), np.float32)
        np.take(_bounds_of_bytes(), bits, axis=0, out=self._bounds, mode="clip")
        return torch.from_numpy(self._bounds.reshape(-1))


@cache
def _bounds_of_bytes() -> Any:
    """Return the bounds of eight tokens for each byte of llguidance's masks, float32 [256, 8]."""
    import numpy as np

    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits, np.float32(np.inf), np.float32(-np.inf))


def _without_percent(literal: re.Match[str]) -> str:
    """Return a string, regular expression or comment of Lark, with %json written in another way: it is only text.

    Strings of JSON, which follow %regex, have this escape, too.
    """
    return re.sub(r"\\.|%(?=json)", lambda part: r"\u0025" if part[0] in ("%", r"\%") else part[0], literal[0])


def _llguidance() -> Any:
    """Return the module. Raises ConfigError if it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise ConfigError(
            "Grammars and schemas of answers need llguidance, which is not installed.",
            'In the repository of moetier, run: pip install ".[serve]"',
        ) from None
    return llguidance


def _check(matcher: LLMatcher) -> None:
    """Raise GrammarError if llguidance's matcher has failed."""
    if error := matcher.get_error():
        raise GrammarError(f"llguidance can't use the grammar: {_line(error)}.", "Change the grammar.")


def _line(error: object) -> str:
    """Return the beginning of an error of llguidance in one line, without its period."""
    return " ".join(str(error).split())[:SAID_LETTERS].rstrip(".")


def _tokenizer_of(source: Any) -> tuple[LLTokenizer, int]:
    """Return llguidance's tokenizer for one of the library tokenizers, and the id of END. Raises ValueError."""
    from tokenizers import Tokenizer

    copied = Tokenizer.from_str(source.to_str())
    copied.no_padding()
    copied.no_truncation()
    copied.add_special_tokens([END])
    end = copied.token_to_id(END)
    assert end is not None
    return _llguidance().LLTokenizer(copied.to_str(), eos_token=end), end


def _on_large_stack(compiled: Callable[[], LLMatcher]) -> LLMatcher:
    """Return what a function returns on a thread of its own, whose stack has STACK_BYTES."""
    result = Future[Any]()

    def run() -> None:
        try:
            result.set_result(compiled())
        except BaseException as error:  # the caller gets a panic of llguidance, too
            result.set_exception(error)

    with _stack_size:
        usual = threading.stack_size(STACK_BYTES)
        try:
            thread = start_thread("moetier-grammar", run, daemon=False)
        finally:
            threading.stack_size(usual)
    thread.join()
    return result.result()


# -- limits ------------------------------------------------------------------------------------------------------------


def _check_size(grammar: Grammar) -> None:
    """Raise GrammarError for a grammar that would take too long to compile."""
    if len(grammar.text) > MAX_LETTERS:
        raise _too_large(f"more than {MAX_LETTERS:,} letters")
    for definition in (grammar.definition, *(part for _, part in grammar.parts)):
        found = json.loads(definition)
        if "json_schema" in found:
            _check_schema(found["json_schema"])
        elif sum(map(found["lark_grammar"].count, ":([{")) > MAX_RULES:
            raise _too_large(f"more than {MAX_RULES:,} rules")
        elif "%regex" in found["lark_grammar"] and len(found["lark_grammar"]) > MAX_REGEX_LETTERS:
            raise _too_large(f"more than {MAX_REGEX_LETTERS:,} letters beside %regex")
        elif "%json" in found["lark_grammar"]:  # which has no limits
            raise GrammarError("A Lark grammar has %json.", "Give the schema as a part of the grammar, or alone.")


def _check_schema(schema: Mapping[str, Any]) -> None:
    objects = [*_objects(schema)]
    if len(objects) > MAX_OBJECTS:
        raise _too_large(f"more than {MAX_OBJECTS:,} JSON objects")
    divisors = [value for each in objects if _is_divisor(value := each.get("multipleOf"))]
    states = [_remainders([divisor]) for divisor in divisors]
    # keywords that are side by side hold together
    if any("allOf" in each or len(each.keys() & {"multipleOf", "anyOf", "oneOf", "$ref"}) > 1 for each in objects):
        states.append(_remainders(divisors))
    if max(states, default=0) > MAX_REMAINDERS:
        raise _too_large(f"more than {MAX_REMAINDERS:,} remainders of multipleOf")


def _objects(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Yield all JSON objects in a schema."""
    rest = [schema]
    while rest:
        value = rest.pop()
        if isinstance(value, Mapping):
            yield value
            rest.extend(value.values())
        elif isinstance(value, list):
            rest.extend(value)


def _is_divisor(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _remainders(divisors: Collection[float]) -> int:
    """Return the number of states that a check for divisibility by all of ``divisors`` needs: one per remainder."""
    written = [Decimal(repr(divisor)).as_tuple() for divisor in divisors]
    digits = [int("".join(map(str, each.digits))) for each in written]
    if len(divisors) == 1:  # zeros at the end need no state
        return int(str(digits[0]).rstrip("0"))
    places = min((int(each.exponent) for each in written), default=0)
    whole = (each * 10 ** (int(number.exponent) - places) for each, number in zip(digits, written, strict=True))
    return math.lcm(*whole)


def _too_large(reason: str) -> GrammarError:
    return GrammarError(f"The grammar is too large: it has {reason}.", "Give a smaller grammar.")
