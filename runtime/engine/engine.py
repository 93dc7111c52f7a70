"""The engine: takes requests on any thread, and computes them step by step on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moetier.runtime.devices.device import device_class
from moetier.runtime.generation.decoding import longest_prompt
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS
from moetier.runtime.libraries.model_building import BUILDING
from moetier.runtime.model.context import longest_context
from moetier.runtime.model.names import listed_name
from moetier.tiers.closeable import Closeable, closed_on_error
from moetier.tiers.errors import ConfigError, UnsupportedModelError
from moetier.tiers.inbox import Inbox
from moetier.tiers.threads import start_thread

from .kv_cache import KVCache
from .model_runner import ModelRunner
from .packed_runner import PackedRunner, check_bits, may_pack
from .pages.page_binding import binding_of
from .pages.page_folder import PageFolder, PageOptions
from .pages.saved_pages import SavedPages
from .runner import Runner
from .sampling import generates_itself
from .scheduler import SCORED, Scheduler, StepLimits
from .sequence import EngineError, Finish, Request, Sampled, TokenSequence
from .steps import Steps
from .stream import Stream

_log = logging.getLogger(__name__)


def _saved(model: Any, runner: ModelRunner, disk: PageOptions, keys: Mapping[str, bytes] | None) -> SavedPages | None:
    """Return the pages of a model on disk; None if it has no pages to save. Raises ConfigError."""
    if not runner.can_resume:
        _log.warning("The model computes whole prompts: nothing of it is kept in %s.", disk.folder)
        return None
    if device_class(model.device.type).has_memory:
        raise ConfigError(
            "Keys and values are in the memory of a device; only those in host memory can be kept on disk.",
            "Keep them in memory: leave out the folder (moetier serve --kv-cache-dir).",
        )
    manifest = model.tiers.manifest
    name = listed_name(Path(model.name_or_path)) or manifest.model
    folder = PageFolder(disk, name, binding_of(model, manifest))
    has_states = runner.state_memory is not None
    with closed_on_error(folder):
        return SavedPages(folder, runner.memory, model.tiers.origin.disk_order, keys, has_states=has_states)


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
        later_chunk: int | None = None,
        saved: SavedPages | None = None,
    ) -> None:
        """Start the engine's thread.

        Args:
            runner: computes with a model.
            pages: number of pages for keys and values.
            max_sequences: most sequences that run at a time.
            chunk: most tokens of a prompt that are computed together.
            context: most tokens of a sequence.
            later_chunk: ``chunk`` for a part of a prompt that is not its first, or that is computed beside other
                sequences; None: the same.
            saved: pages on disk, which ``close`` closes.
        """
        self.context = context = min(context, PAGE_TOKENS * pages)
        self.saved = saved
        self._runner = runner
        limits = StepLimits.of(
            runner, max_sequences=max_sequences, chunk=chunk, later_chunk=later_chunk or chunk, context=context
        )
        self._scheduler = Scheduler(KVCache(pages, runner, keeps=runner.can_resume, saved=saved), limits)
        self._masks = ThreadPoolExecutor(1, "moetier-masks")
        self._changed = threading.Condition()  # guards: ``_arrived``, ``_is_closed``, ``_failure``
        self._arrived: list[TokenSequence] = []
        self._is_closed = False
        self._steps = Steps(
            runner,
            self._scheduler,
            context,
            add_arrived=self._add_arrived,
            is_closed=lambda: self._is_closed,
            masks=self._masks,
        )
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
        runner: ModelRunner
        if prefill.lockstep_chunk is not None and may_pack(model):
            chunk, later_chunk = prefill.lockstep_chunk, None
            runner = PackedRunner(model, pages, later_chunk=prefill.later_chunk, bits=kv.bits)
        else:
            chunk, later_chunk = prefill.tokens, prefill.later_chunk
            runner = ModelRunner(model, pages, bits=kv.bits)
        saved = None if disk is None else _saved(model, runner, disk, keys)
        with contextlib.nullcontext() if saved is None else closed_on_error(saved):
            return cls(
                runner,
                pages=pages,
                max_sequences=max_sequences,
                chunk=chunk,
                context=context,
                later_chunk=later_chunk,
                saved=saved,
            )

    @property
    def sequences(self) -> list[TokenSequence]:
        """Sequences that run or wait."""
        return self._steps.sequences

    @property
    def is_alive(self) -> bool:
        """Whether the engine can compute further requests."""
        return self._failure is None and not self._is_closed

    @property
    def max_scored(self) -> int:
        """Most tokens of a prompt that can be scored."""
        return self.context if self._runner.can_resume else min(SCORED, self.context)

    def submit(
        self,
        request: Request,
        on_token: Callable[[TokenSequence, Sampled], object],
        on_end: Callable[[TokenSequence], object],
    ) -> TokenSequence:
        """Begin to compute a request, and return its sequence.

        ``on_token`` is called with the sequence and each new token, and ``on_end`` once after the last one, on the
        engine's thread.

        Raises ValueError if the prompt is empty, does not fit into the context or is too long to be scored, or if no
        token is wanted, and EngineError if the engine has ended.
        """
        if request.max_new_tokens < 1:
            raise ValueError(f"Ask for at least 1 new token, not {request.max_new_tokens}.")
        tokens = len(request.ids)
        if not 0 < tokens < self.context:
            raise ValueError(f"The prompt has {tokens:,} tokens; it must have 1 to {self.context - 1:,}.")
        if request.scores_prompt and tokens > self.max_scored:
            raise ValueError(f"The prompt has {tokens:,} tokens; at most {self.max_scored:,} can be scored.")
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
        tokens = Inbox[int | None]()
        return Stream(
            self.submit(request, lambda _, sampled: tokens.put(sampled.token), lambda _: tokens.put(None)), tokens
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

        sequence = self.submit(request, lambda _, sampled: put(sampled.token), lambda _: put(None))
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
        with contextlib.ExitStack() as closing:
            if self.saved is not None:
                closing.callback(self.saved.close)
            self._masks.shutdown(cancel_futures=True)

    def _work(self) -> None:
        try:
            while self._take_work():
                with BUILDING.computing():
                    self._steps.step()
        except BaseException as error:  # ``Steps`` handles errors of one sequence; this ends the thread
            with self._changed:
                self._failure = error
            _log.critical("The thread that computes answers has failed: %s", error)
        with self._changed:
            arrived, self._arrived = self._arrived, []
        finish = Finish.CANCELLED if self._failure is None else Finish.FAILED
        for sequence in (*arrived, *self.sequences):
            try:
                self._steps.end(sequence, finish, self._failure)
            except Exception as error:  # the others must end nevertheless
                _log.error("The end of a sequence has failed: %s", error)
                with contextlib.suppress(Exception):
                    sequence.end(finish, self._failure)

    def _take_work(self) -> bool:
        """Wait until there is work, and let the scheduler have it. Return whether the engine goes on."""
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
