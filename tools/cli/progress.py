"""Progress of a long command on standard error: a bar on a terminal, otherwise a line every LINE_SECONDS.

A prompt that is computed has a bar on a terminal, and nothing elsewhere.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from tqdm import tqdm

from moetier.runtime.engine.sequence import TokenSequence
from moetier.tiers.text import format_bytes

from .failure import plain

LINE_SECONDS = 10.0
PROMPT_SECONDS = 1.0  # time after which a prompt that is being computed gets a bar

tqdm.set_lock(threading.RLock())  # tqdm's own is for several processes: from Python 3.14 on it starts one


class ByteProgress:
    """Count bytes up to ``total``, and show the progress unless ``quiet``. Not thread-safe."""

    def __init__(self, label: str, total: int, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._label = label
        self._total = total
        self._done = 0
        self._start = self._last = time.monotonic()
        self._bar = (
            tqdm(total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024, leave=False)
            if sys.stderr.isatty() and not quiet
            else None
        )

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def advance(self, count: int) -> None:
        """Count ``count`` more bytes, and show the progress if it is due."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif not self._quiet and time.monotonic() - self._last >= LINE_SECONDS:
            self._last = time.monotonic()
            rate = self._done / self.seconds
            print(
                f"{self._label}: {self._done / self._total:.0%}, {format_bytes(rate)}/s, "
                f"{(self._total - self._done) / rate:.0f} s left",
                file=sys.stderr,
            )

    def say(self, line: str) -> None:
        """Print a line on standard output, above the progress bar if there is one."""
        tqdm.write(plain(line), file=sys.stdout)

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def transfer_progress(label: str) -> Callable[[int], contextlib.AbstractContextManager[Callable[[int], None]]]:
    """Return a function that takes the bytes of a whole transfer, and shows its progress under ``label``.

    The function returns a context manager, which yields a function: this is called with the bytes of each piece.
    """

    @contextlib.contextmanager
    def begin(total: int) -> Iterator[Callable[[int], None]]:
        with ByteProgress(label, total) as progress:
            yield progress.advance

    return begin


@contextlib.contextmanager
def prompt_bar(model: Any, sequence: TokenSequence) -> Iterator[None]:
    """Show a bar while the prompt of ``sequence`` is computed in the ``with`` block, if standard error is a terminal.

    The bar advances with each block of experts. It disappears before the first text is printed.
    """
    if not sys.stderr.isatty():
        yield
        return
    from moetier.runtime.moe.experts import experts_modules
    from moetier.runtime.moe.gates import Observer

    modules = experts_modules(model).values()
    bar = tqdm(
        total=len(sequence.request.ids),
        desc=f"prompt of {len(sequence.request.ids):,} tokens",
        bar_format="{l_bar}{bar}| {n:.0f} of {total_fmt} computed, {elapsed}<{remaining}",
        delay=PROMPT_SECONDS,
        dynamic_ncols=True,  # the terminal may get another size meanwhile
        leave=False,
    )
    hooks = list[Any]()

    def end() -> None:
        for hook in hooks:
            hook.remove()
        hooks.clear()
        bar.close()

    def tokens_of(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[int]:
        hidden = next(iter((*positional, *named.values())))  # [tokens, hidden], or with more leading dimensions
        return (hidden.shape[:-1].numel(),)

    def advance(tokens: int) -> None:
        bar.total = len(sequence.request.ids) - sequence.cached
        bar.update(tokens / len(modules))
        if bar.n > bar.total - 0.5:  # the last block begins
            end()

    try:
        # an Observer, as a model with other hooks computes in other ways than without the bar
        hooks += [
            module.register_forward_pre_hook(Observer(advance, tokens_of), with_kwargs=True) for module in modules
        ]
        yield
    finally:
        end()
