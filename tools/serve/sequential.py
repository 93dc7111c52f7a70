"""Engine that computes answers one after the other with ``generate()``, as `moetier generate` does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from moetier.runtime.generation.decoding import ONE_SEQUENCE, behind, penalties_of, sampling_of
from moetier.runtime.generation.prompt_cache import PromptCache

from .engine import Answer, Engine, Job


class OneByOne(Engine):
    """Engine that computes one answer at a time, and caches the latest keys and values for the next request."""

    def __init__(self, model: Any, tokenizer: Any, context: int, chunk: int) -> None:
        """Compute prompts in chunks of at most ``chunk`` tokens."""
        super().__init__(model, tokenizer, context)
        self._chunk = chunk
        self._cache = PromptCache(model)
        self._thread = ThreadPoolExecutor(1, "moetier-answers")

    def submit(self, job: Job) -> Answer:
        """Queue a job for the generating thread, and return its answer."""
        with self._begun(job) as answer:
            self._thread.submit(self._generate, answer)
        return answer

    def stop(self) -> None:
        """Wait until all queued answers are computed or skipped, and stop. Answers that have ended are skipped."""
        self._thread.shutdown()

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
