"""transformers' handlers of requests, of one model that is loaded."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
from collections.abc import AsyncGenerator
from typing import Any

from fastapi.responses import JSONResponse
from openai.types.completion_usage import PromptTokensDetails
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import BaseHandler, GenerationState, Modality

from moetier.runtime.context import first_ids, longest_context
from moetier.runtime.generation.compat import LIST_MODELS
from moetier.runtime.generation.decoding import LEAST_TEMPERATURE, SAMPLING, sampling_of

from .params import ENDING, Wanted
from .request import Asked, ChatAsked, TextAsked, checked
from .serve_refusal import Refusal, refusal_body, unknown_model

DONE = "data: [DONE]\n\n"  # how OpenAI ends a stream that is whole


class OneModel(ModelManager):
    """Loads nothing, whatever it is asked for."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        super().__init__(model_timeout=-1)
        self.name = name
        self._both = model, tokenizer

    def load_model_and_processor(self, *_: Any, **__: Any) -> Any:
        """Return the loaded model and its tokenizer."""
        return self._both

    def card(self) -> dict[str, Any]:
        """Return the model as an entry of OpenAI's list of models."""
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "moetier"}

    def cards(self) -> list[dict[str, Any]]:
        """Return the list of models: this one."""
        return [self.card()]


setattr(OneModel, LIST_MODELS, OneModel.cards)


class OneManager(GenerationState):
    """Of how answers come to be: OneByOne, or Together."""

    def __init__(self, manager: Any) -> None:
        super().__init__(continuous_batching=manager.together)
        self.manager = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        """Return the one manager, whatever model is named."""
        return self.manager

    def is_cb_alive(self) -> bool:
        """Whether the manager can still compute answers."""
        alive: bool = self.manager.is_alive
        return alive


class _Handler(BaseHandler):
    """What both kinds of completions do in another way than transformers."""

    asked: type[Asked]
    prompt: str  # the field that it is in
    model_manager: OneModel
    generation_state: OneManager
    end_of_turn: str | None = None  # a string that ends every answer

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer as transformers' handlers do, with a prompt that is rendered and tokenised off the event loop.

        Raises Refusal.
        """
        model_id, model, tokenizer = self._resolve_model(body)
        ids = await asyncio.to_thread(self._prepare, body)
        wanted = self._build_generation_config(body, model.generation_config)
        wanted.fit(len(ids), self.generation_state.manager.context, longest_context(model.config))
        answer = self._streaming if body.get("stream") else self._non_streaming  # type: ignore[attr-defined]
        tools = {"tools": body["tools"]} if "tools" in body else {}
        found = answer(
            request_id, model, tokenizer, model_id, {"input_ids": ids}, wanted, self.generation_state.manager, **tools
        )
        return await found if inspect.isawaitable(found) else found

    def _prepare(self, body: dict[str, Any]) -> list[int]:
        """Check a request's body, of which the checked fields remain, and return the first tokens of its prompt.

        On a thread of its own. Raises Refusal.
        """
        self._validate_request(body)
        return self._ids(body, self.model_manager.load_model_and_processor()[1])

    def _ids(self, body: dict[str, Any], tokenizer: Any) -> list[int]:
        raise NotImplementedError

    def _first_ids(self, tokenizer: Any, text: str, **options: Any) -> list[int]:
        return first_ids(tokenizer, text, self.generation_state.manager.context, **options)

    def _validate_request(self, body: dict[str, Any]) -> None:
        given = checked(body, self.asked)
        if body.get("model") not in (None, self.model_manager.name):
            raise unknown_model(body["model"], self.model_manager.name)
        body.clear()
        body.update(given)

    def _resolve_model(self, body: dict[str, Any]) -> Any:
        return self.model_manager.name, *self.model_manager.load_model_and_processor()

    def _build_generation_config(self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False) -> Any:
        """A Wanted. transformers' own would set torch's seed now, and not when it is this request's turn."""
        said = {name: value for name, value in body.items() if name not in (*SAMPLING, "seed", "stop")}
        config = super()._build_generation_config(said, model_generation_config)
        for name, value in sampling_of(body).items():
            setattr(config, name, value)  # update() would warn of samplers where nothing is sampled
        if config.temperature is not None and config.temperature < LEAST_TEMPERATURE:
            config.do_sample = False
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = config.min_p = None
        stop = [*body.get("stop", ()), *([self.end_of_turn] if self.end_of_turn else ())]
        asked = {name: body[name] for name in SAMPLING if name in body}
        return Wanted(config, body.get("seed"), stop, self.prompt, asked)

    def _build_chunk_sse(self, *args: Any, **kwargs: Any) -> str:
        if (usage := kwargs.get("usage")) is not None:
            kept = self.generation_state.manager.kept_tokens(args[0])
            usage.prompt_tokens_details = None if kept is None else PromptTokensDetails(cached_tokens=kept)
        found: str = super()._build_chunk_sse(*args, **kwargs)  # type: ignore[misc]
        return found

    @staticmethod
    def chunk_to_sse(chunk: Any) -> str:
        """An event of a stream. Its choices have a finish_reason, which is null before the last one."""
        said = chunk.model_dump(exclude_none=True)
        said["choices"] = [{**choice, "finish_reason": choice.get("finish_reason")} for choice in said["choices"]]
        return f"data: {json.dumps(said, ensure_ascii=False)}\n\n"

    def _streaming(self, *args: Any, **kwargs: Any) -> Any:
        response = super()._streaming(*args, **kwargs)  # type: ignore[misc]
        response.body_iterator = _as_openai(response.body_iterator)
        return response

    async def _pieces(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """Of an answer that does not stream: those of the stream, all of them. Raises Refusal."""
        pieces = []
        async for events in super()._streaming(*args, **kwargs).body_iterator:  # type: ignore[misc]
            for event in _events(events):
                if (failed := _failure(event)) is not None:
                    raise failed
                pieces.append(json.loads(event.removeprefix("data: ")))
        return pieces


async def _as_openai(stream: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """transformers' stream, with OpenAI's last event: DONE, or an error's object."""
    async with contextlib.aclosing(stream):
        async for events in stream:
            for event in _events(events):
                if (failed := _failure(event)) is not None:
                    yield f"data: {json.dumps(refusal_body(failed))}\n\n"
                    return
                yield event + "\n\n"
    yield DONE


def _events(text: str) -> list[str]:
    return text.removesuffix("\n\n").split("\n\n")


def _failure(event: str) -> Refusal | None:
    """Of an event that says, in transformers' form, that an answer failed; None of any other."""
    if not event.startswith('data: {"error": '):
        return None
    message = json.loads(event.removeprefix("data: "))["error"]
    return Refusal(503 if message == ENDING else 500, message)


class ChatHandler(_Handler, ChatCompletionHandler):
    """Handler of chat completions."""

    asked, prompt = ChatAsked, "messages"

    def _ids(self, body: dict[str, Any], tokenizer: Any) -> list[int]:
        messages = self.get_processor_inputs_from_messages(body["messages"], Modality.LLM)

        def render(tools: Any) -> str:
            given = body.get("chat_template_kwargs", {})
            text: str = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tools=tools, tokenize=False, **given
            )
            return text

        text = render(body.get("tools"))
        if body.get("tools") and text == render(None):
            raise Refusal(400, "tools: the model's chat template does not use them.", param="tools")
        return self._first_ids(tokenizer, text, add_special_tokens=False)

    async def _non_streaming(self, *args: Any, **kwargs: Any) -> JSONResponse:
        pieces = await self._pieces(*args, **kwargs)
        deltas = [piece["choices"][0]["delta"] for piece in pieces]
        message: dict[str, Any] = {"role": "assistant"}
        message["content"] = "".join(delta.get("content", "") for delta in deltas)
        if reasoning := "".join(delta.get("reasoning_content", "") for delta in deltas):
            message["reasoning_content"] = reasoning
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        if calls:
            message["tool_calls"] = [{key: call[key] for key in call if key != "index"} for call in calls]
        choice = {"index": 0, "message": message, "finish_reason": pieces[-1]["choices"][0]["finish_reason"]}
        return JSONResponse({**pieces[-1], "object": "chat.completion", "choices": [choice]})


class TextHandler(_Handler, CompletionHandler):
    """Handler of text completions."""

    asked, prompt = TextAsked, "prompt"

    def _ids(self, body: dict[str, Any], tokenizer: Any) -> list[int]:
        return self._first_ids(tokenizer, body["prompt"])

    async def _non_streaming(self, *args: Any, **kwargs: Any) -> JSONResponse:
        pieces = await self._pieces(*args, **kwargs)
        text = "".join(piece["choices"][0]["text"] for piece in pieces)
        return JSONResponse({**pieces[-1], "choices": [{**pieces[-1]["choices"][0], "text": text}]})
