"""Makes jobs for the engine of what requests ask for: renders and tokenises their prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from moetier.runtime.engine.grammar import CompiledGrammar
from moetier.runtime.engine.sequence import Finish, Request
from moetier.runtime.generation.conversation import PLAIN_STOP, PLAIN_TEMPLATE
from moetier.runtime.generation.decoding import BIASES, penalties_of, sampling_of
from moetier.runtime.model.context import counted, first_ids, longest_context
from moetier.runtime.model.vocabulary import embeddings_of, unknown_token

from .answers import Answer, Job
from .constraints import Constraints
from .early_difference import EarlyDifference
from .parsing import AnswerParser, form_of
from .protocols.events import Answered
from .protocols.query import ChatPrompt, Prompt, Query
from .protocols.refusal import TOO_LONG, Refusal
from .sampled_tokens import SampledTokens

MAX_ANSWERS = 1024  # maximum number of answers that one request may ask for
NEW_TOKENS = 1024  # limit of an answer's tokens if the request has none; generation_config.json may raise it
SWITCHES = ("enable_thinking", "thinking")  # variables by which chat templates turn reasoning on and off


class Prompts:
    """Makes the prompts of one model."""

    def __init__(
        self, model: Any, tokenizer: Any, *, context: int, max_scored: int, leave_out: str | None = None
    ) -> None:
        """Make prompts of fewer than ``context`` tokens; with PLAIN_TEMPLATE if the model has no chat template.

        ``max_scored`` is the maximum length of a prompt whose tokens have log probabilities. ``leave_out`` is a
        regular expression of what is left out of system prompts.
        """
        self._model = model
        self._tokenizer = tokenizer
        self._context = context
        self._max_scored = max_scored
        self._most_new = max(NEW_TOKENS, model.generation_config.max_new_tokens or 0)
        self._vocabulary = min(embeddings_of(model), model.config.get_text_config(decoder=True).vocab_size)
        self._form = form_of(model, tokenizer)
        self._constraints = Constraints(tokenizer, None if self._form is None else self._form.template)
        self._is_plain = not tokenizer.chat_template
        self._switches = [name for name in SWITCHES if has_variable(tokenizer.chat_template, name)]
        self._has_developer = "developer" in str(tokenizer.chat_template)
        self._sampled = SampledTokens()
        self._left_out = None if leave_out is None else re.compile(leave_out)
        self._differences = EarlyDifference()

    def tokens(self, prompt: Prompt, user: str = "", *, add_special_tokens: bool = True) -> list[int]:
        """Return a prompt's token ids. If it is far longer than the context, return only its first ids.

        ``add_special_tokens``: whether the tokenizer adds its own to a text. Raises Refusal if the template refuses the
        messages.
        """
        if isinstance(prompt, str):
            return self._ids(prompt, add_special_tokens=add_special_tokens)
        return self._read(prompt, user)[1]

    def jobs(self, query: Query, field: str, user: str = "") -> list[list[Job]]:
        """Return, for each prompt of a query, a job for each answer to it. ``user`` is the name of its API key.

        Raises Refusal, which names ``field``, if a prompt is empty, exceeds the context, or the model can't read it.
        """
        if len(query.prompts) * query.choices > MAX_ANSWERS:
            raise Refusal(400, f"{field}: a request may have at most {MAX_ANSWERS} answers.", param=field)
        if (unknown := max(query.biases, default=0)) >= self._vocabulary:
            raise Refusal(400, f"logit_bias: the model has no token {unknown}.", param="logit_bias")
        is_chat = isinstance(query.prompts[0], ChatPrompt)
        of_text = None if is_chat else self._constraints.of_text(query.form)  # once for all prompts
        return [self._jobs_of(query, prompt, field, user, of_text) for prompt in query.prompts]

    def note(self, job: Job, answer: Answer, answered: Answered) -> None:
        """Note a complete answer: the prompt of a later request may begin with its tokens."""
        sequence, end = answer.sequence, answered.end
        if job.chat is None or sequence is None or end is None:
            return
        is_last_call = job.one_call and answered.calls
        if end.stop is not None or not (is_last_call or sequence.finish in (Finish.END, Finish.LENGTH)):
            return  # the client has not got all that was sampled
        ids = sequence.ids[len(job.engine_request.ids) :]
        mark = self._tokenizer.decode(ids[-1:]) if sequence.finish is Finish.END else ""
        self._sampled.keep(self._plain(job.chat), answered, ids, job.opening, mark, user=job.engine_request.user)

    def _jobs_of(
        self, query: Query, prompt: Prompt, field: str, user: str, of_text: CompiledGrammar | None
    ) -> list[Job]:
        """Return a job for each answer to one prompt. They differ in their seeds."""
        chat = prompt if isinstance(prompt, ChatPrompt) else None
        opening, ids = self._read(prompt, user)
        self._check(ids, field)
        if chat is not None:
            self._differences.note(user, ids)
        scores = query.echo and query.logprobs is not None
        if scores and len(ids) > self._max_scored:
            message = f"{field}: this model can give log probabilities for a prompt of {self._max_scored} tokens."
            raise Refusal(400, message, param=field)
        biases = {BIASES: dict(query.biases)} if query.biases else {}
        engine_request = Request(
            tuple(ids),
            max(1, min(self._most_new if query.max_tokens is None else query.max_tokens, self._context - len(ids))),
            {**sampling_of(query.sampling), **penalties_of(query.sampling), **biases},
            user=user,
            grammar=of_text if chat is None else self._grammar(query, chat, opening),
            logprobs=query.logprobs,
            scores_prompt=scores,
        )
        return [
            Job(
                engine_request if query.seed is None else replace(engine_request, seed=query.seed + number),
                stop=query.stop,
                ends=(PLAIN_STOP,) if chat and self._is_plain else (),
                parser=self._parser(chat, opening, is_formed=query.form is not None),
                one_call=query.one_call,
                chat=chat,
                opening=opening,
                echo=(prompt if isinstance(prompt, str) else self._tokenizer.decode(ids)) if query.echo else None,
                is_silent=query.max_tokens == 0,
                counts_prompt=number == 0,
            )
            for number in range(query.choices)
        ]

    def _grammar(self, query: Query, chat: ChatPrompt, opening: str) -> CompiledGrammar | None:
        """Return the grammar of an answer that begins with ``opening``. Raises Refusal if it can't be compiled."""
        parser = self._parser(chat, opening, is_formed=False)
        region = None if parser is None else parser.region
        return self._constraints.of_dialogue(chat, query.form, one_call=query.one_call, region=region)

    def _parser(self, chat: ChatPrompt | None, opening: str, *, is_formed: bool) -> AnswerParser | None:
        """Return a parser for an answer that begins with ``opening``; None if all of the answer is text."""
        return (
            None if chat is None or self._form is None else self._form.parser(opening, chat.tools, is_formed=is_formed)
        )

    def _read(self, prompt: Prompt, user: str) -> tuple[str, list[int]]:
        """Return the end of a prompt that begins the answer, and the prompt's token ids.

        Raises Refusal if the chat template refuses it.
        """
        if isinstance(prompt, ChatPrompt):
            text, opening = self._text(prompt)
            return opening, self._continued(prompt, user) or self._ids(text, add_special_tokens=self._is_plain)
        return "", self._ids(prompt) if isinstance(prompt, str) else [*prompt]

    def _ids(self, text: str, **options: Any) -> list[int]:
        return first_ids(self._tokenizer, text, self._context, **options)

    def _check(self, ids: Sequence[int], field: str) -> None:
        """Raise Refusal if the model can't compute a prompt."""
        if not ids:
            raise Refusal(400, f"{field}: the prompt has no tokens.", param=field)
        context = self._context
        if len(ids) >= context:
            is_models = context == longest_context(self._model.config)
            whose = "the model's maximum context" if is_models else "the context of this server (--context)"
            raise Refusal(
                400,
                f"The prompt has {counted(len(ids), context)} tokens, but {whose} is {context:,} for prompt and answer "
                "together.",
                param=field,
                code=TOO_LONG,
            )
        if (token := unknown_token(self._model, self._tokenizer, ids)) is not None:
            message = f"The prompt has the token {token!r}, for which the model has no embedding."
            raise Refusal(400, message, param=field)

    # -- the chat template ---------------------------------------------------------------------------------------------

    def _text(self, chat: ChatPrompt) -> tuple[str, str]:
        """Return the prompt's text, and its end that begins the answer.

        Raises Refusal if the chat template refuses the messages.
        """
        messages, tools = self._plain(chat), chat.tools
        text = self._render(chat, tools, messages)
        if tools and text == self._render(chat, None, messages):
            raise Refusal(400, "tools: the model's chat template does not support tools.", param="tools")
        # only what the template adds to the messages may open a region: messages may have marks, too
        told = self._render(chat, tools, messages, begins_answer=False)
        return text, text.removeprefix(told) if text.startswith(told) else ""

    def _continued(self, chat: ChatPrompt, user: str) -> list[int]:
        """Return a prompt's tokens, with earlier answers as they were sampled; [] if none of these is kept."""
        try:
            return self._sampled.continued(
                self._plain(chat),
                partial(self._render, chat, chat.tools),
                self._tokenizer,
                self._context,
                user=user,
                add_special_tokens=self._is_plain,
            )
        except Refusal:  # the template takes the messages, but not without their calls
            return []

    def _render(
        self,
        chat: ChatPrompt,
        tools: Sequence[Mapping[str, Any]] | None,
        messages: Sequence[Any],
        *,
        begins_answer: bool = True,
    ) -> str:
        variables: dict[str, Any] = {} if chat.effort is None else {"reasoning_effort": chat.effort}
        if chat.reasons is not None:
            variables |= dict.fromkeys(self._switches, chat.reasons)
        try:
            text: str = self._tokenizer.apply_chat_template(
                [*messages],
                chat_template=PLAIN_TEMPLATE if self._is_plain else None,
                add_generation_prompt=begins_answer,
                tools=tools,
                tokenize=False,
                **variables | {**chat.variables},
            )
        except Exception as error:  # a template may raise any exception
            message = f"The model's chat template refuses these messages: {str(error).partition(chr(10))[0]}"
            raise Refusal(400, message, param="messages") from None
        return text

    def _plain(self, chat: ChatPrompt) -> list[dict[str, Any]]:
        """Return messages as chat templates take them: content is one text, and there are only fields they know."""
        return [self._plain_message(message) for message in chat.messages]

    def _plain_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return a message as chat templates take it: one text is its content, and it has only fields they know."""
        content = message.get("content") or ""
        text = content if isinstance(content, str) else " ".join(part["text"] for part in content)
        role = message["role"]
        if role == "developer" and not self._has_developer:  # such templates leave it out, or refuse it
            role = "system"
        if self._left_out is not None and role in ("system", "developer"):
            text = self._left_out.sub("", text)
        plain = {"role": role, "content": text}
        plain |= {name: message[name] for name in ("tool_calls", "tool_call_id") if message.get(name)}
        if isinstance(reasoning := message.get("reasoning_content"), str) and reasoning:
            plain["reasoning_content"] = reasoning
        return plain


def has_variable(template: Any, name: str) -> bool:
    """Return whether a chat template, or one of several, may have a variable of this name."""
    templates = template.values() if isinstance(template, dict) else [template or ""]
    return any(re.search(rf"(?<![\w.'\"]){name}(?![\w'\"])", each) is not None for each in templates)
