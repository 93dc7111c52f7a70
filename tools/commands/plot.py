"""``moetier plot WHAT T.npz -o F.png``: draw a trace; ``moetier plot resident ADDRESS``: draw a daemon's experts."""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moetier.runtime.config import MOST, Number
from moetier.tiers.cache.policies import DEFAULT_POLICY
from moetier.tiers.errors import ConfigError
from moetier.tools.cli.arguments import CREDENTIALS, add_credentials, asked, credentials
from moetier.tools.cli.parser import UsageError, file_or_address

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES = ("moetier plot figure1 trace.npz -o figure1.svg", "moetier plot resident default -o resident.png")

OF_TRACES = ("figure1", "hits", "recall", "heatmap")
KINDS = (*OF_TRACES, "resident")
ONLY = {"tokens": ("figure1",), "blocks": ("figure1",), "cached": ("figure1", "heatmap")}  # pictures that use an option
ONLY |= dict.fromkeys(CREDENTIALS, ("resident",))
FORMATS = (".png", ".svg")
CACHED = Number(int, 0, MOST, "Give 0 to what a block has.")
MOST_TOKENS = 200
FEW_TOKENS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier plot`."""
    parser.add_argument(
        "kind",
        choices=KINDS,
        metavar="WHAT",
        help="figure1: the experts of each token, with its text; hits: hit ratio against cache size; recall: recall of "
        "the routers' predictions against look-ahead; heatmap: use and hits by block and expert; resident: which "
        "experts a daemon holds, and how often each was used",
    )
    parser.add_argument(
        "source",
        type=file_or_address,
        metavar="T.npz|ADDRESS",
        help="a trace, as moetier trace records it; for resident a daemon: a name, a folder or HOST:PORT",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the picture, a .png or .svg file"
    )
    parser.add_argument(
        "--tokens", type=_span, metavar="A-B", help=f"figure1: which tokens (default: the first {FEW_TOKENS})"
    )
    parser.add_argument(
        "--blocks", type=_list, metavar="N,M", help="figure1: which blocks (default: four, from the first to the last)"
    )
    parser.add_argument(
        "--cached",
        type=CACHED,
        metavar="N",
        help=f"figure1, heatmap: experts of each block in a cache with the policy {DEFAULT_POLICY} (default: top-k)",
    )
    add_credentials(parser)


def run(arguments: argparse.Namespace) -> int:
    """Draw the picture and return 0.

    Raises UsageError for an option of another picture, ConfigError where there is nothing to draw or matplotlib is
    missing, DaemonError where no daemon answers, and TargetError where the picture can't be written.
    """
    from moetier.tiers.errors import TargetError

    for name, kinds in ONLY.items():
        if arguments.kind not in kinds and asked(arguments, name):
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"plot {arguments.kind} has no {option}.", f"Leave it out; {' and '.join(kinds)} has it.")
    if arguments.output.suffix.lower() not in FORMATS:
        raise UsageError(f"{arguments.output} is no picture that can be made.", "Name a .png or an .svg.")
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "Pictures need matplotlib, which is not installed.", 'Install it: pip install ".[plots]" in the repository.'
        ) from error
    figure = _draw_daemon(arguments) if arguments.kind == "resident" else _draw_trace(arguments)
    is_svg = arguments.output.suffix.lower() == ".svg"
    try:
        # the same trace gives the same file; an SVG's text stays text
        with matplotlib.rc_context({"svg.hashsalt": "moetier", "svg.fonttype": "none"}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # a character that no font has is drawn as a box
            figure.savefig(arguments.output, dpi=110, metadata={"Date": None} if is_svg else {"Software": None})
    except OSError as error:
        raise TargetError(
            f"{arguments.output}: can't be written ({error.strerror}).", "Name a file in a folder that exists."
        ) from error
    return 0


def _draw_daemon(arguments: argparse.Namespace) -> Figure:
    """Draw the experts of a daemon as they are now. Raises DaemonError if the daemon does not report them."""
    from moetier.tiers.errors import DaemonError
    from moetier.tools.lab.figures import draw_resident
    from moetier.tools.top.watch import look

    from .stats import address_of

    address = address_of(arguments.source)
    stats = look(address, credentials(arguments)).stats
    if not all(details.blocks for details in stats.details) or not stats.details:
        raise DaemonError(
            f"The daemon at {address}, of an earlier version, tells nothing of experts.",
            "End it and start it again, with this version.",
        )
    return draw_resident(stats, time=time.strftime("%Y-%m-%d %H:%M:%S"))


def _draw_trace(arguments: argparse.Namespace) -> Figure:
    """Draw a trace. Raises ConfigError where the options don't fit it."""
    from moetier.runtime.trace.trace import Trace
    from moetier.tools.lab import figures

    source = Path(arguments.source)
    trace = Trace.load(source)
    if not trace.model:
        trace = replace(trace, model=source.stem)
    cached = trace.top_k if arguments.cached is None else arguments.cached
    if not 0 <= cached <= max(trace.num_experts) or (cached == 0 and arguments.kind == "heatmap"):
        raise ConfigError(f"{cached} experts of a block can't be cached.", f"It has {max(trace.num_experts)}.")
    match arguments.kind:
        case "figure1":
            tokens = range(min(FEW_TOKENS, trace.tokens)) if arguments.tokens is None else arguments.tokens
            if tokens.stop > trace.tokens or len(tokens) > MOST_TOKENS:
                raise ConfigError(
                    f"Tokens {tokens.start} to {tokens.stop - 1} can't be drawn.",
                    f"The trace has {trace.tokens:,}, from 0; {MOST_TOKENS} fit into a picture.",
                )
            last = trace.block_count - 1
            blocks = arguments.blocks or sorted({0, last // 3, 2 * last // 3, last})
            if max(blocks) > last:
                raise ConfigError(f"There is no block {max(blocks)}.", f"The trace has {last + 1}, from 0.")
            return figures.draw_use(trace, tokens=tokens, blocks=blocks, cached=cached)
        case "hits":
            return figures.draw_hits(trace)
        case "recall":
            if trace.predictions is None:
                raise ConfigError(
                    f"{arguments.source} has no predictions.", "Record them: moetier trace asks the gates ahead."
                )
            return figures.draw_recall(trace)
    return figures.draw_heatmap(trace, cached=cached)


def _span(text: str) -> range:
    """Parse an inclusive range of tokens: "10-49" are 40 tokens. Raises ConfigError for an empty range."""
    first, _, last = text.partition("-")
    if not (span := range(int(first), int(last) + 1)):
        raise ConfigError(f"Tokens {text} can't be drawn.", "Give the first and the last, as in 0-39.")
    return span


def _list(text: str) -> list[int]:
    found = sorted({int(part) for part in text.split(",")})
    if found[0] < 0:
        raise argparse.ArgumentTypeError("blocks are counted from 0")
    return found
