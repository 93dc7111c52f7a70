"""Engine that computes answers one after the other with ``generate()``, as `moetier generate` does."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import Any

import torch

from moetier.runtime.generation.decoding import ONE_SEQUENCE, behind, penalties_of, sampling_of
from moetier.runtime.generation.prompt_cache import PromptCache

from .engine import Answer, Engine, Job
from .refusal import FAILED, Refusal, log_failure


class OneByOne(Engine):
    """Engine that computes one answer at a time, and caches the latest keys and values for the next request."""

    def __init__(self, model: Any, tokenizer: Any, context: int, chunk: int) -> None:
        """Compute prompts in chunks of at most ``chunk`` tokens."""
        super().__init__(model, tokenizer, context)
        self._chunk = chunk
        self._cache = PromptCache(model)
        self._queue = SimpleQueue[Answer | None]()
        self._faults: list[BaseException] = []  # one, if it has ended the thread
        self._thread = threading.Thread(target=self._work, name="moetier-answers")

    @property
    def is_alive(self) -> bool:
        """Whether the generating thread runs."""
        return self._thread.is_alive()

    def submit(self, job: Job) -> Answer:
        """Queue a job for the generating thread, and return its answer. Raises Refusal if the thread has failed."""
        if self._faults:
            raise Refusal(503, FAILED)
        with self._begun(job) as answer:
            self._queue.put(answer)
        if self._faults:  # the thread has failed meanwhile
            answer.fail(self._faults[0])
        return answer

    def _start(self) -> None:
        self._thread.start()

    def _stop(self) -> None:
        """Wait until all queued answers are computed or skipped, and stop. Answers that have ended are skipped."""
        self._queue.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        try:
            while (answer := self._queue.get()) is not None:
                self._generate(answer)
        except BaseException as error:  # no Exception, as ``_generate`` ends an answer that raises one
            self._faults.append(error)
            log_failure("The computing thread", error)
            for answer in list(self._answers):
                answer.fail(error)

    def _generate(self, answer: Answer) -> None:
        job = answer.job
        if job is None:  # the answer ended while it was queued
            return
        decoding = {**sampling_of(job.asked), **penalties_of(job.asked), **ONE_SEQUENCE, "max_new_tokens": job.most}
        try:
            if job.seed is None:
                torch.seed()
            else:
                torch.manual_seed(job.seed)
                self._cache.clear()  # cached values may differ in their last bits, by how prompts were chunked
            answer.kept_tokens = self._cache.begin(job.ids)
            self.tally.add(prompt_tokens=len(job.ids), kept_tokens=answer.kept_tokens)
            self._cache.generate(
                job.ids,
                chunk=self._chunk,
                should_stop=lambda: answer.ended,
                on_token=lambda token: answer.add([token]),
                **behind(len(job.ids), decoding),
            )
            answer.close()
        except Exception as error:
            answer.fail(error)
