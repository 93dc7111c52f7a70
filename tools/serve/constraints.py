"""Chooses what an answer may be by what a request asks for, and compiles it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.chat_parsing.response_templates import ResponseTemplate

from moetier.runtime.engine.grammar import CompiledGrammar, Grammar, GrammarCompiler, GrammarError

from .answer_grammar import ANY_OBJECT, AnswerGrammar, arguments_of
from .call_syntax import syntax_of
from .protocols.query import AnswerFormat, ChatPrompt
from .protocols.refusal import Refusal

MAX_TRIED = 128  # functions whose schemas are compiled one by one, in up to a tenth of a second each
_log = logging.getLogger(__name__)


class Constraints:
    """Makes the grammars of answers of one model."""

    def __init__(self, tokenizer: Any, template: ResponseTemplate | None) -> None:
        """``template`` says how the model writes reasoning and tool calls; None: that is not known.

        Raises ConfigError if llguidance is not installed.
        """
        self._compiler = GrammarCompiler(tokenizer)
        self._template = template
        self._syntax = None if template is None else syntax_of(template)

    def of_text(self, form: AnswerFormat | None) -> CompiledGrammar | None:
        """Return the grammar of an answer to a text; None if it may be anything.

        Raises Refusal if the grammar can't be compiled.
        """
        if form is None:
            return None
        try:
            return self._compiler.compile(form.grammar)
        except GrammarError as error:
            raise _refusal(form.field, error) from None

    def of_dialogue(
        self, chat: ChatPrompt, form: AnswerFormat | None, *, one_call: bool, region: str | None
    ) -> CompiledGrammar | None:
        """Return the grammar of an answer in a chat; None if it may be anything.

        Args:
            chat: says which tools may and must be called.
            form: what the answer's text must be.
            one_call: whether the answer has at most one call.
            region: the field of the template that the prompt has begun, if any.

        Raises Refusal if the grammar can't be compiled, or calls are demanded and it is not known how they are written.
        """
        syntax, must_call = self._syntax, chat.must_call
        functions = [tool["function"] for tool in chat.tools or ()]
        if must_call:
            if syntax is None:
                message = "tool_choice: it is not known how this model writes tool calls, so they can't be demanded."
                raise Refusal(400, message, param="tool_choice")
            functions = [function for function in functions if function["name"] in must_call]
            form = None
        elif syntax is None:
            functions = []
        if not functions and form is None:
            return None

        def written(functions: Sequence[Mapping[str, Any]]) -> Grammar:
            answers = AnswerGrammar(self._template, self._compiler.marks())
            if syntax is not None and not must_call and form is None:
                return answers.free(region, syntax, functions)
            return answers.formed(region, None if form is None else form.grammar, syntax, functions, one_call=one_call)

        if functions:
            try:
                return self._compiler.compile(written(functions))
            except GrammarError as error:
                functions = self._known(functions, error)
        try:
            return self._compiler.compile(written(functions))
        except GrammarError as error:
            if form is None and not must_call:
                _log.info("an answer's tool calls may have any arguments: %s", error.cause)
                return None
            raise _refusal("tools" if form is None else form.field, error) from None

    def _known(self, functions: Sequence[Mapping[str, Any]], error: GrammarError) -> list[Mapping[str, Any]]:
        """Return the functions. Those whose schemas can't be compiled lose them.

        ``error`` was raised when all were compiled together. If there are more than MAX_TRIED functions, only strict
        ones are tried, and the others lose their schemas.

        Raises Refusal if a strict one can't be compiled, or if there are more than MAX_TRIED functions that are strict.
        """
        if len(functions) <= MAX_TRIED:
            return [self._known_one(function) for function in functions]
        if sum(1 for function in functions if function.get("strict")) > MAX_TRIED:
            message = (
                f"tools: more than {MAX_TRIED} functions are strict, and can't be compiled together: {error.cause}"
            )
            raise Refusal(400, message, param="tools")
        return [
            self._known_one(function) if function.get("strict") else {**function, "parameters": ANY_OBJECT}
            for function in functions
        ]

    def _known_one(self, function: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a function, without its schema if that can't be compiled. Raises Refusal if it is strict."""
        try:
            self._compiler.compile(arguments_of(function))
        except GrammarError as error:
            if function.get("strict"):
                raise Refusal(400, f"tools: {function['name']}: {error.cause}", param="tools") from None
            return {**function, "parameters": ANY_OBJECT}
        return function


def _refusal(field: str, error: GrammarError) -> Refusal:
    return Refusal(400, f"{field}: {error.cause}", param=field)
