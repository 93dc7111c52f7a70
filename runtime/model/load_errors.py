"""Errors, reports and the progress bar of transformers while it loads a model."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel

from moetier.runtime.machine.memory import shortage_in
from moetier.tiers.errors import ConfigError, MoetierError, StoreFormatError
from moetier.tiers.store.folder import command

MISFIT = "Check that config.json belongs to these weights. If it does, get the checkpoint or convert it again."


@contextlib.contextmanager
def bar_only_on_a_terminal() -> Iterator[None]:
    """Disable transformers' progress bar if standard error is not a terminal."""
    log = transformers.utils.logging
    if not log.is_progress_bar_enabled() or (sys.stderr is not None and sys.stderr.isatty()):
        yield
        return
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.enable_progress_bar()


@contextlib.contextmanager
def load_errors(location: Path) -> Iterator[None]:
    """Turn errors of transformers into errors of this project.

    These are StoreFormatError if files can't be read or don't match, ConfigError if a library is missing, and
    BudgetError if memory can't be allocated.
    """
    try:
        yield
    except MoetierError:
        raise
    except Exception as error:
        if (shortage := shortage_in(error)) is not None:
            raise shortage from error
        _raise_own_error(error, location)
        raise


def _raise_own_error(error: Exception, location: Path) -> None:
    """Raise this project's error for an error of transformers in loading ``location``, if there is one."""
    if isinstance(error, ImportError):
        raise ConfigError(
            f"{location} can't be loaded in this way: {_one_line(error)}",
            "Install what is missing, or choose another `attn_implementation`.",
        ) from error
    if isinstance(error, OSError | ValueError | SafetensorError | StrictDataclassError):
        raise StoreFormatError(
            f"{location} can't be loaded: {_one_line(error)}",
            f"Check the directory: {command('verify', location)}; or convert the model again.",
        ) from error
    if (misfit := _misfit(error)) is not None:
        raise StoreFormatError(f"{location} can't be loaded: {misfit}.", MISFIT) from error


def _misfit(error: Exception) -> str | None:
    """Return which weight of a checkpoint does not fit its config, by an error of transformers; None for another error.

    The error itself refers to the report that transformers has logged.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        loading_info = frame.f_locals.get("loading_info")
        if shapes := sorted(getattr(loading_info, "mismatched_keys", ())):
            name, stored, expected = shapes[0]
            more = f", and {len(shapes) - 1} more do not fit" if shapes[1:] else ""
            return f"{name} has shape {list(stored)}, and by config.json {list(expected)}{more}"
        if failed := sorted(getattr(loading_info, "conversion_errors", {})):
            return f"the weights that {failed[0]} is made of do not fit together"
    return None


@contextlib.contextmanager
def report_held_back() -> Iterator[None]:
    """Log transformers' report about the weights of a model at the end of the context, unless it raises an exception.

    An exception says the same more clearly. Reports of other threads are logged at once: they are about other models.
    """
    held: list[logging.LogRecord] = []
    own = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        is_report = threading.get_ident() == own and "LOAD REPORT" in record.getMessage()
        if is_report:
            held.append(record)
        return not is_report

    log = logging.getLogger(PreTrainedModel.__module__)
    log.addFilter(passes)
    try:
        yield
    finally:
        log.removeFilter(passes)
    for record in held:
        log.handle(record)


def _one_line(error: Exception) -> str:
    """Format an error in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
