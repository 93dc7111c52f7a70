"""Engine that computes several requests as one batch, so that they share the experts that are loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import ContinuousBatchingConfig

from moetier.runtime.generation.decoding import ONE_SEQUENCE, sampling_of
from moetier.runtime.libraries.transformers_internals import attention_of, lock_of
from moetier.runtime.model.context import can_resume
from moetier.tiers.errors import ConfigError

from .engine import Answer, Engine, Job
from .refusal import FAILED, Refusal, log_failure

PAGE = 32  # tokens in a page of keys and values; prompts that begin alike share whole pages
GREEDY = {"temperature": 1.0, "top_p": 0.0, "top_k": 1}  # leaves only the most likely token
FIXED = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}  # values of all requests
PATIENCE = 10.0  # longest time, in seconds, that ``stop`` waits for the step that is being computed


class AtOnce:
    """Stand-in for an event loop that runs callbacks at once, on the thread that computes.

    transformers runs the callbacks of all requests of a step in the event loop of one of them, which may be closed.
    """

    def call_soon_threadsafe(self, callback: Callable[..., object], *arguments: Any) -> None:
        """Call ``callback`` with ``arguments``."""
        callback(*arguments)


class Nowhere:
    """Stand-in for the queue of outputs that have no callback: those of answers that have ended."""

    def put(self, output: Any) -> None:
        """Forget ``output``."""


class Together(Engine):
    """Engine that computes up to ``requests`` answers at a time, with transformers' continuous batching.

    Each answer has a context of its own. Further requests wait.
    """

    def __init__(self, model: Any, tokenizer: Any, context: int, chunk: int, requests: int) -> None:
        """Compute at most ``chunk`` tokens in a step. Raises ConfigError if transformers can't batch the model."""
        super().__init__(model, tokenizer, context)
        if not can_resume(model):
            raise self._unable("not all of its layers keep keys and values.")
        if attention_of(model.config) != "eager":
            model.set_attn_implementation("sdpa")
        config = copy.deepcopy(model.generation_config)
        # transformers accepts a sampling option from a request only if the option has an effect in this configuration.
        # The values are arbitrary: each request replaces them.
        config.update(**ONE_SEQUENCE, do_sample=True, temperature=0.5, top_p=0.5, top_k=1, use_cache=False)
        # transformers 5.23 accepts no larger top_k
        self._vocabulary = model.config.get_text_config(decoder=True).vocab_size
        self._fixed = {**FIXED, "min_p": config.min_p or 0.0}
        self._batching = model.init_continuous_batching(
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

    def _start(self) -> None:
        """Start the batch, and try it on one token."""
        self._batching.start()
        self._batching.add_request([0], max_new_tokens=1, **GREEDY)  # shows whether the model can be batched
        while (output := self._batching.get_result(timeout=1.0)) is None and self._batching.is_running():
            pass
        if output is None or output.error is not None:
            error = self._fatal_error or (output.error if output else None)
            raise self._unable(str(error).splitlines()[0])
        self._batching.output_router.output_queue = Nowhere()

    def _unable(self, why: str) -> ConfigError:
        return ConfigError(
            f"{type(self.model).__name__} can't compute several requests together: {why}",
            "Leave out --parallel: then requests are computed one after the other.",
        )

    @property
    def _fatal_error(self) -> Exception | None:
        error: Exception | None = self._batching.background_thread_status.fatal_error
        return error

    @property
    def is_alive(self) -> bool:
        """Whether the computing thread runs, and has had no fatal error."""
        return self._batching.is_running() and self._fatal_error is None

    def submit(self, job: Job) -> Answer:
        """Add a job to the batch and return its answer.

        Raises Refusal if the job sets an option that must be the same for all requests, if it samples and has a seed,
        or if the computing thread has failed.
        """
        if (error := self._fatal_error) is not None:
            log_failure("The computing thread", error)
            raise Refusal(503, FAILED)
        for name, value in self._fixed.items():
            if job.asked.get(name, value) != value:
                raise Refusal(
                    400, f"{name}: a server that was started with --parallel accepts only {value:g}.", param=name
                )
        sampling = self._sampling(job)
        with self._begun(job) as answer:
            router = self._batching.output_router
            with lock_of(router):
                # register_result_handler would call _take in the event loop, in one call for all answers of a step
                router.result_handlers[answer.id] = partial(self._take, answer), AtOnce()
            self._batching.add_request(
                job.ids,
                request_id=answer.id,
                streaming=True,
                max_new_tokens=job.most,
                eos_token_id=self.model.generation_config.eos_token_id,
                **sampling,
            )
            if self._batching.background_thread_status.can_accept_new_requests() is not None:
                raise Refusal(503, FAILED)  # the computing thread ends, and may have looked at its queue before
            self.tally.add(prompt_tokens=len(job.ids))
        return answer

    def drop(self, answer: Answer) -> None:
        """Remove a finished answer from the engine, and from the batch."""
        super().drop(answer)
        self._batching.cancel_request(answer.id)
        router = self._batching.output_router
        with lock_of(router):
            router.result_handlers.pop(answer.id, None)

    def _stop(self) -> None:
        """Stop computing after the present step. Wait for that step for at most PATIENCE seconds."""
        self._batching.stop(block=True, timeout=PATIENCE, hard_stop=True)

    def _sampling(self, job: Job) -> dict[str, float]:
        """Return a job's temperature, top_p and top_k. Raises Refusal if the job samples and has a seed."""
        given, default = sampling_of(job.asked), self.model.generation_config
        do_sample, temperature, top_p, top_k = (
            given.get(name, getattr(default, name)) for name in ("do_sample", "temperature", "top_p", "top_k")
        )
        if not do_sample:
            return GREEDY
        if job.seed is not None:
            raise Refusal(
                400, "seed: a server that was started with --parallel accepts it only with temperature 0.", param="seed"
            )
        return {
            "temperature": 1.0 if temperature is None else float(temperature),
            "top_p": 1.0 if top_p is None else float(top_p),
            "top_k": min(top_k or self._vocabulary, self._vocabulary),
        }

    def _take(self, answer: Answer, output: Any) -> None:
        """Add the new tokens of ``output``, which has all tokens of the answer so far."""
        answer.add(output.generated_tokens[answer.new_tokens :])
        if output.error is not None:
            answer.fail(RuntimeError(output.error))
        elif output.is_finished():
            answer.close()
