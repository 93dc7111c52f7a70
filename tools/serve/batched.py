"""Answers that are computed together: transformers' continuous batching, in which requests share what they load."""

from __future__ import annotations

import asyncio
import copy
from typing import Any
from weakref import WeakValueDictionary

from transformers import ContinuousBatchingConfig
from transformers.cli.serving.utils import BaseGenerateManager, CBStreamer, CBWorkerDeadError, _StreamError

from moetier.runtime.generation.decoding import ONE_SEQUENCE, can_resume
from moetier.runtime.generation.stop_strings import StopStrings
from moetier.tiers.errors import ConfigError

from .params import ENDING, FAILED, ids_of, log_answer, log_failure
from .serve_refusal import Refusal
from .serve_tally import Tally

PAGE = 32  # tokens: what prompts that begin alike share is whole pages
GREEDY = {"temperature": 1.0, "top_p": 0.0, "top_k": 1}  # the most likely token alone is left
FIXED = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}  # they can't differ by request
PATIENCE = 10.0  # seconds for a step that is under way


class SharedAnswer(CBStreamer):
    """The text of one request; all on the event loop."""

    def __init__(
        self, prompt: int, stop: list[str], tally: Tally, manager: Any, request_id: str, tokenizer: Any, parser: Any
    ) -> None:
        self._prompt = prompt  # tokens
        self._tally = tally
        self._is_over = False
        self._stops = StopStrings(stop)
        self.items: asyncio.Queue[Any] = asyncio.Queue()
        sink: Any = self  # in the place of a queue
        super().__init__(manager, request_id, tokenizer, asyncio.get_running_loop(), sink, response_parser=parser)

    @property
    def ended(self) -> bool:
        """Whether the answer has ended: it is complete, or cancelled."""
        return self._stops.ended

    def put_nowait(self, item: Any) -> None:
        """Queue a piece of the answer, up to the first stop string; the base class takes this for its queue."""
        for found in self._stops.take(item):
            self.items.put_nowait(found)

    def take(self, output: Any) -> None:
        """What the manager says of the request: all tokens so far."""
        if self._stops.ended:
            return
        before = self.total_tokens
        self.put(output)
        self._tally.new(self.total_tokens - before)
        if output.error is not None:
            log_failure("An answer", RuntimeError(output.error))
            self._over("failed")
            self.fail(FAILED)
            return
        if output.is_finished():
            self.end()
        elif self.ended:
            self._forget()
        if self.ended:
            self._over("answered")
            log_answer(self._prompt, None, self.total_tokens, cancelled=False)

    def fail(self, message: str) -> None:
        """Queue an error in place of the rest of the answer, and cancel the request."""
        self.put_nowait(_StreamError(message))
        self.cancel()

    def cancel(self) -> None:
        """Stop computing the request, and count it as cancelled unless it has another outcome."""
        if not self.ended:
            self._stops.ended = True
            log_answer(self._prompt, None, self.total_tokens, cancelled=True)
        self._over("cancelled")
        self._forget()

    def _over(self, outcome: str) -> None:
        """The first outcome counts."""
        if not self._is_over:
            self._is_over = True
            self._tally.end(outcome)

    def _forget(self) -> None:
        super().cancel()
        router = self._cb.output_router  # else it would remember a request that never ends
        with router._lock:
            router.result_handlers.pop(self._request_id, None)


class Together(BaseGenerateManager):
    """Up to ``requests`` at a time, each in a context of so many tokens; others wait for their turn."""

    together = True

    def __init__(self, model: Any, context: int, chunk: int, requests: int) -> None:
        """Raises ConfigError for a model whose layers transformers can't compute so."""
        self.context = context  # tokens of a prompt and its answer
        self.tally = Tally()
        self._answers: WeakValueDictionary[str, SharedAnswer] = WeakValueDictionary()
        if not can_resume(model):
            raise ConfigError(
                f"{type(model).__name__} can't compute several requests together: not all of its layers keep keys and "
                "values.",
                "Leave out --parallel: requests wait for each other then.",
            )
        if model.config._attn_implementation != "eager":
            model.set_attn_implementation("sdpa")
        config = copy.deepcopy(model.generation_config)
        # what requests say of these holds for them alone, if it is no default here
        config.update(**ONE_SEQUENCE, do_sample=True, temperature=0.5, top_p=0.5, top_k=1, use_cache=False)
        self._vocabulary = model.config.get_text_config(
            decoder=True
        ).vocab_size  # the largest top_k that transformers 5.23 takes
        self._fixed = {**FIXED, "min_p": config.min_p or 0.0}
        self._cb = model.init_continuous_batching(
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=requests * (-(-context // PAGE) + 1),
                max_batch_tokens=chunk,
                max_requests_per_batch=requests,
                per_request_processors=True,
                auto_switch_to_flash=False,
            ),
        )
        self._cb.start()
        self._try(model)

    def _try(self, model: Any) -> None:
        """One token: what does not work is known before anybody asks."""
        self._cb.add_request([0], max_new_tokens=1, **GREEDY)
        while (output := self._cb.get_result(timeout=1.0)) is None and self._cb.is_running():
            pass
        if output is None or output.error is not None:
            error = self._cb.background_thread_status.fatal_error or (output.error if output else None)
            self.stop()
            raise ConfigError(
                f"{type(model).__name__} can't compute several requests together: {str(error).splitlines()[0]}",
                "Leave out --parallel: requests wait for each other then.",
            )

    @property
    def is_alive(self) -> bool:
        """Whether the thread that computes has had no fatal error."""
        return self._cb.background_thread_status.fatal_error is None

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], SharedAnswer]:
        """Submit a request to the batch, and return the queue of its text and the answer.

        Raises Refusal for sampling options that can't differ by request, CBWorkerDeadError if the worker has failed.
        """
        if (error := self._cb.background_thread_status.fatal_error) is not None:
            log_failure("Computing together", error)
            raise CBWorkerDeadError
        ids, wanted = ids_of(inputs), gen_config
        for name, value in self._fixed.items():
            if wanted.asked.get(name, value) != value:
                raise Refusal(400, f"{name}: with --parallel it is {value:g} for all requests.", param=name)
        config, sampling = wanted.config, GREEDY
        if config.do_sample:
            if wanted.seed is not None:
                raise Refusal(400, "seed: what is sampled together has no seed; --parallel 1 has.", param="seed")
            given = {"temperature": config.temperature, "top_p": config.top_p}
            sampling = {name: 1.0 if value is None else float(value) for name, value in given.items()}
            sampling["top_k"] = min(config.top_k or self._vocabulary, self._vocabulary)
        answer = SharedAnswer(
            len(ids), wanted.stop, self.tally, self._cb, request_id, processor._tokenizer, response_parser
        )
        self._answers[request_id] = answer
        self.tally.begin()
        self.tally.prompt(len(ids), 0)
        self._cb.register_result_handler(request_id, answer.take)
        self._cb.add_request(
            ids,
            request_id=request_id,
            streaming=True,
            max_new_tokens=wanted.max_new_tokens,
            eos_token_id=config.eos_token_id,
            **sampling,
        )
        return answer.items, answer

    async def generate_non_streaming(self, *_: Any, **__: Any) -> Any:
        """Raise AssertionError: the handlers collect the stream instead."""
        raise AssertionError("our handlers collect the stream")

    def kept_tokens(self, request_id: str) -> None:
        """transformers does not say it."""
        return

    def over(self, request_id: str) -> None:
        """Nobody waits for its answer any more, if it has one."""
        answer = self._answers.get(request_id)
        if answer is not None and not answer.ended:
            answer.cancel()

    def cut(self) -> None:
        """Ends what is under way."""
        for answer in list(self._answers.values()):
            answer.fail(ENDING)

    def stop(self) -> None:
        """Waits for the step that is under way."""
        self._cb.stop(block=True, timeout=PATIENCE, hard_stop=True)
