"""``moetier convert``: make a model directory from a Hugging Face checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from moetier.tools.cli.arguments import add_options
from moetier.tools.cli.parser import add_json, checked, hub_id, local_folder
from moetier.tools.convert.options import CONVERT_OPTIONS, Options

if TYPE_CHECKING:
    from moetier.tools.convert.conversion import ConversionReport

EXAMPLES = (
    "moetier convert ./Mixtral-8x7B-v0.1 ./mixtral-4bit",
    "moetier convert mistralai/Mixtral-8x7B-v0.1 ./mixtral-3bit --bits 3",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier convert`."""
    parser.add_argument(
        "source",
        type=hub_id,
        metavar="SRC",
        help="folder of the checkpoint, GGUF file, or id on the Hugging Face hub",
    )
    parser.add_argument("target", metavar="DST", type=local_folder, help="folder for the new model directory")
    parser.add_argument(
        "--mirror",
        type=local_folder,
        metavar="FOLDER",
        help="also copy the experts into FOLDER on another disk, so that both are read (as moetier mirror does)",
    )
    add_convert_arguments(parser)


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `moetier convert` and `moetier pull` share."""
    add_options(parser, CONVERT_OPTIONS.values())
    add_json(parser, "one JSON object on standard output")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0, or 128 plus the signal's number if a signal stopped it.

    Raises UsageError, CheckpointError, TargetError or ConfigError.
    """
    options = options_of(arguments)
    from moetier.runtime.model.name_files import register_name
    from moetier.tools.convert.api import convert

    def work() -> ConversionReport:
        return convert(arguments.source, arguments.target, mirror=arguments.mirror, quiet=False, **options)

    code = report_of(work, arguments.json)
    if code == 0 and (name := register_name(arguments.target)) is not None:
        print(f"Every command takes it by the name {name}. Next: {following(arguments.target, name)}", file=sys.stderr)
    return code


def following(folder: Path, name: str) -> str:
    """Return the command to try a model with that is called ``name``.

    A model without a chat template and without settings for sampling is a base model, which repeats itself if the most
    likely token is always taken, and may never stop.
    """

    def setting(file: str, key: str) -> Any:
        with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
            return json.loads((folder / file).read_bytes()).get(key)

    has_template = (folder / "chat_template.jinja").exists() or setting("tokenizer_config.json", "chat_template")
    is_base = not has_template and not setting("generation_config.json", "do_sample")
    return f"moetier chat {name}" + (" -n 64 --temperature 0.6" if is_base else "")


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of ``add_convert_arguments`` as keyword arguments of ``convert``.

    Raises UsageError if they can't be combined.
    """
    from moetier.runtime.libraries.lean import lean_imports

    with lean_imports():
        import transformers.modeling_utils  # noqa: F401 - transformers imports its parts only when they are named

        import moetier.tools.convert.api  # noqa: F401

    options = {name: getattr(arguments, name) for name in CONVERT_OPTIONS}
    with checked():
        Options(**options)
    return options


def report_of(work: Callable[[], ConversionReport], as_json: bool) -> int:
    """Call ``work``, which converts a model. Print its report, and return the exit code."""
    import transformers

    logging.getLogger(transformers.__name__).setLevel(logging.ERROR)
    try:
        with _stopped_by_signals():
            report = work()
    except StoppedBySignal as stop:
        print("moetier: stopped. Run the same command again: it resumes where it stopped.", file=sys.stderr)
        return 128 + stop.number
    print(json.dumps(report.to_json()) if as_json else report.table())
    if report.trunk_bits == 16 and not as_json:
        line = "The trunk has 16 bits. --trunk-bits 8 makes each token faster, at no loss that we could measure."
        print(line, file=sys.stderr)
    return 0


class StoppedBySignal(BaseException):
    """Raised by a signal that ends the conversion."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Raise StoppedBySignal in the block at the first SIGINT or SIGTERM, and ignore others during its cleanup."""

    def stop(number: int, frame: FrameType | None) -> None:
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signal_number, signal.SIG_IGN)
        raise StoppedBySignal(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
