"""Answers one after the other, each by ``generate()``: as `moetier generate` has them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakValueDictionary

import torch
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    DirectStreamer,
    _GenerationCancelled,
    _StreamError,
)

from moetier.runtime.generation.decoding import behind, chunks_of, penalties_of
from moetier.runtime.generation.prompt_cache import PromptCache
from moetier.runtime.generation.stop_strings import StopStrings
from moetier.runtime.moe.experts import experts_modules

from .params import ENDING, FAILED, Wanted, ids_of, log_answer, log_failure
from .serve_tally import Tally


class Answer(DirectStreamer):
    """The text of one request, on its way from the generating thread to the event loop's queue."""

    kept_tokens = 0  # of the prompt: computed for the request before
    ids: Sequence[int] = ()  # the prompt, until it is computed or cancelled

    def __init__(self, stop: list[str], tally: Tally, *args: Any, **kwargs: Any) -> None:
        self._stops = StopStrings(stop)
        self._tally = tally
        super().__init__(*args, **kwargs)

    @property
    def is_cancelled(self) -> bool:
        """Whether the request was cancelled."""
        return self._cancelled.is_set()

    @property
    def ended(self) -> bool:
        """Nobody waits for more of it."""
        return self._stops.ended or self.is_cancelled

    def put(self, value: torch.Tensor) -> None:
        """Take token ids from ``generate()``: first the prompt's [1, tokens], then one new token's [1]."""
        if not self.ended:
            if not self._first:  # the prompt
                self._tally.new(len(value))  # before it is told: who has it may ask for the count
            super().put(value)

    def cancel(self) -> None:
        """Cancel the answer, unless it has ended already."""
        if not self._stops.ended:  # else all of it was told, and the thread is about to say so
            super().cancel()

    def fail(self, message: str) -> None:
        """Queue an error in place of the rest of the answer, and cancel the request."""
        self._enqueue(_StreamError(message))
        self.cancel()

    def between_layers(self, *_: Any) -> None:
        """Ends a prompt that nobody waits for in its midst; what comes behind it ends at a token, and stays whole."""
        if self.ended and not self.total_tokens:
            raise _GenerationCancelled

    def between_tokens(self, ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Say for each sequence whether to stop, bool [sequences]; ``ids`` are [sequences, tokens]."""
        return torch.full((len(ids),), self.ended, dtype=torch.bool, device=ids.device)

    def _enqueue(self, item: Any) -> None:
        for found in self._stops.take(item):
            super()._enqueue(found)


class OneByOne(BaseGenerateManager):
    """What ``context`` tokens of a conversation have of keys and values is kept for the next request."""

    together = False
    is_alive = True

    def __init__(self, model: Any, context: int, chunk: int) -> None:
        self._model = model
        self._chunk = chunk
        self.context = context  # tokens of a prompt and its answer
        self.tally = Tally()
        self._kept = PromptCache(model)
        self._thread = ThreadPoolExecutor(1, "moetier-answers")
        self._answers: WeakValueDictionary[str, Answer] = WeakValueDictionary()  # by request

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], Answer]:
        """Submit a request to the generating thread, and return the queue of its text and the answer."""
        ids, wanted = ids_of(inputs), gen_config
        queue: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        answer = Answer(wanted.stop, self.tally, processor._tokenizer, loop, queue, response_parser=response_parser)
        self._answers[request_id] = answer
        self.tally.begin()
        answer.ids = ids
        self._thread.submit(self._generate, wanted, answer)
        return queue, answer

    async def generate_non_streaming(self, *_: Any, **__: Any) -> Any:
        """Raise AssertionError: the handlers collect the stream instead."""
        raise AssertionError("our handlers collect the stream")

    def kept_tokens(self, request_id: str) -> int:
        """Of the prompt of a request whose answer somebody still holds."""
        return self._answers[request_id].kept_tokens

    def over(self, request_id: str) -> None:
        """Nobody waits for its answer any more, if it has one."""
        if (answer := self._answers.get(request_id)) is not None:
            answer.cancel()
            answer.ids = ()  # its turn may be far away

    def cut(self) -> None:
        """Ends what is under way."""
        for answer in list(self._answers.values()):
            answer.fail(ENDING)

    def stop(self) -> None:
        """Waits for what is under way."""
        self._thread.shutdown()

    def _generate(self, wanted: Wanted, answer: Answer) -> None:
        """On the one thread."""
        ids = list(answer.ids)  # before the look: these are gone only where it has ended
        if answer.ended:
            self.tally.end("cancelled")
            return
        model, sequence, hooks, failed = self._model, ids, [], False
        if wanted.seed is None:
            torch.seed()
        else:
            torch.manual_seed(wanted.seed)
            self._kept.clear()  # in what company a token is computed has a part in its last bits
        try:
            answer.kept_tokens = self._kept.begin(ids)
            self.tally.prompt(len(ids), answer.kept_tokens)
            hooks = [m.register_forward_pre_hook(answer.between_layers) for m in experts_modules(model).values()]
            prompt = torch.tensor([ids], device=model.device)
            given = self._kept.options | chunks_of(model, len(ids) - answer.kept_tokens, self._chunk)
            more = wanted.config.update(**given)  # what is none of a config's: the cache
            sequence = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=wanted.config,
                streamer=answer,
                stopping_criteria=[answer.between_tokens],
                **behind(len(ids), penalties_of(wanted.asked)),
                **more,
            )[0].tolist()
        except _GenerationCancelled:
            pass
        except Exception as error:
            log_failure("An answer", error)
            failed = True
            answer.fail(FAILED)
        finally:
            for hook in hooks:
                hook.remove()
            self._kept.end(sequence)
            self.tally.end("failed" if failed else "cancelled" if answer.is_cancelled else "answered")
            log_answer(len(ids), answer.kept_tokens, answer.total_tokens, cancelled=answer.is_cancelled)
