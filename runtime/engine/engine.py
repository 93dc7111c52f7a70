"""The loop of steps, on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any

from torch import Tensor

from moetier.runtime.generation.decoding import longest_prompt
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS
from moetier.runtime.libraries.model_building import BUILDING
from moetier.runtime.model.context import longest_context
from moetier.tiers.closeable import Closeable, closed_on_error
from moetier.tiers.errors import ConfigError, MoetierError, UnsupportedModelError
from moetier.tiers.threads import start_thread

from .kv_cache import KVCache
from .model_runner import ModelRunner
from .packed_runner import PackedRunner, check_bits, may_pack
from .page_binding import binding_of
from .page_folder import PageFolder, PageOptions
from .runner import Runner, Stopped, Task
from .sampling import Sampler, generates_itself, scored
from .saved_pages import SavedPages
from .scheduler import Scheduler, StepLimits
from .sequence import DeadlineError, Finish, Request, Sampled, TokenSequence
from .stream import Stream

PROMPT_SHARE = 3.0  # a long prompt is computed this many times as long as the step of other sequences before it
LONGEST_SLICE = 0.3  # seconds after which others are computed, unless their step takes longer itself
SCORED = 128  # most tokens of a prompt that are scored together: each has logits for the whole vocabulary
_log = logging.getLogger(__name__)


class EngineError(MoetierError):
    """The engine can't compute any more."""


def _saved(model: Any, runner: ModelRunner, disk: PageOptions, keys: Mapping[str, bytes] | None) -> SavedPages | None:
    """Return the pages of a model on disk; None if it has no pages to save. Raises ConfigError."""
    if not runner.can_resume:
        _log.warning("The model computes whole prompts: nothing of it is kept in %s.", disk.folder)
        return None
    if model.device.type != "cpu":
        raise ConfigError(
            "Keys and values are in the memory of a device; only those in host memory can be kept on disk.",
            "Keep them in memory: leave out the folder (moetier serve --kv-cache-dir).",
        )
    manifest = model.tiers.manifest
    folder = PageFolder(disk, manifest.model, binding_of(model, manifest))
    has_states = runner.state_memory is not None
    return SavedPages(folder, runner.memory, model.tiers.origin.order, keys, has_states=has_states)


class Engine(Closeable):
    """Computes the answers of many requests with one model.

    Requests may be submitted on any thread. Tokens are sampled on the engine's own thread.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        pages: int,
        max_sequences: int,
        chunk: int,
        context: int,
        later: int | None = None,
        saved: SavedPages | None = None,
    ) -> None:
        """Start the engine's thread.

        Args:
            runner: computes with a model.
            pages: number of pages for keys and values.
            max_sequences: most sequences that run at a time.
            chunk: most tokens of a prompt that are computed together.
            context: most tokens of a sequence.
            later: the same as ``chunk`` for tokens behind others, or beside other sequences; None: ``chunk``.
            saved: pages on disk, which ``close`` closes.
        """
        self.context = min(context, PAGE_TOKENS * pages)
        self.saved = saved
        self._runner = runner
        pass_tokens, whole = runner.pass_tokens, context  # a model that can't resume computes whole prompts
        limits = StepLimits(
            max_sequences,
            first_chunk=max(chunk, pass_tokens or 1) if runner.can_resume else whole,
            later_chunk=min(chunk, later or chunk) if runner.can_resume else whole,
            scored_chunk=min(SCORED, pass_tokens or chunk) if runner.can_resume else whole,
            pass_tokens=pass_tokens,
        )
        self._scheduler = Scheduler(KVCache(pages, runner, keeps=runner.can_resume, saved=saved), limits)
        self._beside: set[TokenSequence] = set()  # sequences of the long tasks that are being computed
        self._next_slice = 0.0  # time at which other sequences are computed beside them
        self._samplers: dict[TokenSequence, Sampler] = {}
        self._masks = ThreadPoolExecutor(1, "moetier-masks")
        self._changed = threading.Condition()  # guards: ``_arrived``, ``_is_closed``, ``_failure``
        self._arrived: list[TokenSequence] = []
        self._is_closed = False
        self._failure: BaseException | None = None  # what has ended the thread
        self._thread = start_thread("moetier-engine", self._work)

    @classmethod
    def of(
        cls,
        model: Any,
        *,
        max_sequences: int = 1,
        tokens: int = 0,
        disk: PageOptions | None = None,
        keys: Mapping[str, bytes] | None = None,
    ) -> Engine:
        """Return an engine with the pages for which the model's tiers leave memory.

        There are pages for a sequence of ``tokens`` tokens in any case.

        Args:
            model: the model, with its tiers.
            max_sequences: most sequences that run at a time.
            tokens: tokens of the longest sequence, if that is known.
            disk: where pages are kept on disk; None: nowhere.
            keys: for each user of requests the digest of an API key: pages on disk are found with the same key only.

        Raises UnsupportedModelError if the model generates text in another way than token by token, or can't have keys
        and values in 8 bits as its options say; and ConfigError if ``disk`` can't be used.
        """
        if generates_itself(model):
            raise UnsupportedModelError(
                f"{type(model).__name__} does not generate text token by token.", "Use `moetier generate`."
            )
        kv = model.tiers.kv
        limits = kv.context, longest_prompt(model), longest_context(model.config)
        context = max(tokens, min(limit for limit in limits if limit is not None))
        pages = max(kv.pages, -(-tokens // PAGE_TOKENS))
        prefill = model.tiers.prefill
        check_bits(model, kv.bits)
        chunk, later, runner = prefill.tokens, prefill.later, ModelRunner(model, pages, bits=kv.bits)
        if prefill.in_lockstep is not None and may_pack(model):
            chunk, later = prefill.in_lockstep, None
            runner = PackedRunner(model, pages, chunk=prefill.later, bits=kv.bits)
        saved = None if disk is None else _saved(model, runner, disk, keys)
        with contextlib.nullcontext() if saved is None else closed_on_error(saved):
            return cls(
                runner, pages=pages, max_sequences=max_sequences, chunk=chunk, context=context, later=later, saved=saved
            )

    @property
    def sequences(self) -> list[TokenSequence]:
        """Sequences that run or wait."""
        return [*self._scheduler.running, *self._scheduler.waiting]

    @property
    def is_alive(self) -> bool:
        """Whether the engine can compute further requests."""
        return self._failure is None and not self._is_closed

    @property
    def most_scored(self) -> int:
        """Most tokens of a prompt that can be scored."""
        return self.context if self._runner.can_resume else min(SCORED, self.context)

    def submit(
        self, request: Request, on_token: Callable[[Sampled], object], on_end: Callable[[TokenSequence], object]
    ) -> TokenSequence:
        """Begin to compute a request, and return its sequence.

        ``on_token`` is called with each new token, and ``on_end`` once after the last one, on the engine's thread.
        Raises ValueError if the prompt is empty, does not fit into the context or is too long to be scored, or if no
        token is wanted, and EngineError if the engine has ended.
        """
        if request.max_new_tokens < 1:
            raise ValueError(f"{request.max_new_tokens} new tokens")
        if not 0 < len(request.ids) < self.context:
            raise ValueError(f"a prompt of {len(request.ids)} tokens in a context of {self.context}")
        if request.scores_prompt and len(request.ids) > self.most_scored:
            raise ValueError(f"a prompt of {len(request.ids)} tokens, of which {self.most_scored} can be scored")
        sequence = TokenSequence(request, on_token, on_end)
        with self._changed:
            if self._failure is not None or self._is_closed:
                raise EngineError(
                    f"The thread that computes answers has ended: {self._failure or 'the engine is closed'}.",
                    "Load the model again.",
                )
            self._arrived.append(sequence)
            self._changed.notify()
        return sequence

    def stream(self, request: Request) -> Stream:
        """Begin to compute a request, and return the stream of its tokens. Raises what ``submit`` raises."""
        tokens = SimpleQueue[int | None]()
        return Stream(
            self.submit(request, lambda sampled: tokens.put(sampled.token), lambda _: tokens.put(None)), tokens
        )

    async def stream_async(self, request: Request) -> AsyncGenerator[int]:
        """Begin to compute a request, and yield its tokens in the running event loop.

        If the generator is closed, the rest is not computed. Raises what ``submit`` raises, and the error with which
        the sequence has failed.
        """
        loop, tokens = asyncio.get_running_loop(), asyncio.Queue[int | None]()

        def put(token: int | None) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(tokens.put_nowait, token)

        sequence = self.submit(request, lambda sampled: put(sampled.token), lambda _: put(None))
        try:
            while (token := await tokens.get()) is not None:
                yield token
        finally:
            sequence.cancel()
        if sequence.error is not None:
            raise sequence.error

    def close(self) -> None:
        """Cancel all sequences, and end the thread after the layer that is being computed."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        self._masks.shutdown(cancel_futures=True)
        if self.saved is not None:
            self.saved.close()

    def step(self) -> None:
        """Compute one step: choose tasks, run them, and append a token to each sequence that is complete."""
        short, long = self._schedule()
        self._run(short)
        self._beside = {task.sequence for task in long}
        try:
            self._run(long)
        finally:
            self._beside = set()

    def _schedule(self) -> tuple[list[Task], list[Task]]:
        """Return the tasks of the next step: short ones, whose tokens must not wait, and long ones."""
        for sequence in self.sequences:
            if sequence.is_over and sequence not in self._beside:
                self._end_early(sequence)
        try:
            while self._scheduler.begin_next():
                pass
        except Exception as error:
            self._fail(self._scheduler.waiting[0], error)
        tasks, stopped = self._scheduler.schedule(self._beside)
        for sequence in stopped:
            self._runner.end(sequence)
        if stopped and not self._scheduler.running:  # the last one ran alone: it would begin and stop for ever
            self._fail(stopped[-1], EngineError("Pages for keys and values are missing.", "Load the model again."))
        tasks = [task for task in tasks if self._has_sampler(task.sequence)]
        return [task for task in tasks if not self._is_long(task)], [task for task in tasks if self._is_long(task)]

    def _is_long(self, task: Task) -> bool:
        return self._runner.pass_tokens is not None and task.tokens > self._runner.pass_tokens

    def _between(self, tasks: list[Task], done: float) -> None:
        """Compute a step of other sequences if that is due. ``done``: fraction of long ``tasks`` that is computed.

        Raises Stopped if the engine is closed, or nothing of the tasks is wanted any more.
        """
        for task in tasks:
            task.sequence.note_underway(done * task.tokens)
        if self._is_closed or all(task.sequence.is_over for task in tasks):
            raise Stopped
        BUILDING.let_build()
        began = time.monotonic()
        if began < self._next_slice:
            return
        self._add_arrived()
        short, _ = self._schedule()
        self._run(short)
        now = time.monotonic()
        self._next_slice = now + max(min(PROMPT_SHARE * (now - began), LONGEST_SLICE), now - began)

    def _has_sampler(self, sequence: TokenSequence) -> bool:
        """Return whether a sequence has a sampler, and make it one. A sequence that can't have one ends."""
        if sequence not in self._samplers:
            try:
                sampler = self._samplers[sequence] = self._runner.sampler(sequence)
                sampler.begin(self._masks)
            except Exception as error:
                self._fail(sequence, error)
                return False
        return True

    def _run(self, tasks: list[Task]) -> None:
        """Run tasks, together if the runner can.

        If that fails, run each alone: an error of one sequence does not end others.
        """
        if len(tasks) > 1 and not self._runner.computes_together:
            for task in tasks:
                self._run([task])
            return
        if not tasks:
            return
        try:
            outputs = self._compute(tasks)
        except Stopped:  # the others go on at once, or clients that cancel their prompts would stop them
            self._run([task for task in tasks if task.tokens == 1 and not (self._is_closed or task.sequence.is_over)])
        except Exception as error:
            if len(tasks) == 1:
                self._fail(tasks[0].sequence, error)
            else:
                for task in tasks:
                    self._run([task])
        else:
            for task, output in zip(tasks, outputs, strict=True):
                if not (self._is_long(task) and task.sequence.is_over):  # it may not have been computed
                    self._advance(task, output)

    def _compute(self, tasks: list[Task]) -> list[Tensor | None]:
        """Return what the runner computes, which stops if a prompt among ``tasks`` is over."""
        prompts = [task.sequence for task in tasks if task.tokens > 1]
        try:
            return self._runner.run(
                tasks,
                lambda: self._is_closed or any(sequence.is_over for sequence in prompts),
                partial(self._between, tasks),
            )
        finally:
            for sequence in prompts:
                sequence.note_underway(0.0)

    def _advance(self, task: Task, output: Tensor | None) -> None:
        """Let a sequence go on after a computed task. ``output``: its logits, as ``Runner.run`` returns them."""
        scores, is_complete = task.scores, task.is_complete
        self._scheduler.computed(task)
        if output is None:
            return
        try:
            if scores:
                self._score(task.sequence, task.begin, output)
            if is_complete:
                self._sample(task.sequence, output[-1] if scores else output)
        except Exception as error:
            self._fail(task.sequence, error)

    def _score(self, sequence: TokenSequence, begin: int, logits: Tensor) -> None:
        """Note the log probabilities of the prompt's tokens after those from position ``begin`` on."""
        tokens = sequence.ids[begin + 1 : min(begin + 1 + len(logits), len(sequence.request.ids))]
        scores = scored(logits[: len(tokens)], tokens, sequence.request.logprobs or 0)
        sequence.score(begin + 1, scores)

    def _sample(self, sequence: TokenSequence, logits: Tensor) -> None:
        sampler = self._samplers[sequence]
        sampled = sampler(logits)
        sequence.append(sampled)
        if sampler.is_last(sampled.token):
            self._end(sequence, Finish.END)
        elif sequence.new_tokens == sequence.request.max_new_tokens or len(sequence.ids) == self.context:
            self._end(sequence, Finish.LENGTH)

    def _end_early(self, sequence: TokenSequence) -> None:
        """End a sequence that ``is_over``."""
        if sequence.is_cancelled:
            self._end(sequence, Finish.CANCELLED)
            return
        done = f"{sequence.new_tokens:,} of at most {sequence.request.max_new_tokens:,} tokens"
        error = DeadlineError(
            f"The deadline of a request has passed after {done} of its answer.",
            "Ask for fewer tokens, send fewer requests at a time, or give it a later deadline.",
        )
        self._end(sequence, Finish.DEADLINE, error)

    def _fail(self, sequence: TokenSequence, error: Exception) -> None:
        self._end(sequence, Finish.FAILED, error)

    def _end(self, sequence: TokenSequence, finish: Finish, error: BaseException | None = None) -> None:
        self._scheduler.remove(sequence, is_answered=finish is not Finish.FAILED and sequence.new_tokens > 0)
        self._runner.end(sequence)
        self._samplers.pop(sequence, None)
        try:
            sequence.end(finish, error)
        except Exception as failure:  # of the caller's function; the sequences that are computed need not end
            _log.error("A function that was to be called at the end of a sequence has failed: %s", failure)

    def _work(self) -> None:
        try:
            while self._take():
                with BUILDING.computing():
                    self.step()
        except BaseException as error:  # an error of one sequence ends only that sequence
            with self._changed:
                self._failure = error
            _log.critical("The thread that computes answers has failed: %s", error)
        with self._changed:
            arrived, self._arrived = self._arrived, []
        finish = Finish.CANCELLED if self._failure is None else Finish.FAILED
        for sequence in (*arrived, *self.sequences):
            try:
                self._end(sequence, finish, self._failure)
            except Exception as error:  # the others must end nevertheless
                _log.error("The end of a sequence has failed: %s", error)
                with contextlib.suppress(Exception):
                    sequence.end(finish, self._failure)

    def _take(self) -> bool:
        """Wait until there is work, and let the scheduler have the sequences that have arrived.

        Returns False if the engine is to end.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._arrived or self._is_closed or self._scheduler.has_work)
            if self._is_closed:
                return False
        self._add_arrived()
        return True

    def _add_arrived(self) -> None:
        with self._changed:
            arrived, self._arrived = self._arrived, []
        for sequence in arrived:
            self._scheduler.add(sequence)
